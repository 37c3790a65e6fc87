"""The analytic trials of GA-SAM (2.4, C.1): a shift of the data is a shift of the weights near a minimum.

The weights go from a minimum theta of the training loss to a minimum theta* of the loss on other data, found from
theta; ``delta = theta* - theta``. Theorem 1 says that the test loss is the training loss, shifted by delta and a
constant, and Proposition 2 that ``|delta|`` is proportional to the share eta of other data.
"""

import gzip
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fairseq_sam.analysis.corruption import Progress, unseen
from fairseq_sam.analysis.objective import Objective

Data = tuple[Tensor, Tensor]  # inputs (N, features), classes (N,)
SIZES = (784, 100, 100, 10)  # GA-SAM C.1
L2 = 1e-3


@dataclass(frozen=True)
class LinePoint:
    """Losses at ``alpha theta + (1 - alpha) theta*``.

    Attributes:
        alpha: the place; 1 is theta, 0 is theta*.
        train: training loss.
        test: loss on the other data.
        shifted: training loss at the weights minus delta, plus the constant that makes it equal to `test` at theta*.
    """

    alpha: float
    train: float
    test: float
    shifted: float


@dataclass(frozen=True)
class Shift:
    """The shift of the minimum for mixed data.

    Attributes:
        eta: share of other data in the mixture.
        distance: 2-norm of the shift of the weights.
    """

    eta: float
    distance: float


def perceptron(sizes: Sequence[int] = SIZES, seed: int = 1) -> nn.Sequential:
    """Return a perceptron with ReLU between its layers.

    Args:
        sizes: of inputs, hidden layers and classes.
        seed: of its weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def objective(model: nn.Module, data: Data, l2: float = L2) -> Objective:
    """Return mean cross entropy plus ``l2 / 2`` times the squared norm of all weights, which gives it a minimum.

    Args:
        model: the model.
        data: inputs and classes.
        l2: weight of the penalty, >= 0 (ours: without one the loss of separable data has no minimum).
    """

    def loss_sum(model: nn.Module, batch: Data) -> tuple[Tensor, float]:
        inputs, classes = batch
        penalty = sum((parameter.square().sum() for parameter in model.parameters()), torch.zeros(()))
        return cross_entropy(model(inputs), classes, reduction="sum") + len(classes) * l2 / 2 * penalty, len(classes)

    return Objective(model, [data], loss_sum)


def minimise(found: Objective, *, iterations: int = 200, tolerance: float = 1e-6) -> float:
    """Move the weights to a minimum near them by L-BFGS on the whole data.

    Args:
        found: what is minimised; the model's weights are changed.
        iterations: at most, >= 1.
        tolerance: largest number of the gradient at which it ends.

    Returns:
        The 2-norm of the gradient at the end.
    """
    optimizer = torch.optim.LBFGS(
        found.parameters, max_iter=iterations, history_size=20, tolerance_grad=tolerance, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        loss, gradients = found.loss_and_gradient()
        for parameter, gradient in zip(found.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in found.loss_and_gradient()[1]))


def mixed(first: Data, second: Data, eta: float) -> Data:
    """Return the data with a share `eta` of it replaced by other data.

    Args:
        first: the data.
        second: as many other data.
        eta: from 0 to 1; the first instances of both are exchanged, so that the mixtures of growing `eta` are nested.

    Raises:
        ValueError: if `eta` is out of range or the sizes differ.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}")
    if len(first[1]) != len(second[1]):
        raise ValueError(f"expected as many data in both parts, got {len(first[1])} and {len(second[1])}")
    number = round(eta * len(first[1]))
    inputs, classes = (torch.cat([b[:number], a[number:]]) for a, b in zip(first, second, strict=True))
    return inputs, classes


