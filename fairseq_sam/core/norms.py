"""The steepest direction and the projection in a p-norm ball, over a list of tensors taken as one vector."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# From tensors and an order p: for each tensor, the norm that covers each of its numbers, broadcastable to it.
Norms = Callable[[Sequence[Tensor], float], list[Tensor]]
BLOCK = 256  # numbers that are added up in float32
SAFE = 1e-10, 1e15  # norms whose squares float32 can add up


def vector_norm(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the p-norm of all numbers of `tensors` together, accumulated in float64.

    Args:
        tensors: at least one tensor, any shapes.
        p: order of the norm, in (1, inf].

    Returns:
        A 0-dimensional float64 tensor on the first tensor's device.
    """
    if p in (2.0, math.inf):
        return _plain_norm(tensors, p)
    # |x|^p leaves the range of floats soon for other p: take the largest number out first.
    largest = _plain_norm(tensors, math.inf)
    if not largest > 0:
        return largest
    return largest * _plain_norm([tensor / largest.to(tensor.device, tensor.dtype) for tensor in tensors], p)


def tensor_norms(tensors: Sequence[Tensor], p: float) -> list[Tensor]:
    """Return the p-norm of each tensor, accumulated in float64.

    Args:
        tensors: any shapes.
        p: order of the norm, in (1, inf].

    Returns:
        0-dimensional float64 tensors, on the tensors' devices.
    """
    norms: list[Tensor | None] = [_cpu_norm(tensor, p) for tensor in tensors]
    others = [tensor for tensor, norm in zip(tensors, norms, strict=True) if norm is None]
    left = iter(torch._foreach_norm(others, p, dtype=torch.float64) if others else [])
    return [next(left) if norm is None else norm for norm in norms]


def _cpu_norm(tensor: Tensor, p: float) -> Tensor | None:
    """The norm of a float32 tensor on the CPU, where torch is slow with another type; None for all others.

    Blocks are short enough for float32: relative errors are below 2e-7.
    """
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.numel() or p not in (2.0, math.inf):
        return None
    if p == math.inf:
        least, most = torch.aminmax(tensor)
        return torch.maximum(-least, most).double()
    whole = tensor.numel() - tensor.numel() % BLOCK
    flat = tensor.reshape(-1)
    parts = [torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), p, dim=1)] if whole else []
    if whole < tensor.numel():
        parts.append(torch.linalg.vector_norm(flat[whole:], p).reshape(1))
    result: Tensor = torch.linalg.vector_norm(torch.cat(parts), p, dtype=torch.float64)
    return result if SAFE[0] < result < SAFE[1] else None  # squares outside leave the range of float32


def _plain_norm(tensors: Sequence[Tensor], p: float) -> Tensor:
    joined = torch.stack([norm.to(tensors[0].device) for norm in tensor_norms(tensors, p)])
    result: Tensor = torch.linalg.vector_norm(joined, p)
    return result


def global_norms(tensors: Sequence[Tensor], p: float) -> list[Tensor]:
    """For each tensor, the p-norm of all numbers of `tensors` together."""
    return [vector_norm(tensors, p)] * len(tensors)


def steepest_direction_(gradients: list[Tensor], p: float, norms: Norms = global_norms) -> list[Tensor]:
    """Turn a gradient into the unit vector along which it rises fastest, in place.

    ``x = sgn(g) |g|^(1/(p-1)) / || |g|^(1/(p-1)) ||_p`` maximises ``g . x`` over ``||x||_p = 1`` (GA-SAM eq. 94-95).

    Args:
        gradients: finite tensors; overwritten. Where the norm is 0 the direction is 0.
        p: order of the norm, in (1, inf].
        norms: norm that covers each number; default one ball for all tensors, else one for each group.

    Returns:
        The same tensors.
    """
    if p == math.inf:
        torch._foreach_sign_(gradients)
        return gradients
    if p != 2.0:
        # Dividing by the largest number first keeps |g|^(1/(p-1)) in range for p near 1; the quotient is unchanged.
        normalize_(gradients, math.inf, norms)
        for gradient in gradients:
            gradient.copy_(gradient.sign() * gradient.abs().pow_(1.0 / (p - 1.0)))
    normalize_(gradients, p, norms)
    return gradients


def normalize_(tensors: list[Tensor], p: float, norms: Norms = global_norms) -> None:
    """Divide by the p-norm that covers each number, in place; 0 where the norm is 0."""
    for tensor, norm in zip(tensors, norms(tensors, p), strict=True):
        tensor.div_(torch.where(norm > 0, norm, math.inf).to(tensor.device, tensor.dtype))


def scale_(tensors: list[Tensor], factor: Tensor | float) -> None:
    """Multiply all tensors by one number, in place."""
    if isinstance(factor, Tensor):
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.device, tensor.dtype))
    else:
        torch._foreach_mul_(tensors, factor)


def project_(tensors: list[Tensor], p: float, epsilon: float, norms: Norms = global_norms) -> None:
    """Project onto the ball ``||x||_p <= epsilon``, in place (GA-SAM eq. 17-18 in the coordinates ``T^-1 a``).

    L-infinity clips; every other norm shrinks radially. Differs from the Euclidean projection for p not in {2, inf}.

    Args:
        tensors: finite tensors; overwritten.
        p: order of the norm, in (1, inf].
        epsilon: radius, >= 0.
        norms: norm that covers each number; default one ball for all tensors, else one for each group.
    """
    if p == math.inf:
        torch._foreach_clamp_max_(tensors, epsilon)
        torch._foreach_clamp_min_(tensors, -epsilon)
        return
    for tensor, norm in zip(tensors, norms(tensors, p), strict=True):
        tensor.mul_(torch.where(norm > epsilon, epsilon / norm, 1.0).to(tensor.device, tensor.dtype))
