"""Analytic trials against closed forms: quadratics, means, softmax regression by Newton's method."""

import gzip
import math

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_sam.analysis.mnist import read_mnist
from fairseq_sam.analysis.objective import Objective
from fairseq_sam.analysis.theory import (
    LinePoint,
    Shift,
    by_samples,
    by_weights,
    correlation,
    exponent,
    length,
    line,
    minimise,
    misfits,
    penalised,
    perceptron,
    shift,
    shifts,
)
from tests.analysis.mnist_files import SIZES, idx, write_mnist

SIZE = 5
ALPHAS = [-1.0, -0.5, 0.0, 0.25, 1.0, 2.0]


class Weights(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())


def random_vector(seed):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_hessian(seed):
    root = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / SIZE + torch.eye(SIZE, dtype=torch.float64)


def quadratic(model, *parts):
    """Sum of ``share ((w - c)' A (w - c) / 2 + k)``."""

    def loss_sum(model, part):
        share, A, c, k = part
        return share * (0.5 * (model.w - c) @ A @ (model.w - c) + k), share

    return Objective(model, parts, loss_sum)


# -- minima of quadratics ---------------------------------------------------------------------------------------------


def test_minimum_and_shift_of_a_quadratic():
    first, second = random_vector(1), random_vector(2)
    model = Weights(first)
    delta, norm = shift(quadratic(model, (1.0, random_hessian(0), second, 3.0)))
    assert torch.allclose(delta[0], second - first, atol=1e-7, rtol=0) and norm < 1e-6
    assert torch.equal(model.w, first), "the weights are put back"
    assert minimise(quadratic(model, (1.0, random_hessian(0), second, 3.0))) < 1e-6
    assert torch.allclose(model.w, second, atol=1e-7, rtol=0) and model.w.grad is None


def test_shifted_training_loss_is_the_test_loss_if_the_hessians_are_equal():
    """Theorem 1 without its o(1)."""
    A, theta, other = random_hessian(0), random_vector(1), random_vector(2)
    model = Weights(theta)
    points = line(quadratic(model, (1.0, A, theta, 0.5)), quadratic(model, (1.0, A, other, 2.0)), ALPHAS)
    rise = float(0.5 * (other - theta) @ A @ (other - theta))
    for point, alpha in zip(points, ALPHAS, strict=True):
        assert point.alpha == alpha and point.constant == pytest.approx(1.5, abs=1e-9)
        assert point.train == pytest.approx(0.5 + (1 - alpha) ** 2 * rise, rel=1e-6)
        assert point.test == pytest.approx(2.0 + alpha**2 * rise, rel=1e-6)
        assert point.shifted == pytest.approx(point.test, rel=1e-6)
    assert misfits(points)[0] < 1e-6 and torch.equal(model.w, theta)


def test_misfit_of_two_quadratics():
    """Off by the quotient of both curvatures along delta; not shifted, by the two parabolas."""
    A, B, theta, other = random_hessian(0), random_hessian(3), random_vector(1), random_vector(2)
    model = Weights(theta)
    points = line(quadratic(model, (1.0, A, theta, 0.0)), quadratic(model, (1.0, B, other, 1.0)), ALPHAS)
    delta = other - theta
    a, b = float(0.5 * delta @ A @ delta), float(0.5 * delta @ B @ delta)
    shifted, unshifted = misfits(points)
    assert shifted == pytest.approx(abs(a / b - 1), rel=1e-5) and shifted > 0.01
    alphas = np.array(ALPHAS)
    expected = np.sqrt((((1 - alphas) ** 2 * a - alphas**2 * b) ** 2).sum() / ((alphas**2 * b) ** 2).sum())
    assert unshifted == pytest.approx(float(expected), rel=1e-5)


def test_misfit_without_a_rise_or_a_minimum():
    assert all(map(math.isnan, misfits([LinePoint(0.0, 1.0, 2.0, 2.0, 1.0)])))
    with pytest.raises(ValueError, match="a point with alpha 0"):
        misfits([LinePoint(1.0, 1.0, 2.0, 2.0, 1.0)])


def test_shift_is_proportional_to_the_share_if_the_hessians_are_equal():
    """Proposition 2 without its o(1)."""
    A, theta, other = random_hessian(0), random_vector(1), random_vector(2)
    model, seen, progress = Weights(theta), [], []
    results = shifts(
        lambda eta: quadratic(model, (1 - eta, A, theta, 0.0), (eta, A, other, 1.0)),
        [0.0, 0.1, 0.5, 1.0], found=seen.append, progress=lambda *n: progress.append(n),
    )  # fmt: skip
    whole = float((other - theta).norm())
    assert [result.eta for result in results] == [0.0, 0.1, 0.5, 1.0] and seen == results
    assert [result.distance for result in results] == pytest.approx([0, 0.1 * whole, 0.5 * whole, whole], abs=1e-6)
    assert correlation(results) == pytest.approx(1, abs=1e-9) and exponent(results) == pytest.approx(1, abs=1e-5)
    assert progress == [(i, 4) for i in range(1, 5)] and torch.equal(model.w, theta)
    assert max(result.gradient for result in results) < 1e-6


