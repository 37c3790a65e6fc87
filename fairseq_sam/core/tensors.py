"""What several rooms of the engine do with single tensors and with lists of gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = list[Tensor | None]
# Whether something holds: a bool where asking for it takes no time, else a 0-dimensional tensor on its device, which
# the host does not wait for.
Flag = bool | Tensor
READABLE = ("cpu",)


def known(flag: Tensor) -> Flag:
    """Return a 0-dimensional tensor's value where the host can read it without waiting, else the tensor."""
    return bool(flag) if flag.device.type in READABLE else flag


def kept(tensor: Tensor, flag: Tensor) -> Tensor:
    """Return a tensor, dense, where a flag is set, else zeros, also where it is infinite or NaN."""
    return torch.where(flag.to(tensor.device), dense(tensor), 0.0)


def on_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor of numbers on a device without waiting for what the device has to do before."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The precision to compute in: double if one of these is, else single."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in single precision if it is in half precision, else as it is."""
    return tensor.to(wide_dtype(tensor.dtype))


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient detached, and dense if it is sparse (``nn.Embedding(sparse=True)``)."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient.detach() if gradient.requires_grad else gradient


def add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Sum of two gradients, either of which may be missing."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def add_all(first: Sequence[Tensor | None], second: Sequence[Tensor | None], *, overwrite: bool = False) -> Gradients:
    """Sum of two lists of gradients.

    Args:
        first: gradients, which stay as they are.
        second: gradients.
        overwrite: whether the second may be overwritten.
    """
    return [
        b.add_(a) if overwrite and a is not None and b is not None and is_own(b, a) else add(a, b)
        for a, b in zip(first, second, strict=True)
    ]


def without_views(gradients: Gradients) -> Gradients:
    """Copy gradients that are views, such as those into the buckets of torch's DDP: the next backward writes there."""
    return [None if g is None else g.clone() if g._is_view() else g for g in gradients]


def is_own(gradient: Tensor, other: Tensor) -> bool:
    """Whether a gradient has memory of its own that a result with the other fits into."""
    return not (gradient.is_sparse or other.is_sparse or gradient._is_view()) and gradient.dtype == other.dtype


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors."""
    return [tensor.detach().clone() for tensor in tensors]


def copy_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Overwrite tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
