"""Copies of the weights, which every pass at other weights ends with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Room:
    """Memory for copies of the weights, which stays from update to update."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like the weights, whose numbers are those of an earlier call or none."""
        if [_kind(weight) for weight in weights] != [_kind(tensor) for tensor in self._tensors]:
            self._tensors = [torch.empty_like(weight) for weight in weights]
        return self._tensors


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Backup:
    """The weights as they were before the first move; each is copied right before it moves.

    Args:
        weights: the parameters.
        room: memory for the copies.
    """

    def __init__(self, weights: Sequence[Tensor], room: Room) -> None:
        self._weights = weights
        # Without a version count of their own. Quant-noise gives weights other memory in a forward pass.
        self._own = [weight.data for weight in weights]
        self._copies = room.of(self._own)
        self._is_copied = [False] * len(weights)

    def __getitem__(self, i: int) -> Tensor:
        """Weights `i` as they were; must not be overwritten."""
        return self._copies[i] if self._is_copied[i] else self._own[i]

    def before_move(self, indices: Sequence[int]) -> list[Tensor]:
        """Copy some weights as far as that is still to be done, and return them, to be overwritten."""
        left = [i for i in indices if not self._is_copied[i]]
        if left:
            torch._foreach_copy_([self._copies[i] for i in left], [self._own[i] for i in left])
        for i in indices:
            self._is_copied[i] = True
            self._give_back(i)
        return [self._own[i] for i in indices]

    def restore(self) -> None:
        """Copy back what has moved."""
        copied = [i for i, is_copied in enumerate(self._is_copied) if is_copied]
        if copied:
            torch._foreach_copy_([self._own[i] for i in copied], [self._copies[i] for i in copied])
        for i in range(len(self._weights)):
            self._give_back(i)

    def _give_back(self, i: int) -> None:
        if self._weights[i].data_ptr() != self._own[i].data_ptr():
            self._weights[i].data = self._own[i]