def test_control_shows_an_incomplete_minimisation():
    """Weights within the tolerance of the trials, not at the minimum: eta = 0 moves them all the way."""
    theta, off = random_vector(1), 1e-8 * torch.ones(SIZE, dtype=torch.float64)
    model = Weights(theta + off)
    (control,) = shifts(lambda eta: quadratic(model, (1.0, torch.eye(SIZE, dtype=torch.float64), theta, 0.0)), [0.0])
    assert control.distance == pytest.approx(math.sqrt(SIZE) * 1e-8, rel=1e-5)


def test_a_loss_without_a_minimum():
    model = Weights(torch.full((SIZE,), math.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="gradient's norm is nan"):
        minimise(quadratic(model, (1.0, random_hessian(0), random_vector(1), 0.0)))


# -- mixtures ---------------------------------------------------------------------------------------------------------


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None], torch.tensor([int(value) for value in values])


def test_mixture_by_samples():
    first, second = numbers(0, 1, 2, 3), numbers(10, 11, 12, 13)
    for eta, expected in ((0.0, [0, 1, 2, 3]), (0.5, [10, 11, 2, 3]), (0.7, [10, 11, 12, 3]), (1.0, [10, 11, 12, 13])):
        ((share, (inputs, classes)),) = by_samples(first, second, eta)
        assert share == 1.0 and inputs[:, 0].tolist() == expected == classes.tolist()
    with pytest.raises(ValueError, match="as many data in both parts, got 4 and 1"):
        by_samples(first, numbers(1), 0.5)


def test_mixture_by_weights():
    first, second = numbers(0, 1), numbers(10, 11, 12)
    assert [share for share, _ in by_weights(first, second, 0.25)] == [0.75, 0.25]
    assert [part[1] for part in by_weights(first, second, 0.25)] == [first, second]
    assert by_weights(first, second, 0.0) == [(1.0, first)] and by_weights(first, second, 1.0) == [(1.0, second)]


@pytest.mark.parametrize("mix", [by_samples, by_weights])
@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_a_share_out_of_range(mix, eta):
    with pytest.raises(ValueError, match=r"eta must be a number in \[0, 1\], got"):
        mix(numbers(1), numbers(2), eta)


def test_shift_of_a_mean():
    """Sum of ``|w - x|^2 / 2``: the minimum is the mean. By weights it moves in a line, by samples as a random walk."""
    generator = torch.Generator().manual_seed(0)
    first, second = ((torch.randn(400, 3, generator=generator).double(), torch.zeros(400)) for _ in range(2))
    model = Weights(first[0].mean(0))

    def loss_sum(model, part):
        share, (inputs, _) = part
        return share * 0.5 * (model.w - inputs).square().sum(1).mean(), share

    etas = [trial / 20 for trial in range(1, 21)]
    walks = (second[0] - first[0]).cumsum(0) / 400
    weighted, replaced = (
        shifts(lambda eta, mix=mix: Objective(model, mix(first, second, eta), loss_sum), etas)
        for mix in (by_weights, by_samples)
    )
    whole = float(walks[-1].norm())
    assert [result.distance for result in weighted] == pytest.approx([eta * whole for eta in etas], abs=1e-6)
    expected = [float(walks[round(400 * eta) - 1].norm()) for eta in etas]
    assert [result.distance for result in replaced] == pytest.approx(expected, abs=1e-6)


def test_correlation_and_exponent():
    etas = [0.1, 0.2, 0.4, 0.9]
    results = [Shift(eta, 3 * eta**0.5, 0.0) for eta in etas]
    assert exponent([Shift(0.0, 1e-9, 0.0), *results]) == pytest.approx(0.5, abs=1e-12)
    assert correlation(results) == pytest.approx(np.corrcoef(etas, np.sqrt(etas))[0, 1], abs=1e-12)
    for few in ([], results[:1], results[:1] * 2):
        assert math.isnan(correlation(few)) and math.isnan(exponent(few))


# -- perceptrons ------------------------------------------------------------------------------------------------------


def test_perceptron():
    state = torch.get_rng_state()
    model, again, other = perceptron(784), perceptron(784), perceptron(784, seed=2)
    assert torch.equal(torch.get_rng_state(), state), "random numbers of the caller are left alone"
    assert [p.shape[::-1] for p in model.parameters() if p.dim() == 2] == [(784, 100), (100, 100), (100, 10)]
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert torch.equal(model[0].weight, again[0].weight) and not torch.equal(model[0].weight, other[0].weight)
    kinds = {name: perceptron(4, (3,), name)[1] for name in ("tanh", "softplus", "relu")}
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(kinds["tanh"](x), x.tanh()) and torch.equal(kinds["relu"](x), x.relu())
    assert torch.allclose(kinds["softplus"](x), (1 + x.exp()).log())
    assert isinstance(model[-1], nn.Linear) and len(model) == 5