def line(model: nn.Module, train: Data, test: Data, alphas: Sequence[float], *, l2: float = L2) -> list[LinePoint]:
    """Measure the losses on the line through both minima (GA-SAM Fig. 1).

    Args:
        model: at the minimum theta of the training loss; it is there again afterwards.
        train: training data.
        test: other data.
        alphas: places; 1 is theta, 0 is theta*.
        l2: see ``objective``.
    """
    here = objective(model, train, l2)
    delta = shift(model, test, l2)
    losses = {name: objective(model, data, l2) for name, data in (("train", train), ("test", test))}

    def at(name: str, share: float) -> float:
        """Loss at ``theta + share * delta``."""
        with here.moving() as move:
            move([share * part for part in delta])
            return losses[name].loss()

    constant = at("test", 1.0) - at("train", 0.0)
    return [
        LinePoint(alpha, at("train", 1 - alpha), at("test", 1 - alpha), at("train", -alpha) + constant)
        for alpha in alphas
    ]


def shift(model: nn.Module, data: Data, l2: float = L2, iterations: int = 200) -> list[Tensor]:
    """Return delta, the way from the weights to the minimum on other data; the weights are put back.

    Args:
        model: at the minimum of the training loss.
        data: the other data.
        l2: see ``objective``.
        iterations: see ``minimise``.
    """
    found = objective(model, data, l2)
    origin = [parameter.detach().clone() for parameter in found.parameters]
    with found.moving():
        minimise(found, iterations=iterations)
        return [parameter.detach() - start for parameter, start in zip(found.parameters, origin, strict=True)]


def shifts(
    model: nn.Module,
    train: Data,
    test: Data,
    etas: Sequence[float],
    *,
    l2: float = L2,
    iterations: int = 200,
    found: Callable[[Shift], None] = lambda shift: None,
    progress: Progress = unseen,
) -> list[Shift]:
    """Measure the shift of the minimum for mixtures of training and other data (GA-SAM Fig. 2).

    Args:
        model: at the minimum of the training loss; it is there again afterwards.
        train: training data.
        test: as many other data.
        etas: shares of other data.
        l2: see ``objective``.
        iterations: see ``minimise``.
        found: called with each result.
        progress: called after each trial.
    """
    results = []
    for number, eta in enumerate(etas, 1):
        delta = shift(model, mixed(train, test, eta), l2, iterations)
        results.append(Shift(eta, math.sqrt(sum(float(part.square().sum()) for part in delta))))
        found(results[-1])
        progress(number, len(etas))
    return results


def correlation(results: Sequence[Shift]) -> float:
    """Return Pearson's correlation of eta and distance; NaN for fewer than two results or without a spread."""
    if len(results) < 2:
        return math.nan
    pairs = torch.tensor([[shift.eta, shift.distance] for shift in results], dtype=torch.float64).T
    return float(torch.corrcoef(pairs)[0, 1])


def read_mnist(folder: Path, split: str, number: int, dtype: torch.dtype = torch.float32) -> Data:
    """Read the first images and labels of MNIST, in its own format, packed or not.

    Args:
        folder: with ``train-images-idx3-ubyte`` and its like, ``.gz`` behind the names or not.
        split: ``train`` or ``t10k``.
        number: how many.
        dtype: of the inputs.

    Returns:
        Inputs from 0 to 1, ``(number, 784)``, and classes.

    Raises:
        ValueError: if a file is not what it should be, or holds fewer.
        OSError: if a file is not there.
    """
    images = _read_idx(folder, f"{split}-images-idx3-ubyte", number)
    labels = _read_idx(folder, f"{split}-labels-idx1-ubyte", number)
    return images.reshape(number, -1).to(dtype) / 255, labels.long()


def _read_idx(folder: Path, name: str, number: int) -> Tensor:
    packed = folder / f"{name}.gz"
    path = packed if packed.exists() else folder / name
    with gzip.open(path, "rb") if path == packed else path.open("rb") as file:
        zeros, kind, num_axes = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or kind != 8 or num_axes not in (1, 3):
            raise ValueError(f"expected a file of MNIST's format (idx, unsigned bytes), got {path}")
        shape = struct.unpack(f">{num_axes}I", file.read(4 * num_axes))
        if shape[0] < number:
            raise ValueError(f"expected at least {number} instances in {path}, got {shape[0]}")
        size = number * math.prod(shape[1:])
        values = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)
    return values.reshape(number, *shape[1:])
