"""What several rooms of the engine do with single tensors and with lists of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = list[Tensor | None]


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The precision to compute in: double if one of these is, else single."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in single precision if it is in half precision, else as it is."""
    return tensor.to(wide_dtype(tensor.dtype))


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient detached, and dense if it is sparse (``nn.Embedding(sparse=True)``)."""
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach()


def add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Sum of two gradients, either of which may be missing."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def add_all(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Gradients:
    """Sum of two lists of gradients."""
    return [add(a, b) for a, b in zip(first, second, strict=True)]