def softmax_data(seed, number=30):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (number,), generator=generator)


def softmax_loss(w, data, first, l2):
    """Softmax regression by hand: w is its matrix ``(10, 3)`` and its bias, flat."""
    logits = data[0] @ w[:30].reshape(10, 3).T + w[30:]
    likelihood = logits.logsumexp(1) - logits[torch.arange(len(data[1])), data[1]]
    return likelihood.mean() + l2 / 2 * (w - first).square().sum()


def newton(loss, w):
    """The minimum of a convex function, and its Hessian there."""
    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(loss, w)
        hessian = torch.autograd.functional.hessian(loss, w)
        w = w - torch.linalg.solve(hessian, gradient)
    return w, hessian


def test_shift_of_softmax_regression():
    """Minima by Newton's method; for small eta, ``delta = -eta H^-1 grad L(theta; D*)`` (Theorem 2)."""
    train, test, l2 = softmax_data(1), softmax_data(2), 0.05
    model = perceptron(3, (), seed=4)
    first = nn.utils.parameters_to_vector(model.parameters()).detach()
    loss_on = penalised(model, l2)
    assert minimise(loss_on([(1.0, train)])) < 1e-6
    theta, hessian = newton(lambda w: softmax_loss(w, train, first, l2), first)
    assert torch.allclose(nn.utils.parameters_to_vector(model.parameters()), theta, atol=1e-5)
    assert loss_on([(1.0, train)]).loss() == pytest.approx(float(softmax_loss(theta, train, first, l2)), rel=1e-9)
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, model.parameters())

    results = shifts(lambda eta: loss_on(by_weights(train, test, eta)), [0.0, 0.01, 0.5, 1.0])
    assert results[0].distance < 1e-6
    gradient = torch.autograd.functional.jacobian(lambda w: softmax_loss(w, test, first, l2), theta)
    slope = float(torch.linalg.solve(hessian, gradient).norm())
    assert results[1].distance == pytest.approx(0.01 * slope, rel=0.03)
    for result, eta in zip(results[2:], (0.5, 1.0), strict=True):

        def mixed(w, eta=eta):
            return (1 - eta) * softmax_loss(w, train, first, l2) + eta * softmax_loss(w, test, first, l2)

        assert result.distance == pytest.approx(float((newton(mixed, theta)[0] - theta).norm()), rel=1e-4)


def test_length():
    assert length([torch.tensor([[3.0]]), torch.tensor([0.0, 4.0])]) == 5


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_read_mnist(tmp_path, packed):
    made = write_mnist(tmp_path, packed=packed)
    for split, number in SIZES.items():
        pixels, classes = read_mnist(tmp_path, split)
        assert pixels.shape == (number, 16) and pixels.dtype == classes.dtype == torch.uint8
        assert np.array_equal(pixels.numpy(), made[split][0].reshape(number, 16))
        assert np.array_equal(classes.numpy(), made[split][1])


LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            f"{LABELS}.gz",
            gzip.compress(idx(np.zeros(24, np.uint8)), mtime=0)[:-9],
            "is cut off or no gzip file .* get it again",
        ),
        (f"{LABELS}.gz", b"no gzip at all", "is cut off or no gzip file"),
        (LABELS, idx(np.zeros(24, np.uint8))[:-1], r"expected 24 values \(24,\) in .*, got 23"),
        (LABELS, idx(np.zeros(24, np.uint8))[:6], "is cut off within its head"),
        (LABELS, b"", "a file of MNIST's format"),
        (LABELS, idx(np.zeros(24, np.uint8), kind=13), "a file of MNIST's format"),
        (LABELS, idx(np.zeros(23, np.uint8)), r"got \(24, 4, 4\) and \(23,\)"),
        (LABELS, idx(np.zeros((24, 1), np.uint8)), r"got \(24, 4, 4\) and \(24, 1\)"),
        (LABELS, idx(np.full(24, 10, np.uint8)), "labels from 0 to 9 of train .* got 10"),
        (LABELS, None, f"must hold {LABELS}.gz or {LABELS}; .* has neither"),
    ],
)
def test_broken_files(tmp_path, name, content, words):
    write_mnist(tmp_path)
    (tmp_path / f"{LABELS}.gz").unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_mnist(tmp_path, "train")
    with pytest.raises(ValueError, match=r"MNIST must be a folder with train-images.* is none"):
        read_mnist(tmp_path / "none", "train")
