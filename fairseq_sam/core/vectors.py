"""A vector of the numbers of many tensors, and the ball that it is normalised by and projected onto.

Each tensor has a factor that is not multiplied in yet: scaling and normalising then cost nothing, and the norms of the
tensors are computed once. Only a step into a vector of numbers, such as signs or a sum, reads and writes all of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_sam.core.groups import Groups
from fairseq_sam.core.norms import stacked, tensor_norms, whole_norm
from fairseq_sam.core.tensors import kept

Factor = Tensor | float
ALL = Groups("model")


class Vector:
    """Tensors times factors, taken as one vector.

    Attributes:
        tensors: the tensors, without their factors.
        length: the norm of every ball that is not 0, where it is known without looking: 1 after ``Ball.steepest_``.

    Args:
        tensors: at least one, finite, in float32 or better.
        owned: whether they may be overwritten; if not, they are copied before the first change.
    """

    def __init__(self, tensors: list[Tensor], owned: bool = True) -> None:
        self.tensors = tensors
        self.length: float | None = None
        self._owned = owned
        self._factors: Tensor | None = None  # (N,), or (1,) for all, float64
        self._flag: Tensor | None = None  # where it is False all numbers are 0, whatever the tensors hold
        self._norms: dict[float, Tensor] = {}  # of the tensors without factors, by order; (N,), float64

    # -- reading ---------------------------------------------------------------------------------------------------

    def norms(self, p: float) -> Tensor:
        """Return the p-norm of each tensor times its factor: shape (N,), float64."""
        if p not in self._norms:
            norms = stacked(tensor_norms(self.tensors, p))
            self._norms[p] = norms if self._flag is None else kept(norms, self._flag)
        norms = self._norms[p]
        return norms if self._factors is None else norms * self._factors

    def norm(self, p: float) -> Tensor:
        """Return the p-norm of the whole: a 0-dimensional tensor, float64."""
        return whole_norm(self.norms(p), p)

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor with its factor, a 0-dimensional one on its device; None for 1."""
        factors: dict[Any, Sequence[Tensor]] = {}
        number = 0 if self._factors is None else len(self._factors)
        for i, tensor in enumerate(self.tensors):
            value, kind = tensor if self._flag is None else kept(tensor, self._flag), (tensor.device, tensor.dtype)
            if self._factors is not None and kind not in factors:
                most = torch.finfo(tensor.dtype).max  # of tiny gradients
                factors[kind] = self._factors.clamp(max=most).to(*kind).unbind()
            yield value, None if self._factors is None else factors[kind][i % number]

    def values(self) -> list[Tensor]:
        """Return tensors with their factors multiplied in, which must not be overwritten."""
        return [tensor if factor is None else tensor * factor for tensor, factor in self.parts()]

    # -- writing ---------------------------------------------------------------------------------------------------

    def scale_(self, factor: Factor | Sequence[Factor | None]) -> "Vector":
        """Multiply by one number, one for each tensor (shape (N,)), or a tensor or number for each; all >= 0."""
        self.length = self.length * factor if isinstance(factor, int | float) and self.length is not None else None
        if isinstance(factor, int | float | Tensor):
            if self._factors is None:
                self._factors = torch.ones(1, dtype=torch.float64, device=self.tensors[0].device)
            self._factors = self._factors * factor
            return self
        self._own()
        for tensor, own in zip(self.tensors, factor, strict=True):
            if own is not None:
                tensor.mul_(own)
        self._norms.clear()
        return self

    def keep_if_(self, flag: Tensor) -> "Vector":
        """Make all numbers 0 where the flag is not set, those that are infinite or NaN too.

        Args:
            flag: a 0-dimensional tensor of bool.
        """
        self._flag = flag if self._flag is None else self._flag & flag
        self._norms = {p: kept(norms, flag) for p, norms in self._norms.items()}
        if self._factors is not None:
            self._factors = kept(self._factors, flag)
        return self

    def sign_(self) -> "Vector":
        """Replace each number by its sign."""
        signs = self.norms(2.0).sign() if 2.0 in self._norms else None
        if self._owned:
            torch._foreach_sign_(self.tensors)
        else:
            self.tensors, self._owned = list(torch._foreach_sign(self.tensors)), True
        self._factors = None if self._factors is None else self._factors.sign()
        self._norms = {} if signs is None else {math.inf: signs}
        return self

    def power_(self, exponent: float) -> "Vector":
        """Raise the size of each number to a power, and keep its sign."""
        for tensor in self.numbers():
            tensor.copy_(tensor.sign() * tensor.abs().pow_(exponent))
        self._changed()
        return self

    def add_(self, other: "Vector") -> "Vector":
        """Add another vector of the same shapes."""
        for tensor, (own, factor) in zip(self.numbers(), other.parts(), strict=True):
            add_scaled_(tensor, own, factor)
        self._changed()
        return self

    def numbers(self) -> list[Tensor]:
        """Return tensors that may be overwritten, with their factors multiplied in."""
        self._own()
        if self._flag is not None:
            for tensor in self.tensors:
                tensor.masked_fill_(~self._flag.to(tensor.device), 0.0)
            self._flag = None
        for tensor, factor in self.parts():
            if factor is not None:
                tensor.mul_(factor)
        if self._factors is not None:
            self._norms = {p: norms * self._factors for p, norms in self._norms.items()}
        self._factors = None
        return self.tensors

    def clamp_(self, most: float) -> "Vector":
        """Clip each number to ``[-most, most]``."""
        tensors = self.numbers()
        torch._foreach_clamp_max_(tensors, most)
        torch._foreach_clamp_min_(tensors, -most)
        self._changed()
        return self

    def shared(self) -> "Vector":
        """Return a vector of the same numbers, whose factors may change; its tensors are copied before they do."""
        found = Vector(self.tensors, owned=False)
        found.length, found._factors, found._norms = self.length, self._factors, dict(self._norms)
        found._flag = self._flag
        return found

    def _changed(self) -> None:
        self.length = None
        self._norms.clear()

    def _own(self) -> None:
        if not self._owned:
            self.tensors, self._owned = [tensor.clone() for tensor in self.tensors], True


