"""The analytic trials of GA-SAM (2.4, C.1): a shift of the data is a shift of the weights near a minimum.

The weights go from a minimum theta of the training loss to a minimum theta* of the loss on other data, found from
theta; ``delta = theta* - theta``. Theorem 1 says that the test loss is the training loss, shifted by delta and a
constant, and Proposition 2 that ``|delta|`` is proportional to the share eta of other data.

Everything is in float64: a shift of the minimum by a hundredth of the data is small.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fairseq_sam.analysis.corruption import Progress, unseen
from fairseq_sam.analysis.objective import Objective

Data = tuple[Tensor, Tensor]  # inputs (N, features), classes (N,)
Part = tuple[float, Data]  # share of a mixture, and what it is a share of
HIDDEN = (100, 100)  # GA-SAM C.1: sizes 784, 100, 100, 10
CLASSES = 10
L2 = 0.1  # ours, see ``penalised``
ITERATIONS = 200  # ours: enough for a gradient of 1e-5
TOLERANCE = 1e-7  # ours
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "softplus": nn.Softplus, "relu": nn.ReLU}


@dataclass(frozen=True)
class LinePoint:
    """Losses at ``alpha theta + (1 - alpha) theta*``.

    Attributes:
        alpha: the place; 1 is theta, 0 is theta*.
        train: training loss.
        test: loss on the other data.
        shifted: training loss at the weights minus delta, plus ``constant``.
        constant: ``L(theta*; D*) - L(theta; D)``, which makes `shifted` equal to `test` at theta*.
    """

    alpha: float
    train: float
    test: float
    shifted: float
    constant: float


@dataclass(frozen=True)
class Shift:
    """The shift of the minimum for mixed data.

    Attributes:
        eta: share of other data in the mixture.
        distance: 2-norm of the shift of the weights.
        gradient: 2-norm of the gradient that the minimisation has reached.
    """

    eta: float
    distance: float
    gradient: float


def perceptron(features: int, hidden: Sequence[int] = HIDDEN, activation: str = "tanh", seed: int = 1) -> nn.Sequential:
    """Return a perceptron in float64.

    Args:
        features: size of the inputs.
        hidden: sizes of the hidden layers, GA-SAM's by default.
        activation: one of ``ACTIVATIONS``. The paper names none; with ``relu`` the loss has kinks, at which it has no
            Hessian, and the theorems do not speak of it.
        seed: of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((features, *hidden, CLASSES)):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).double()


def penalised(model: nn.Module, l2: float = L2) -> Callable[[Sequence[Part]], Objective]:
    """Return a function from data to ``L(w) = sum_i share_i CE(w; part_i) + l2 / 2 |w - w0|^2``, w0 the weights now.

    Differs from the paper, which names no penalty: without one the loss of separable data has no minimum, and the
    theorems want a strongly convex one. With the usual penalty on ``|w|^2`` (0.001 to 0.01, 2000 images) L-BFGS took
    more than 2000 iterations to a gradient of 1e-5; with this one and 0.05 (1000 images) some trials jumped to other
    minima; with 0.1 no such jump was seen.

    Args:
        model: the model, with its first weights.
        l2: weight of the penalty, >= 0.
    """
    first = [parameter.detach().clone() for parameter in model.parameters()]

    def loss_sum(model: nn.Module, part: Part) -> tuple[Tensor, float]:
        share, (inputs, classes) = part
        pairs = zip(model.parameters(), first, strict=True)
        penalty = sum(((parameter - start).square().sum() for parameter, start in pairs), torch.zeros(()))
        return share * (cross_entropy(model(inputs), classes) + l2 / 2 * penalty), share

    return lambda parts: Objective(model, parts, loss_sum)


