"""Rounding to half precision."""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
_DROPPED_BITS = {torch.float16: 13, torch.bfloat16: 16}  # of float32's mantissa


def round_stochastically(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round up or down at random, so that the expectation is the value.

    Args:
        value: float32 numbers.
        dtype: float16 or bfloat16. Below float16's normal range (6e-5) its steps are equal, and those are rounded to
            the nearest; beyond its largest number the result is infinite.
        generator: on the value's device.

    Returns:
        The rounded numbers, still in float32; exact in `dtype`.
    """
    bits = value.float().contiguous().view(torch.int32)
    size = 1 << _DROPPED_BITS[dtype]
    noise = torch.randint(0, size, bits.shape, dtype=torch.int32, device=value.device, generator=generator)
    rounded = ((bits + noise) & -size).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(dtype).float()
