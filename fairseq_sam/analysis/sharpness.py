"""Sharpness: how much the loss rises when the weights move a given distance."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sam.core.method import parse_norm
from fairseq_sam.core.norms import scale_, steepest_direction_


@dataclass(frozen=True)
class Sharpness:
    """Loss before and after the move.

    Attributes:
        loss: loss per unit of weight at the model's weights.
        perturbed_loss: loss at the perturbed weights.
    """

    loss: float
    perturbed_loss: float

    @property
    def sharpness(self) -> float:
        """``perturbed_loss - loss``."""
        return self.perturbed_loss - self.loss


def ascent_sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    loss_sum: Callable[[nn.Module, Any], tuple[Tensor, float]],
    *,
    epsilon: float,
    norm: str | float = "l2",
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

    Returns:
        The loss per unit of weight at both points.

    Raises:
        ValueError: if `epsilon` or `norm` is out of range, or there is no data.

    References:
        sharpness-aware loss L^Asc of Wen, Ma and Li 2023.
    """
    order = parse_norm(norm)
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be a finite number > 0, got {epsilon!r}")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()
    backup = [parameter.detach().clone() for parameter in parameters]
    try:
        loss, gradients = _loss_and_gradient(model, batches, loss_sum, parameters)
        with torch.no_grad():
            direction = steepest_direction_(gradients, order)
            scale_(direction, epsilon)
            torch._foreach_add_([parameter.data for parameter in parameters], direction)
        perturbed = _mean_loss(model, batches, loss_sum)
    finally:
        for parameter, original in zip(parameters, backup, strict=True):
            parameter.data.copy_(original)
        model.train(was_training)
    return Sharpness(loss, perturbed)


def _loss_and_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    loss_sum: Callable[[nn.Module, Any], tuple[Tensor, float]],
    parameters: list[nn.Parameter],
) -> tuple[float, list[Tensor]]:
    total, weight = 0.0, 0.0
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        loss, size = loss_sum(model, batch)
        for total_gradient, g in zip(gradients, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if g is not None:
                total_gradient += g
        total, weight = total + float(loss.detach()), weight + size
    return _divide(total, weight), gradients


@torch.no_grad()
def _mean_loss(
    model: nn.Module, batches: Iterable[Any], loss_sum: Callable[[nn.Module, Any], tuple[Tensor, float]]
) -> float:
    total, weight = 0.0, 0.0
    for batch in batches:
        loss, size = loss_sum(model, batch)
        total, weight = total + float(loss.detach()), weight + size
    return _divide(total, weight)


def _divide(total: float, weight: float) -> float:
    if not weight > 0:
        raise ValueError("expected batches with a positive total weight, got none")
    return total / weight
