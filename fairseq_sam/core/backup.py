"""Copies of the weights, which every pass at other weights ends with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Backup:
    """Copies of the weights, in memory that stays from update to update."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def take(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of the weights, which are overwritten when it is called again."""
        weights = [weight.detach() for weight in weights]
        if [_kind(weight) for weight in weights] != [_kind(tensor) for tensor in self._tensors]:
            self._tensors = [torch.empty_like(weight) for weight in weights]
        with torch.no_grad():
            for tensor, weight in zip(self._tensors, weights, strict=True):
                tensor.copy_(weight)
        return self._tensors


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
