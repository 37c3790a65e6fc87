"""The diagonal operator T: one positive number for each group of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Strengths(NamedTuple):
    """What a scale may depend on, for one tensor's groups. All but `total` broadcast against the tensor."""

    weight: Tensor  # ||w_i||_2
    gradient: Tensor  # ||g_i||_2, in the method's gradient unit
    number: Tensor | float  # n_i
    total: float  # n
    eta: float  # asam_eta


@dataclass(frozen=True)
class Scale:
    """One choice of T.

    Attributes:
        formula: T from the strengths of a group.
        gradient_based: T has the gradient's norm in its denominator, so it is capped.
        element_only: T is defined for single weights alone.
    """

    formula: Callable[[Strengths], Tensor]
    gradient_based: bool = False
    element_only: bool = False


def _divide(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """Divide; 0 where the denominator is 0, so that a group without a gradient does not move."""
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0, numerator / safe, torch.zeros_like(denominator))


def _root(x: Tensor | float) -> Tensor | float:
    return x**0.5


SCALES: dict[str, Scale] = {
    "one": Scale(lambda s: torch.ones_like(s.weight)),
    "weight_abs": Scale(lambda s: s.weight + s.eta, element_only=True),
    "weight_norm": Scale(lambda s: s.weight),
    "weight_over_gradient": Scale(lambda s: _divide(s.weight, s.gradient), gradient_based=True),
    "inverse_gradient": Scale(lambda s: _divide(1.0, s.gradient), gradient_based=True),
    "weight_over_sqrt_n": Scale(lambda s: s.weight / _root(s.number)),
    "gradient_strength": Scale(lambda s: _divide(_root(s.number), s.gradient * _root(s.total)), gradient_based=True),
}


def _tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of each tensor, in float64: a vector of length ``len(tensors)``."""
    norms = torch._foreach_norm(list(tensors), dtype=torch.float64)
    return torch.stack([norm.to(tensors[0].device) for norm in norms])


def _group_norms(tensors: Sequence[Tensor], granularity: str, layers: Sequence[int]) -> list[Tensor]:
    """2-norm of the group of each number, broadcastable to each tensor."""
    if granularity == "element":
        return [tensor.abs() for tensor in tensors]
    if granularity == "filter":
        return [
            torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True) if t.dim() > 1 else t.abs()
            for t in tensors
        ]
    norms = _tensor_norms(tensors)
    if granularity == "tensor":
        return list(norms.unbind())
    groups = _group_index(granularity, layers, norms.device)
    squares = torch.zeros(len(tensors), dtype=norms.dtype, device=norms.device).index_add_(0, groups, norms.square())
    return list(squares.sqrt()[groups].unbind())


def _group_index(granularity: str, layers: Sequence[int], device: torch.device) -> Tensor:
    if granularity == "model":
        return torch.zeros(len(layers), dtype=torch.long, device=device)
    number = {layer: index for index, layer in enumerate(dict.fromkeys(layers))}
    return torch.tensor([number[layer] for layer in layers], device=device)


def _group_sizes(tensors: Sequence[Tensor], granularity: str, layers: Sequence[int]) -> list[float]:
    """How many numbers the group of each tensor's numbers has: `n_i`."""
    sizes = [float(tensor.numel()) for tensor in tensors]
    if granularity == "element":
        return [1.0] * len(tensors)
    if granularity == "filter":
        return [size / tensor.shape[0] if tensor.dim() else 1.0 for size, tensor in zip(sizes, tensors, strict=True)]
    if granularity == "tensor":
        return sizes
    keys = list(layers) if granularity == "layer" else [0] * len(tensors)
    total: dict[int, float] = {}
    for key, size in zip(keys, sizes, strict=True):
        total[key] = total.get(key, 0.0) + size
    return [total[key] for key in keys]


class ScaleOperator(NamedTuple):
    """T for a list of tensors.

    Attributes:
        factors: for each tensor, T broadcastable to it, or None where T = 1.
        num_capped: how many groups the cap reduced (a 0-dimensional tensor, or 0).
    """

    factors: list[Tensor | None]
    num_capped: Tensor | int


def build_scale(
    name: str,
    granularity: str,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    layers: Sequence[int],
    *,
    unit: float = 1.0,
    eta: float = 0.0,
    max_scale: float = float("inf"),
) -> ScaleOperator:
    """Compute T at the start of an update (GA-SAM 3.1, eq. 13, Table 2).

    Args:
        name: key of ``SCALES``.
        granularity: what one group is.
        weights: the perturbed weights, float32 or better.
        gradients: their gradients, same shapes.
        layers: the layer number of each tensor.
        unit: factor that brings the gradients into the method's unit, > 0.
        eta: ``asam_eta``.
        max_scale: cap of a gradient-based T, in multiples of its model-wise value.

    Returns:
        T, and the number of groups that were capped.
    """
    if name == "one":
        return ScaleOperator([None] * len(weights), 0)
    scale = SCALES[name]
    strengths = _strengths(granularity, weights, gradients, layers, unit, eta)
    factors = [scale.formula(strength) for strength in strengths]
    num_capped: Tensor | int = 0
    if scale.gradient_based and max_scale != float("inf"):
        model_wise = scale.formula(_strengths("model", weights, gradients, layers, unit, eta)[0])
        cap = model_wise * max_scale
        num_capped = _count_groups([factor > cap for factor in factors], granularity, layers)
        factors = [torch.minimum(factor, cap.to(factor.device, factor.dtype)) for factor in factors]
    return ScaleOperator([f.to(w.device, w.dtype) for f, w in zip(factors, weights, strict=True)], num_capped)


def _strengths(
    granularity: str,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    layers: Sequence[int],
    unit: float,
    eta: float,
) -> list[Strengths]:
    total = float(sum(weight.numel() for weight in weights))
    rows = zip(
        _group_norms(weights, granularity, layers),
        _group_norms(gradients, granularity, layers),
        _group_sizes(weights, granularity, layers),
        strict=True,
    )
    return [Strengths(w, g * unit, n, total, eta) for w, g, n in rows]


def _count_groups(flags: Sequence[Tensor], granularity: str, layers: Sequence[int]) -> Tensor:
    """Count flagged groups; a group that spans several tensors counts once."""
    if granularity in ("layer", "model"):
        keys = layers if granularity == "layer" else [0] * len(flags)
        flags = list(dict(zip(keys, flags, strict=True)).values())
    return torch.stack([flag.sum().to(flags[0].device) for flag in flags]).sum()
