"""Spectra against dense matrices in float64."""

import os

import pytest
import torch
from torch import nn

from fairseq_sam.analysis.memory import free_bytes
from fairseq_sam.analysis.objective import Objective
from fairseq_sam.analysis.spectrum import (
    fisher_eigenvalues,
    hessian_density,
    hessian_eigenvalues,
    hessian_trace,
    smoothed,
)
from tests.analysis.models import (
    Logistic,
    Network,
    Quadratic,
    classes_data,
    classes_loss,
    cut,
    logistic_data,
    logistic_loss,
    quadratic_loss,
    random_quadratic,
)
from tests.analysis.test_objective import whole_hessian


def network_objective(**options):
    return Objective(Network(), cut(classes_data(), 1, 8, 3), classes_loss, **options)


def quadratic_with(eigenvalues):
    return Quadratic(torch.diag(eigenvalues.double()), torch.ones(len(eigenvalues), dtype=torch.float64))


def test_eigenvalues_of_a_quadratic():
    model = random_quadratic(8)
    found = hessian_eigenvalues(Objective(model, [1.0, 3.0], quadratic_loss), 8)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(model.A).flip(0), rtol=1e-10, atol=1e-12)
    assert found.residuals.max() < 1e-10


def test_eigenvalues_of_a_network():
    objective = network_objective()
    dense = torch.linalg.eigvalsh(whole_hessian(objective)).flip(0)
    assert dense[-1] < 0 < dense[0]  # largest, not largest in magnitude
    found = hessian_eigenvalues(objective, 5)
    torch.testing.assert_close(found.values, dense[:5], rtol=1e-9, atol=1e-12)


def test_residuals_tell_of_too_few_steps():
    objective = network_objective()
    assert hessian_eigenvalues(objective, 3, steps=4).residuals.max() > 1e-3
    assert hessian_eigenvalues(objective, 3, steps=objective.size).residuals.max() < 1e-8


@pytest.mark.parametrize("block", [1, 5, 100])
def test_fisher_of_a_network(block):
    model, instances = Network(), cut(classes_data(), *[1] * 12)
    rows = []
    for instance in instances:
        loss, _ = classes_loss(model.eval(), instance)
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    dense = torch.stack(rows).T @ torch.stack(rows) / 12
    seen = []
    found = fisher_eigenvalues(model, instances, classes_loss, 7, block=block, progress=lambda *n: seen.append(n))
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(dense).flip(0)[:7], rtol=1e-10, atol=1e-12)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_fisher_is_the_hessian_where_the_model_is_right():
    """Labels drawn from the model: the mean of many empirical Fishers is the Hessian (logistic regression)."""
    x, _ = logistic_data(200, 3)
    model = Logistic(torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64))
    p = torch.sigmoid(x @ model.w.detach())
    generator = torch.Generator().manual_seed(0)
    copies = [(x, (torch.rand(200, generator=generator, dtype=torch.float64) < p).double()) for _ in range(20)]
    instances = [pair for copy in copies for pair in cut(copy, *[1] * 200)]
    found = fisher_eigenvalues(model, instances, logistic_loss, 3, block=4000)
    hessian = hessian_eigenvalues(Objective(model, [copies[0]], logistic_loss), 3)
    torch.testing.assert_close(found.values, hessian.values, rtol=0.05, atol=0)


def test_fisher_weighs_by_size():
    """Twice the weight with the same gradients halves it, as it halves the Hessian."""
    model, instances = Network(), cut(classes_data(), *[1] * 12)
    once = fisher_eigenvalues(model, instances, classes_loss, 4)
    twice = fisher_eigenvalues(model, instances, lambda m, b: (classes_loss(m, b)[0], 2.0), 4)
    torch.testing.assert_close(twice.values, once.values / 2)


def test_trace():
    objective = network_objective()
    dense = float(whole_hessian(objective).trace())
    found = hessian_trace(objective, 400)
    assert abs(found.value - dense) < 4 * found.error and found.error < 0.2 * abs(dense)
    model = quadratic_with(torch.arange(1.0, 7.0))
    exact = hessian_trace(Objective(model, [2.0], quadratic_loss), 2)  # signs: exact for a diagonal
    assert exact.value == pytest.approx(21.0) and exact.error == pytest.approx(0.0, abs=1e-12)


def test_density():
    objective = network_objective()
    dense = torch.linalg.eigvalsh(whole_hessian(objective))
    (found,) = smoothed([hessian_density(objective, steps=40, runs=30)], points=4000)
    gap = found.grid[1] - found.grid[0]
    assert float(found.density.sum() * gap) == pytest.approx(1.0, abs=0.01)
    mean, second = ((found.density * found.grid**n).sum() * gap for n in (1, 2))
    assert float(mean) == pytest.approx(float(dense.mean()), abs=0.05)
    assert float(second) == pytest.approx(float((dense**2).mean() + found.width**2), rel=0.3)


