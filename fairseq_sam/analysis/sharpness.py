"""Sharpness: how much the loss rises when the weights move a given distance."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sam.analysis.corruption import STEPS, Progress, ball, corrupted, unseen
from fairseq_sam.analysis.objective import LossSum, Objective
from fairseq_sam.core.method import PRESETS, Method
from fairseq_sam.core.norms import scale_, vector_norm

DIRECTIONS = 10


@dataclass(frozen=True)
class Sharpness:
    """Loss before and after a move of the weights.

    Attributes:
        loss: loss per unit of weight at the model's weights.
        perturbed_loss: loss at the perturbed weights.
        error: standard error of `perturbed_loss`, where it is the mean over random directions; else 0.
    """

    loss: float
    perturbed_loss: float
    error: float = 0.0

    @property
    def sharpness(self) -> float:
        """``perturbed_loss - loss``."""
        return self.perturbed_loss - self.loss


def ascent_sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    loss_sum: LossSum,
    *,
    epsilon: float,
    norm: str | float = "l2",
    method: Method = PRESETS["sam"],
) -> Sharpness:
    """Measure ascent-direction sharpness ``L(w + epsilon x) - L(w)``, x the steepest direction at w.

    The gradient is that of the whole set of batches. The model is put into evaluation mode and back, its weights are
    restored bit for bit.

    Args:
        model: the model.
        batches: the data; iterated twice.
        loss_sum: from model and batch to the batch's summed loss (a scalar with gradient) and its weight, such as its
            number of tokens.
        epsilon: distance, in the norm; > 0.
        norm: ``l2``, ``linf`` or a number in (1, inf].
        method: gives scale T and granularity, which stretch the ball; default SAM's, ``T = 1``.

    Returns:
        The loss per unit of weight at both points.

    Raises:
        ValueError: if `epsilon` or `norm` is out of range, or there is no data.

    References:
        sharpness-aware loss L^Asc of Wen, Ma and Li 2023.
    """
    objective = Objective(model, batches, loss_sum)
    with corrupted(objective, ball(epsilon, norm, 1, method)) as found:
        return Sharpness(found.losses[0], objective.loss())


def worst_sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    loss_sum: LossSum,
    *,
    epsilon: float,
    norm: str | float = "l2",
    steps: int = STEPS,
    method: Method = PRESETS["sam"],
    progress: Progress = unseen,
) -> Sharpness:
    """Estimate worst-direction sharpness, the maximum of ``L(w + a) - L(w)`` over the ball, by projected ascent.

    What the ascent finds is a lower bound of the maximum.

    Args:
        model: the model.
        batches: the data; iterated `steps` + 1 times.
        loss_sum: see ``ascent_sharpness``.
        epsilon: radius of the ball, > 0.
        norm: of the ball, see ``ascent_sharpness``.
        steps: number of ascent steps, >= 1.
        method: gives scale T and granularity.
        progress: called after each pass over the data.

    Returns:
        The loss at w, and the largest loss that the ascent has met.

    Raises:
        ValueError: if a value is out of range, or there is no data.

    References:
        L^Max of Wen, Ma and Li 2023.
    """
    objective, done = Objective(model, batches, loss_sum), iter(range(1, steps + 2))
    with corrupted(
        objective, ball(epsilon, norm, steps, method), step_done=lambda: progress(next(done), steps + 1)
    ) as found:
        last = objective.loss()
    progress(steps + 1, steps + 1)
    return Sharpness(found.losses[0], found.largest(last))


def average_sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    loss_sum: LossSum,
    *,
    epsilon: float,
    directions: int = DIRECTIONS,
    seed: int = 1,
    progress: Progress = unseen,
) -> Sharpness:
    """Measure average-direction sharpness ``E L(w + epsilon g / |g|) - L(w)``, g Gaussian.

    Args:
        model: the model.
        batches: the data; iterated `directions` + 1 times.
        loss_sum: see ``ascent_sharpness``.
        epsilon: distance in 2-norm, > 0.
        directions: number of random directions, >= 1.
        seed: of the first direction; the n-th one after it has seed + n.
        progress: called after each pass over the data.

    Returns:
        The loss at w, the mean over directions and its standard error (NaN for one direction, or an infinite loss).

    Raises:
        ValueError: if a value is out of range, or there is no data.

    References:
        L^Avg of Wen, Ma and Li 2023.
    """
    ball(epsilon)
    if directions < 1:
        raise ValueError(f"directions must be an integer >= 1, got {directions!r}")
    objective = Objective(model, batches, loss_sum)
    clean, losses = objective.loss(), []
    progress(1, directions + 1)
    with objective.moving() as move:
        for number in range(directions):
            direction = gaussian(objective, seed + number)
            scale_(direction, epsilon / vector_norm(direction, 2.0))
            move(direction)
            losses.append(objective.loss())
            progress(number + 2, directions + 1)
    is_known = directions > 1 and all(map(math.isfinite, losses))
    error = statistics.stdev(losses) / math.sqrt(directions) if is_known else math.nan
    return Sharpness(clean, statistics.fmean(losses), error)


def adversarial_risk(
    model: nn.Module,
    instances: Iterable[Any],
    loss_sum: LossSum,
    *,
    epsilon: float,
    norm: str | float = "l2",
    steps: int = 1,
    method: Method = PRESETS["sam"],
    progress: Progress = unseen,
) -> Sharpness:
    """Measure the per-instance adversarial risk: each instance's loss at the worst weights for it (delta-SAM eq. 2).

    Args:
        model: the model.
        instances: batches of one instance each.
        loss_sum: see ``ascent_sharpness``.
        epsilon: radius of each instance's ball, > 0 (delta-SAM Table 4: 0.05).
        norm: of the ball.
        steps: ascent steps for each instance, >= 1.
        method: gives scale T and granularity.
        progress: called after each instance.

    Returns:
        The mean loss at w, and the adversarial risk as `perturbed_loss`; both per unit of weight.

    Raises:
        ValueError: if a value is out of range, or there is no data.
    """
    own, all_instances = ball(epsilon, norm, steps, method), list(instances)
    clean = worst = weight = 0.0
    for number, instance in enumerate(all_instances, 1):
        objective = Objective(model, [instance], loss_sum)
        with corrupted(objective, own) as found:
            last = objective.loss()
        clean += found.losses[0] * objective.weight
        worst += found.largest(last) * objective.weight
        weight += objective.weight
        progress(number, len(all_instances))
    if not weight > 0:
        raise ValueError("expected at least one instance with a positive weight, got none")
    return Sharpness(clean / weight, worst / weight)


def gaussian(objective: Objective, seed: int) -> list[Tensor]:
    """Draw standard Gaussian numbers in the shapes of the weights, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator).to(parameter.device)
        for parameter in objective.parameters
    ]
