"""Half precision: what rounding leaves of a perturbation, and rounding at random."""

import pytest
import torch
from torch import nn

from fairseq_sam.core.batch import ClosureBatch
from fairseq_sam.core.method import Method
from fairseq_sam.core.rounding import round_stochastically
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.step import SharpnessAwareStep

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
def test_rounds_to_a_neighbour_and_the_value_on_average(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator) * torch.tensor([1e-3, 0.1, 1.0, 30.0, 900.0]).repeat(10)
    draws = torch.stack([round_stochastically(values, dtype, generator) for _ in range(20_000)])
    assert torch.equal(draws.to(dtype).float(), draws)  # exact in half precision
    spacing = values.abs() * 2 * torch.finfo(dtype).eps
    assert ((draws - values).abs() <= spacing).all()
    assert all(len(column.unique()) <= 2 for column in draws.T)
    # the standard error of a mean of 20 000 draws that differ by one spacing is at most 0.5 / sqrt(20 000) of it
    assert ((draws.double().mean(0) - values).abs() <= 5 * 0.5 / 20_000**0.5 * spacing).all()


@pytest.mark.parametrize("dtype", HALF)
def test_keeps_what_is_exact(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.finfo(dtype).max])
    for seed in range(20):
        rounded = round_stochastically(values, dtype, torch.Generator().manual_seed(seed))
        assert torch.equal(rounded, values)
    assert torch.isnan(round_stochastically(torch.tensor([torch.nan]), dtype, torch.Generator())).all()


def survived(dtype, epsilon, with_masters, **options):
    """Measure on 20 000 weights near 0.1."""
    generator = torch.Generator().manual_seed(1)
    module = nn.Linear(200, 100, bias=False)
    master = 0.1 + 0.02 * torch.rand(module.weight.shape, generator=generator)
    module.weight.data = master.to(dtype)
    space = ParameterSpace.of({"": module})
    if with_masters:
        space = space.with_masters([master])
    step = SharpnessAwareStep(Method.from_preset("sam", epsilon=epsilon, norm="linf", **options), space)
    direction = torch.randn(module.weight.shape, generator=generator)
    seen = []

    def closure():
        seen.append(module.weight.detach().clone())
        module.weight.grad = direction.to(dtype)
        return torch.zeros(())

    batch = ClosureBatch(closure, 1.0)
    step.ascend(batch, lambda gradients, result: (gradients, 1.0))
    step.descend(batch)
    assert torch.equal(module.weight.detach(), seen[0])
    change = (seen[1].double() - seen[0].double()).flatten()
    wanted = (epsilon * torch.sign(direction.to(dtype).double())).flatten()
    by_hand = float((change @ wanted) / (wanted @ wanted))
    # In float32 it is what is added: next to weights of size 1 the change of 1e-5 is rounded to parts of 1e-3.
    rel = 1e-3 if dtype == torch.float32 else 1e-6
    assert step.measured.perturbation_norm == pytest.approx(float(change.abs().max()), rel=rel)
    if dtype == torch.float32:
        assert step.measured.perturbation_norm == pytest.approx(epsilon, rel=1e-6)
    measured = None if step.measured.survived is None else float(step.measured.survived)
    return measured, by_hand


@pytest.mark.parametrize("dtype", HALF)
def test_a_small_perturbation_of_rounded_weights_is_lost(dtype):
    """fp16 numbers near 0.1 are 6.1e-5 apart, bf16 4.9e-4: less than half of it rounds away."""
    measured, by_hand = survived(dtype, 1e-5, with_masters=False)
    assert measured == pytest.approx(by_hand, abs=1e-6) and measured < 0.01


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", [{"with_masters": True}, {"with_masters": False, "rounding": "stochastic"}])
def test_masters_and_rounding_at_random_keep_it(dtype, options):
    measured, by_hand = survived(dtype, 1e-5, **options)
    assert by_hand == pytest.approx(1.0, abs=0.2)
    assert measured == pytest.approx(min(by_hand, 1.0), abs=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_a_large_one_survives(dtype):
    assert survived(dtype, 0.05, with_masters=False)[0] > 0.95


def test_float32_measures_nothing_and_does_not_round():
    measured, by_hand = survived(torch.float32, 1e-5, with_masters=False, rounding="stochastic")
    assert measured is None and by_hand == pytest.approx(1.0, rel=1e-2)


def test_rounding_at_random_follows_from_the_seed():
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(survived(torch.bfloat16, 1e-5, with_masters=False, rounding="stochastic")[1])
    assert results[0] == results[1] != results[2]