def minimise(found: Objective, *, iterations: int = ITERATIONS, tolerance: float = TOLERANCE) -> float:
    """Move the weights to a minimum near them by L-BFGS on the whole data.

    Args:
        found: what is minimised; the model's weights are changed.
        iterations: at most, >= 1.
        tolerance: largest number of the gradient at which it ends.

    Returns:
        The 2-norm of the gradient at the end.

    Raises:
        ValueError: if it is not finite.
    """
    optimizer = torch.optim.LBFGS(
        found.parameters, max_iter=iterations, max_eval=2 * iterations, history_size=30, tolerance_grad=tolerance,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        loss, gradients = found.loss_and_gradient()
        for parameter, gradient in zip(found.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    norm = length(found.loss_and_gradient()[1])
    if not math.isfinite(norm):
        raise ValueError(f"the minimisation ended where the gradient's norm is {norm}; use another penalty (l2)")
    return norm


def shift(
    found: Objective, *, iterations: int = ITERATIONS, tolerance: float = TOLERANCE
) -> tuple[list[Tensor], float]:
    """Return delta, the way from the weights to a minimum near them, and the gradient's norm there.

    Args:
        found: the loss on other data; the weights, at a minimum of the training loss, are put back bit for bit.
        iterations: see ``minimise``.
        tolerance: see ``minimise``.
    """
    origin = [parameter.detach().clone() for parameter in found.parameters]
    with found.moving():
        norm = minimise(found, iterations=iterations, tolerance=tolerance)
        pairs = zip(found.parameters, origin, strict=True)
        return [parameter.detach() - start for parameter, start in pairs], norm


def line(
    train: Objective, test: Objective, alphas: Sequence[float], *, iterations: int = ITERATIONS
) -> list[LinePoint]:
    """Measure the losses on the line through both minima (GA-SAM Fig. 1).

    Args:
        train: training loss of a model that is at its minimum theta, and is there again afterwards.
        test: loss of the same model on other data.
        alphas: places; 1 is theta, 0 is theta*.
        iterations: see ``minimise``.
    """
    delta, _ = shift(test, iterations=iterations)

    def at(loss: Objective, share: float) -> float:
        """Loss at ``theta + share * delta``."""
        with loss.moving() as move:
            move([share * part for part in delta])
            return loss.loss()

    constant = at(test, 1.0) - at(train, 0.0)
    return [
        LinePoint(alpha, at(train, 1 - alpha), at(test, 1 - alpha), at(train, -alpha) + constant, constant)
        for alpha in alphas
    ]


def misfits(points: Sequence[LinePoint]) -> tuple[float, float]:
    """Return how far the training loss is from the test loss on the line, shifted by delta and not shifted.

    Each is the root of ``sum (train - test)^2 / sum (test - test at theta*)^2`` with the constant added, so that 0 is
    a perfect fit and 1 what a constant would do. NaN if the test loss does not rise.

    Args:
        points: of ``line``, one of them with alpha 0.

    Raises:
        ValueError: if none has.
    """
    lowest = [point.test for point in points if abs(point.alpha) < 1e-9]
    if not lowest:
        raise ValueError("expected a point with alpha 0, the minimum of the test loss")
    rise = sum((point.test - lowest[0]) ** 2 for point in points)
    if not rise > 0:
        return math.nan, math.nan
    shifted = sum((point.shifted - point.test) ** 2 for point in points)
    unshifted = sum((point.train + point.constant - point.test) ** 2 for point in points)
    return math.sqrt(shifted / rise), math.sqrt(unshifted / rise)


def by_samples(first: Data, second: Data, eta: float) -> list[Part]:
    """Mix as GA-SAM 2.4 does: a share `eta` of the first data is replaced by as many of the second.

    The first instances of both are exchanged, so that the mixtures of growing `eta` are nested (ours: the paper does
    not say which instances a trial takes).

    Args:
        first: the data, in random order.
        second: as many other data, in random order.
        eta: from 0 to 1.

    Raises:
        ValueError: if `eta` is out of range or the sizes differ.
    """
    _check_share(eta)
    if len(first[1]) != len(second[1]):
        raise ValueError(f"expected as many data in both parts, got {len(first[1])} and {len(second[1])}")
    number = round(eta * len(first[1]))
    inputs, classes = (torch.cat([b[:number], a[number:]]) for a, b in zip(first, second, strict=True))
    return [(1.0, (inputs, classes))]


def by_weights(first: Data, second: Data, eta: float) -> list[Part]:
    """Mix as Proposition 2 does, exactly: ``p_mix = (1 - eta) p + eta p*``; each loss has its weight.

    Args:
        first: the data.
        second: other data.
        eta: from 0 to 1.

    Raises:
        ValueError: if `eta` is out of range.
    """
    _check_share(eta)
    return [(share, data) for share, data in ((1 - eta, first), (eta, second)) if share > 0]


MIXTURES = {"samples": by_samples, "weights": by_weights}


def shifts(
    mixture: Callable[[float], Objective],
    etas: Sequence[float],
    *,
    iterations: int = ITERATIONS,
    found: Callable[[Shift], None] = lambda shift: None,
    progress: Progress = unseen,
) -> list[Shift]:
    """Measure the shift of the minimum for mixtures of training and other data (GA-SAM Fig. 2).

    With ``eta = 0`` the minimum stays where it is. The minimisation goes on there without a tolerance, so that the
    distance is what was left undone in the search for theta.

    Args:
        mixture: from eta to the loss on the mixture, of a model that is at the minimum of the training loss and is
            there again afterwards.
        etas: shares of other data.
        iterations: see ``minimise``.
        found: called with each result.
        progress: called after each trial.
    """
    results = []
    for number, eta in enumerate(etas, 1):
        delta, norm = shift(mixture(eta), iterations=iterations, tolerance=TOLERANCE if eta > 0 else 0.0)
        results.append(Shift(eta, length(delta), norm))
        found(results[-1])
        progress(number, len(etas))
    return results


def correlation(results: Sequence[Shift]) -> float:
    """Return Pearson's correlation of eta and distance; NaN for fewer than two results or without a spread."""
    if len(results) < 2:
        return math.nan
    return float(torch.corrcoef(_pairs(results))[0, 1])


def exponent(results: Sequence[Shift]) -> float:
    """Return p of the power law ``distance = c eta^p``, by least squares of the logarithms; 1 is proportional.

    NaN if fewer than two results have an eta and a distance above 0, or all have the same eta.
    """
    positive = [result for result in results if result.eta > 0 and result.distance > 0]
    if len(positive) < 2:
        return math.nan
    covariance = torch.cov(_pairs(positive).log())
    return float(covariance[0, 1] / covariance[0, 0])


def length(parts: Sequence[Tensor]) -> float:
    """Return the 2-norm of all parts together."""
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def _pairs(results: Sequence[Shift]) -> Tensor:
    return torch.tensor([[result.eta, result.distance] for result in results], dtype=torch.float64).T


def _check_share(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}")
