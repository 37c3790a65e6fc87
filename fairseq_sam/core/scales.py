"""The diagonal operator T: one positive number for each group of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_sam.core.groups import Groups
from fairseq_sam.core.tensors import kept, on_device
from fairseq_sam.core.vectors import Vector


class Strengths(NamedTuple):
    """What a scale may depend on: numbers for each tensor, shape (N,), or for the groups of one tensor."""

    weight: Any  # ||w_i||_2, of a scale that is weight-based
    gradient: Any  # ||g_i||_2, in the method's gradient unit, of a scale that is gradient-based
    number: Tensor | float  # n_i
    total: float  # n
    eta: float  # asam_eta


@dataclass(frozen=True)
class Scale:
    """One choice of T.

    Attributes:
        formula: T from the strengths of a group.
        weight_based: T has the weights' norm in it.
        gradient_based: T has the gradient's norm in its denominator, so it is capped.
        element_only: T is defined for single weights alone.
    """

    formula: Callable[[Strengths], Tensor]
    weight_based: bool = False
    gradient_based: bool = False
    element_only: bool = False


def _divide(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """Divide; 0 where the denominator is 0, so that a group without a gradient does not move."""
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0, numerator / safe, torch.zeros_like(denominator))


def _root(x: Tensor | float) -> Tensor | float:
    return x**0.5


SCALES: dict[str, Scale] = {
    "one": Scale(lambda s: torch.ones_like(torch.as_tensor(s.number))),
    "weight_abs": Scale(lambda s: s.weight + s.eta if s.eta else s.weight, weight_based=True, element_only=True),
    "weight_norm": Scale(lambda s: s.weight, weight_based=True),
    "weight_over_gradient": Scale(lambda s: _divide(s.weight, s.gradient), weight_based=True, gradient_based=True),
    "inverse_gradient": Scale(lambda s: _divide(1.0, s.gradient), gradient_based=True),
    "weight_over_sqrt_n": Scale(lambda s: s.weight / _root(s.number), weight_based=True),
    "gradient_strength": Scale(lambda s: _divide(_root(s.number), s.gradient * _root(s.total)), gradient_based=True),
}


class ScaleOperator(NamedTuple):
    """T for a list of tensors.

    Attributes:
        factors: T, a number for each tensor (shape (N,), float64), or a tensor for each, broadcastable to it; None
            where T = 1.
        num_capped: how many groups the cap reduced (a 0-dimensional tensor, or 0).
    """

    factors: Tensor | list[Tensor] | None
    num_capped: Tensor | int

    def kept(self, flag: Tensor) -> "ScaleOperator":
        """Return this operator where a flag is set, else one that is 0."""
        if self.factors is None:
            return self
        if isinstance(self.factors, Tensor):
            return ScaleOperator(kept(self.factors, flag), flag * self.num_capped)
        return ScaleOperator([kept(factor, flag) for factor in self.factors], flag * self.num_capped)

    def unless(self, flag: Tensor, other: "ScaleOperator") -> "ScaleOperator":
        """Return another operator of the same tensors where a flag is set, else this one."""
        if self.factors is None or other.factors is None:
            return self
        num_capped = flag * other.num_capped + ~flag * self.num_capped
        if isinstance(self.factors, Tensor) and isinstance(other.factors, Tensor):
            return ScaleOperator(torch.where(flag, other.factors, self.factors), num_capped)
        pairs = zip(other.factors, self.factors, strict=True)
        return ScaleOperator([torch.where(flag.to(old.device), old, new) for old, new in pairs], num_capped)


def build_scale(
    name: str,
    groups: Groups,
    weights: Vector,
    gradients: Vector,
    *,
    unit: float = 1.0,
    eta: float = 0.0,
    max_scale: float = float("inf"),
) -> ScaleOperator:
    """Compute T at the start of an update (GA-SAM 3.1, eq. 13, Table 2).

    Args:
        name: key of ``SCALES``.
        groups: what one group is.
        weights: the perturbed weights; of a scale that is not weight-based only the shapes matter.
        gradients: their gradients, same shapes.
        unit: factor that brings the gradients into the method's unit, > 0.
        eta: ``asam_eta``.
        max_scale: cap of a gradient-based T, in multiples of its model-wise value.

    Returns:
        T, and the number of groups that were capped.
    """
    if name == "one":
        return ScaleOperator(None, 0)
    scale = SCALES[name]
    cap: Tensor | None = None
    if scale.gradient_based and max_scale != float("inf"):
        cap = _factors(scale, Groups("model"), weights, gradients, unit, eta)[0] * max_scale
    factors = _factors(scale, groups, weights, gradients, unit, eta)
    if cap is None:
        return ScaleOperator(factors, 0)
    if isinstance(factors, Tensor):
        return ScaleOperator(torch.minimum(factors, cap), groups.num_flagged(factors > cap))
    num_capped = groups.num_flagged([factor > cap for factor in factors])
    return ScaleOperator([torch.minimum(f, cap.to(f.device, f.dtype)) for f in factors], num_capped)


def _factors(
    scale: Scale, groups: Groups, weights: Vector, gradients: Vector, unit: float, eta: float
) -> Tensor | list[Tensor]:
    total, sizes = float(sum(tensor.numel() for tensor in weights.tensors)), groups.sizes(weights.tensors)
    of_weights = groups.norms(weights) if scale.weight_based else None
    of_gradients = groups.norms(gradients.shared().scale_(unit)) if scale.gradient_based else None
    norms = of_weights if of_gradients is None else of_gradients
    if isinstance(norms, Tensor):
        numbers = on_device(sizes, norms.device, norms.dtype)
        return scale.formula(Strengths(of_weights, of_gradients, numbers, total, eta)).expand(len(sizes))
    nothing = [None] * len(sizes)
    rows = zip(of_weights or nothing, of_gradients or nothing, sizes, strict=True)
    return [scale.formula(Strengths(w, g, n, total, eta)) for w, g, n in rows]
