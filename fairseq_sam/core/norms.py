"""Norms of tensors, and of lists of tensors taken as one vector."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_sam.core.tensors import at_least_float32, wide_dtype

BLOCK = 256  # numbers that are added up in float32
FEW = 4096  # below which another type costs less than a second call
SAFE = 1e-10, 1e15  # norms whose squares float32 can add up


def vector_norm(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the p-norm of all numbers of `tensors` together, accumulated in float64.

    Args:
        tensors: at least one tensor, any shapes.
        p: order of the norm, in (1, inf].

    Returns:
        A 0-dimensional float64 tensor on the first tensor's device.
    """
    return whole_norm(stacked(tensor_norms(tensors, p)), p)


def whole_norm(norms: Tensor, p: float) -> Tensor:
    """Return the p-norm of vectors together, from their norms, shape (N,): a 0-dimensional tensor."""
    return joined_norms(norms, torch.zeros_like(norms, dtype=torch.long), 1, p)[0]


def stacked(norms: Sequence[Tensor]) -> Tensor:
    """Return 0-dimensional tensors as one vector, on the first one's device."""
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def joined_norms(norms: Tensor, groups: Tensor, num_groups: int, p: float) -> Tensor:
    """Return the p-norm of the union of the vectors in each group, from the norms of the vectors.

    Args:
        norms: of the vectors, shape (N,).
        groups: for each vector, the number of its group, shape (N,).
        num_groups: how many groups there are.
        p: order of the norm, in (1, inf].

    Returns:
        For each vector, the norm of its group, shape (N,); or, where all are one group, shape (1,).
    """
    if num_groups == 1 and p in (2.0, math.inf):
        whole: Tensor = torch.linalg.vector_norm(norms, p)
        return whole.reshape(1)
    largest = norms.new_zeros(num_groups).scatter_reduce_(0, groups, norms, "amax")
    if p == math.inf:
        return largest[groups]
    safe = torch.where(largest > 0, largest, 1.0)  # powers of quotients stay in range
    sums = norms.new_zeros(num_groups).index_add_(0, groups, (norms / safe[groups]) ** p)
    return (safe * sums ** (1.0 / p))[groups]


def tensor_norms(tensors: Sequence[Tensor], p: float) -> list[Tensor]:
    """Return the p-norm of each tensor, accumulated in float64.

    Args:
        tensors: any shapes.
        p: order of the norm, in (1, inf].

    Returns:
        0-dimensional float64 tensors, on the tensors' devices.
    """
    if p not in (2.0, math.inf):
        return [_other_norm(tensor, p) for tensor in tensors]
    norms: list[Tensor | None] = [_cpu_norm(tensor, p) for tensor in tensors]
    others = [tensor for tensor, norm in zip(tensors, norms, strict=True) if norm is None]
    left = iter(torch._foreach_norm(others, p, dtype=torch.float64) if others else [])
    return [next(left) if norm is None else norm for norm in norms]


def _cpu_norm(tensor: Tensor, p: float) -> Tensor | None:
    """The norm of a float32 tensor on the CPU, where torch is slow with another type; None for all others.

    Blocks are short enough for float32: relative errors are below 2e-7.
    """
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.numel():
        return None
    if tensor.numel() < FEW:
        few: Tensor = torch.linalg.vector_norm(tensor, p, dtype=torch.float64)
        return few
    if p == math.inf:
        least, most = torch.aminmax(tensor)
        return torch.maximum(-least, most).double()
    whole = tensor.numel() - tensor.numel() % BLOCK
    flat = tensor.reshape(-1)
    parts = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), p, dim=1)
    if whole < tensor.numel():
        parts = torch.cat([parts, torch.linalg.vector_norm(flat[whole:], p).reshape(1)])
    result: Tensor = torch.linalg.vector_norm(parts, p, dtype=torch.float64)
    return result if SAFE[0] < result < SAFE[1] else None  # squares outside leave the range of float32


def _other_norm(tensor: Tensor, p: float) -> Tensor:
    """A norm of an order whose powers leave the range of floats soon: the largest number is taken out first."""
    (largest,) = tensor_norms([tensor], math.inf)
    safe = torch.where(largest > 0, largest, 1.0)
    result: Tensor = torch.linalg.vector_norm(
        at_least_float32(tensor) / safe.to(wide_dtype(tensor.dtype)), p, dtype=torch.float64
    )
    return safe * result


def scale_(tensors: list[Tensor], factor: Tensor | float) -> None:
    """Multiply all tensors by one number, in place."""
    if isinstance(factor, Tensor):
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.device, tensor.dtype))
    else:
        torch._foreach_mul_(tensors, factor)
