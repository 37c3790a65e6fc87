"""What a method remembers between updates: Fisher mask, reused sharpness component, the radius that was found."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fairseq_sam.core.backup import Room
from fairseq_sam.core.descent import length_of
from fairseq_sam.core.fisher import SquaredGradients, top_mask
from fairseq_sam.core.method import Method
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.tensors import Gradients, add_all

logger = logging.getLogger(__name__)

Named = dict[str, Tensor]


class Memory:
    """State of a method, by name of parameter; part of a checkpoint.

    The Fisher information is collected from the instances of as many consecutive updates as `fisher_samples` needs;
    the mask is made anew after each of them. The sharpness component is the sum over the micro-batches of an update.

    Attributes:
        radii: what a search for the radius has found, in each update in which it measured; NaN where it found none.
        epsilon: the radius that the search has ended with; None before, or without a search.
        searched_with: settings of the search: names and numbers, words or None.
        room: memory for a copy of the weights, which is not part of a checkpoint.
    """

    def __init__(self) -> None:
        self.mask: Named | None = None
        self.component = None
        self.radii: tuple[float, ...] = ()
        self.epsilon: float | None = None
        self.searched_with: dict[str, Any] = {}
        self.room = Room()
        self._sums: Named | None = None
        self._num_instances = 0
        self._mask_update = 0  # update in which the collection began
        self._has_warned = False

    # -- the Fisher mask -------------------------------------------------------------------------------------------

    def instances_wanted(self, method: Method, space: ParameterSpace, num_updates: int) -> int:
        """Say how many more instances the Fisher mask wants in this update; begins a collection when it is due.

        Args:
            method: the method; 0 unless its mask is ``fisher``.
            space: the trained parameters.
            num_updates: number of updates done before this one.
        """
        if method.mask != "fisher" or method.sparsity == 0 or method.epsilon == 0:
            return 0
        fits = _fits(self.mask, space)
        is_due = num_updates - self._mask_update >= int(method.mask_interval or 1)
        if fits and is_due and self._sums is not None:
            self._warn_of_few(method)
        if not fits or is_due:
            self._sums, self._num_instances, self._mask_update = None, 0, num_updates
        elif self._sums is None:
            return 0
        return max(int(method.fisher_samples or 1) - self._num_instances, 0)

    def add_squares(self, method: Method, space: ParameterSpace, squares: SquaredGradients) -> None:
        """Add instances to the collection and make the mask anew.

        Args:
            method: the method.
            space: the trained parameters.
            squares: from the instances of all workers.
        """
        if not squares.num_instances:  # nothing but overflows: the next update tries again
            return
        names = perturbed_names(space)
        sums, earlier = squares.sums, self._sums
        if earlier is not None and _fits(earlier, space):
            for name, total in zip(names, sums, strict=True):
                total.add_(earlier[name].to(total))
        self._num_instances += squares.num_instances
        number = sum(total.numel() for total in sums)
        kept = max(1, round((1.0 - float(method.sparsity or 0.0)) * number))
        self.mask = dict(zip(names, top_mask(sums, kept), strict=True))
        collecting = self._num_instances < int(method.fisher_samples or 1)
        self._sums = dict(zip(names, sums, strict=True)) if collecting else None

    def _warn_of_few(self, method: Method) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Fisher mask: only %d of %s (--sam-fisher-samples) instances were in the batches of %s updates "
                "(--sam-mask-interval); the mask is made from those",
                self._num_instances, f"{method.fisher_samples:g}", f"{method.mask_interval:g}",
            )  # fmt: skip

    def masks(self, space: ParameterSpace) -> list[Tensor | None]:
        """Return the mask of each parameter of the space, None where there is none."""
        return _on_devices(self.mask or {}, space)

    # -- the sharpness component -----------------------------------------------------------------------------------

    @property
    def component(self) -> Named | None:
        """The sharpness component of the last sharpness-aware update, by name of parameter."""
        return self._component

    @component.setter
    def component(self, component: Named | None) -> None:
        self._component = component
        self._length: tuple[int, Tensor] | None = None  # of how many tensors, and what it is

    def length_of_component(self, component: Gradients) -> Tensor:
        """Return the Euclidean norm of what ``component_of`` returned, in float64; computed once for all updates."""
        number = sum(part is not None for part in component)
        if self._length is None or self._length[0] != number:
            self._length = number, length_of(component)
        return self._length[1]

    def component_of(self, space: ParameterSpace) -> Gradients:
        """Return the sharpness component, in the order of the space."""
        return _on_devices(self.component or {}, space)

    def add_component(self, space: ParameterSpace, component: Gradients) -> None:
        """Add the sharpness component of a micro-batch.

        Args:
            space: the trained parameters.
            component: one tensor for each of them, or None.
        """
        total = add_all(self.component_of(space), component)
        self.component = {n: c.detach() for n, c in zip(space.names, total, strict=True) if c is not None}

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; only what the method has used."""
        state: dict[str, Any] = {}
        if self.component is not None:
            state["component"] = self.component
        if self.radii:
            state["search"] = {
                "radii": list(self.radii), "epsilon": self.epsilon, "searched_with": dict(self.searched_with),
            }  # fmt: skip
        if self.mask is not None:
            state["fisher"] = {
                "mask": self.mask,
                "sums": self._sums,
                "num_instances": self._num_instances,
                "update": self._mask_update,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; what is missing starts anew."""
        fisher, search = state.get("fisher", {}), state.get("search", {})
        self.radii, self.epsilon = tuple(search.get("radii", ())), search.get("epsilon")
        self.searched_with = dict(search.get("searched_with", {}))
        self.component = _copied(state.get("component"))
        self.mask, self._sums = _copied(fisher.get("mask")), _copied(fisher.get("sums"))
        self._num_instances = int(fisher.get("num_instances", 0))
        self._mask_update = int(fisher.get("update", 0))


def perturbed_names(space: ParameterSpace) -> Sequence[str]:
    """Names of the parameters that the ascent may move."""
    return [name for name, perturbed in zip(space.names, space.perturbed, strict=True) if perturbed]


def _fits(named: Named | None, space: ParameterSpace) -> bool:
    """Whether there is a tensor for each parameter that the ascent may move, of its shape, and no other."""
    triples = zip(space.names, space.tensors, space.perturbed, strict=True)
    wanted = {name: tensor.shape for name, tensor, perturbed in triples if perturbed}
    return named is not None and {name: tensor.shape for name, tensor in named.items()} == wanted


def _copied(named: Mapping[str, Tensor] | None) -> Named | None:
    return None if named is None else {name: tensor.clone() for name, tensor in named.items()}


def _on_devices(kept: Named, space: ParameterSpace) -> list[Tensor | None]:
    """What is kept of each parameter; moved to its device once. None if the parameter has changed its shape."""
    for name, tensor in zip(space.names, space.tensors, strict=True):
        if name in kept and kept[name].device != tensor.device:
            kept[name] = kept[name].to(tensor.device)
    pairs = zip((kept.get(name) for name in space.names), space.tensors, strict=True)
    return [None if value is None or value.shape != tensor.shape else value for value, tensor in pairs]
