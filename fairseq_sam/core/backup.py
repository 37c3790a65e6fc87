"""The weights as they were, which every pass at other weights ends with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Room:
    """Memory for copies of the weights, which stays from update to update."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._kinds: list[tuple[Any, ...]] = []

    def of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like the weights, whose numbers are those of an earlier call or none."""
        kinds = [_kind(weight) for weight in weights]
        if kinds != self._kinds:
            self._tensors, self._kinds = [torch.empty_like(weight) for weight in weights], kinds
        return self._tensors


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Backup:
    """The weights as they were before the first move.

    On a processor a parameter that has memory of its own is given other memory for a pass, and its own back after it:
    nothing is copied. All others are copied right before they move, and copied back.

    Args:
        weights: the parameters.
        room: memory for the copies, or for the moved weights.
    """

    def __init__(self, weights: Sequence[Tensor], room: Room) -> None:
        self._weights = weights
        self._changes_places: list[bool | None] = [None] * len(weights)  # not known before the first move
        self._alone = _readers(torch.empty(1))
        # Without a version count of their own. Quant-noise gives weights other memory in a forward pass.
        self._own = [weight.data for weight in weights]
        self._room = room.of(self._own)
        self._is_copied = [False] * len(weights)

    def __getitem__(self, i: int) -> Tensor:
        """Weights `i` as they were; must not be overwritten."""
        return self._room[i] if self._is_copied[i] else self._own[i]

    def before_move(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return some weights as they are, and for each where the moved ones are to be written, maybe the same."""
        for i in indices:
            self._give_back(i)
            if self._changes_places[i] is not False:  # what reads the weight's memory must see the move
                self._changes_places[i] = has_own_memory(self._own[i], self._alone and self._alone + 1)
        left = [i for i in indices if not (self._changes_places[i] or self._is_copied[i])]
        if left:
            torch._foreach_copy_([self._room[i] for i in left], [self._own[i] for i in left])
            for i in left:
                self._is_copied[i] = True
        places = [(self._room if self._changes_places[i] else self._own)[i] for i in indices]
        return [self._own[i] for i in indices], places

    def after_move(self, indices: Sequence[int]) -> None:
        """Let the model see the weights that were written."""
        for i in indices:
            if self._changes_places[i]:
                self._weights[i].data = self._room[i]

    def restore(self) -> None:
        """Put back what has moved."""
        for i in range(len(self._weights)):
            self._give_back(i)
            if self._changes_places[i] and _readers(self._room[i]) != self._alone:
                self._keep_room(i)
        copied = [i for i, is_copied in enumerate(self._is_copied) if is_copied]
        if copied:
            torch._foreach_copy_([self._own[i] for i in copied], [self._room[i] for i in copied])

    def _keep_room(self, i: int) -> None:
        """Let weights `i` stay where they were moved, with their own numbers: something reads that memory since."""
        self._room[i].copy_(self._own[i])
        self._weights[i].data = self._room[i]
        self._room[i], self._own[i] = self._own[i], self._room[i]

    def _give_back(self, i: int) -> None:
        if self._weights[i].data_ptr() != self._own[i].data_ptr():
            self._weights[i].data = self._own[i]


def has_own_memory(weight: Tensor, readers: int | None = None) -> bool:
    """Return whether nothing else, such as a view, another parameter or another process, reads a weight's memory.

    Args:
        weight: the weight.
        readers: how many tensors may have its memory, as torch counts them; default the weight alone.
    """
    if weight.device.type != "cpu" or weight.layout != torch.strided or not weight.numel():
        return False
    storage = weight.untyped_storage()
    if storage.nbytes() != weight.numel() * weight.element_size() or storage.is_shared():
        return False
    uses = _uses(storage)
    return uses is not None and uses == (_readers(torch.empty(1)) if readers is None else readers)


def _readers(tensor: Tensor) -> int | None:
    """How many tensors have a tensor's memory, as torch counts them; None where it does not tell."""
    return _uses(tensor.untyped_storage())


def _uses(storage: torch.UntypedStorage) -> int | None:
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else int(count(storage._cdata))