def test_densities_of_models_are_smoothed_alike():
    """By what the worst of them resolves, on a grid that holds all of both, as integrals and means show."""
    sharp, flat = (quadratic_with(torch.tensor(values)) for values in ([1.0, 2.0, 40.0], [0.5, 1.0, 2.0]))
    quadratures = [hessian_density(Objective(model, [1.0], quadratic_loss), steps=3) for model in (sharp, flat)]
    widths = [found.width for found in quadratures]
    assert widths[0] == pytest.approx(39 / 3) and widths[1] < 1
    densities = smoothed(quadratures, points=20_000)
    assert {found.width for found in densities} == {widths[0]} and torch.equal(densities[0].grid, densities[1].grid)
    gap = densities[0].grid[1] - densities[0].grid[0]
    for found, mean in zip(densities, (43 / 3, 3.5 / 3), strict=True):  # signs: exact means for a diagonal
        assert float(found.density.sum() * gap) == pytest.approx(1.0, abs=1e-3)
        assert float((found.density * found.grid).sum() * gap) == pytest.approx(mean, abs=0.02)
    assert {found.width for found in smoothed(quadratures, width=0.5)} == {0.5}
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="width must be a finite number > 0"):
            smoothed(quadratures, width=wrong)


def test_progress_counts_products():
    seen = []
    hessian_eigenvalues(network_objective(), 2, steps=6, progress=lambda *n: seen.append(n))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_vectors_that_do_not_fit_into_memory(monkeypatch):
    """63 weights of 8 bytes, a vector for each of 30 steps and, at the end, for each of 10 eigenvalues."""
    objective, calls = network_objective(), []
    objective._loss_sum = lambda *args: calls.append(args)
    monkeypatch.setattr("fairseq_sam.analysis.memory.free_bytes", lambda device: 63 * 8 * 40 - 1)
    for call in (
        lambda: hessian_eigenvalues(objective, 10, steps=30),
        lambda: hessian_density(objective, steps=34),
    ):
        with pytest.raises(
            ValueError, match=r"steps over 63 weights needs about 1.88e-05 GiB .*, but 1.88e-05 GiB are"
        ):
            call()
    with pytest.raises(ValueError, match=r"free; lower --steps, --top or --density-steps, or .* --exclude"):
        hessian_eigenvalues(objective, 11, steps=30)
    assert not calls, "before the first product"
    objective = network_objective()
    hessian_eigenvalues(objective, 9, steps=30)
    monkeypatch.setattr("fairseq_sam.analysis.memory.free_bytes", lambda device: None)
    hessian_density(objective, steps=34)


def test_free_memory(monkeypatch, tmp_path):
    free = free_bytes(torch.device("cpu"))
    assert 2**20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemFree:  5 kB\nMemAvailable:     123 kB\n")
    monkeypatch.setattr("fairseq_sam.analysis.memory.MEMINFO", tmp_path / "meminfo")
    assert free_bytes(torch.device("cpu")) == 123 * 1024
    monkeypatch.setattr("fairseq_sam.analysis.memory.MEMINFO", tmp_path / "nowhere")
    assert free_bytes(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_bytes(torch.device("cuda", 0)) == 1200, "what torch holds but does not use is free"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda o: hessian_eigenvalues(o, 0), r"k \(--top\) must be an integer from 1 to 63, got 0"),
        (lambda o: hessian_eigenvalues(o, 64), r"k \(--top\) must be an integer from 1 to 63, got 64"),
        (lambda o: hessian_eigenvalues(o, 5, steps=4), r"steps \(--steps\) must be an integer from 5 to 63, got 4"),
        (lambda o: hessian_trace(o, 1), "samples must be an integer >= 2, got 1"),
        (lambda o: hessian_density(o, steps=64), r"steps \(--density-steps\) must be an integer from 1 to 63, got 64"),
        (lambda o: hessian_density(o, runs=0, steps=3), "runs must be an integer >= 1, got 0"),
        (
            lambda o: fisher_eigenvalues(o.model, [1, 2], classes_loss, 3),
            r"k \(--top\) must be an integer from 1 to 2, got 3",
        ),
        (lambda o: fisher_eigenvalues(o.model, [1, 2], classes_loss, 1, block=0), "block must be an integer >= 1"),
    ],
)
def test_bad_numbers(call, words):
    with pytest.raises(ValueError, match=words):
        call(network_objective())


def test_what_has_not_converged_is_told():
    """With few steps the values at the end are others than those of their rank; none that converged is."""
    objective = network_objective()
    exact = hessian_eigenvalues(objective, 12, steps=objective.size)
    assert exact.converged.all()
    few = hessian_eigenvalues(objective, 12, steps=14)
    wrong = (few.values - exact.values).abs() > 0.01 * exact.values.abs()
    assert wrong.any() and not few.converged.all() and not (wrong & few.converged).any()
    assert few.known.tolist() == [bool(few.converged[:rank].all()) for rank in range(1, 13)]


@pytest.mark.parametrize("k", [1, 2, 4, 9, 12])
def test_eigenvalues_that_are_there_several_times(k):
    """Squared error of a linear map: each eigenvalue of the inputs' second moments once for each of its outputs."""
    torch.manual_seed(1)
    inputs, targets = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    model = nn.Linear(4, 3, bias=False).double()

    def loss_sum(model, batch):
        return (model(inputs) - targets).square().sum(), len(inputs)

    found = hessian_eigenvalues(Objective(model, [0], loss_sum), k)
    moments = torch.linalg.eigvalsh(2.0 * inputs.T @ inputs / len(inputs))
    expected = moments.repeat_interleave(3).flip(0)[:k]
    assert found.values.tolist() == pytest.approx(expected.tolist(), rel=1e-9) and found.known.all()


def test_all_eigenvalues_of_a_sphere():
    weights = nn.Module()
    weights.w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    objective = Objective(weights, [0], lambda model, batch: (model.w.square().sum(), 1.0))
    assert hessian_eigenvalues(objective, 3).values.tolist() == pytest.approx([2.0, 2.0, 2.0])