def add_scaled_(tensor: Tensor, other: Tensor, factor: Factor | None) -> None:
    """Add ``factor * other`` in place; None for a factor of 1."""
    _add_scaled(tensor, other, factor, tensor)


def _add_scaled(tensor: Tensor, other: Tensor, factor: Factor | None, place: Tensor) -> None:
    if factor is None:
        torch.add(tensor, other, out=place)
    elif isinstance(factor, Tensor):
        torch.addcmul(tensor, other, factor, out=place)
    else:
        torch.add(tensor, other, alpha=factor, out=place)


def add_all_scaled(
    tensors: Sequence[Tensor],
    others: Sequence[Tensor],
    factors: Sequence[Factor | None],
    places: Sequence[Tensor],
    *,
    at_once: bool,
) -> None:
    """Write sums of tensors and products.

    Args:
        tensors: what is added to.
        others: of the same shapes.
        factors: of the others, None for 1.
        places: where the sums are written, with the tensors' types and shapes; may be the tensors themselves.
        at_once: all together, if they are, where starting work is what takes time; else one by one.
    """
    own = [factor for factor in factors if isinstance(factor, Tensor)]
    is_one = all(factor is factors[0] for factor in factors)
    at_once = at_once and all(tensor is place for tensor, place in zip(tensors, places, strict=True))
    if not (at_once and (is_one or len(own) == len(tensors))):
        for row in zip(tensors, others, factors, places, strict=True):
            _add_scaled(*row)
    elif own:
        products = torch._foreach_mul(list(others), own[0]) if is_one else torch._foreach_mul(list(others), own)
        torch._foreach_add_(list(tensors), list(products))
    else:
        number = 1.0 if factors[0] is None else float(factors[0])
        torch._foreach_add_(list(tensors), list(others), alpha=number)


@dataclass(frozen=True)
class Ball:
    """``||x||_p <= epsilon``, for all numbers together or for each group of them.

    Attributes:
        p: order of the norm, in (1, inf].
        epsilon: radius, >= 0.
        groups: the groups; default one ball for all.
    """

    p: float
    epsilon: float = math.inf
    groups: Groups = ALL

    def normalize_(self, vector: Vector) -> Vector:
        """Divide by the norm that covers each number, in place; 0 where the norm is 0."""
        vector.scale_(_each(self.groups.norms(vector, self.p), _inverse))
        vector.length = 1.0
        return vector

    def steepest_(self, vector: Vector) -> Vector:
        """Turn a gradient into the unit vector along which it rises fastest, in place.

        ``x = sgn(g) |g|^(1/(p-1)) / || |g|^(1/(p-1)) ||_p`` maximises ``g . x`` over ``||x||_p = 1`` (GA-SAM eq.
        94-95).

        Args:
            vector: the gradient, finite. Where the norm is 0 the direction is 0.
        """
        if self.p == math.inf:
            vector.sign_().length = 1.0
            return vector
        if self.p != 2.0:
            # Dividing by the largest number first keeps |g|^(1/(p-1)) in range for p near 1; x is the same.
            vector.scale_(_each(self.groups.norms(vector, math.inf), _inverse))
            vector.power_(1.0 / (self.p - 1.0))
        return self.normalize_(vector)

    def project_(self, vector: Vector) -> Vector:
        """Project onto the ball, in place (GA-SAM eq. 17-18 in the coordinates ``T^-1 a``).

        L-infinity clips; every other norm shrinks radially. Differs from the Euclidean projection for p not in
        {2, inf}.
        """
        if vector.length is not None:
            return vector.scale_(min(1.0, self.epsilon / vector.length)) if vector.length else vector
        if self.p == math.inf:
            return vector.clamp_(self.epsilon)
        norms = self.groups.norms(vector, self.p)
        vector.scale_(_each(norms, lambda norm: torch.where(norm > self.epsilon, self.epsilon / norm, 1.0)))
        return vector


def _each(norms: Tensor | list[Tensor], change: Callable[[Tensor], Tensor]) -> Tensor | list[Tensor]:
    return change(norms) if isinstance(norms, Tensor) else [change(norm) for norm in norms]


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1.0 / norm, 0.0)
