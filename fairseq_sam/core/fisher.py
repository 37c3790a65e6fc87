"""The Fisher mask: the weights with the largest diagonal empirical Fisher information (FSAM, eq. 9-10)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_sam.core.batch import Batch
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.tensors import dense, wide_dtype

CHUNK = 1 << 22  # numbers that are counted at a time: bounds the memory beside the Fisher information itself
DIGIT = 16  # bits that one round of the search for the threshold decides


class SquaredGradients(NamedTuple):
    """Sum of squared gradients of single instances.

    Attributes:
        sums: one tensor for each perturbed parameter, float32 or better.
        num_instances: how many instances they are from.
    """

    sums: list[Tensor]
    num_instances: int


def squared_gradients(instances: Iterable[Batch[Any]], space: ParameterSpace, unit: float) -> SquaredGradients:
    """Sum the squares of the gradients of single instances; ``p.grad`` is left empty.

    Args:
        instances: batches of one instance each. One with a gradient that is not finite does not count.
        space: the trained parameters.
        unit: factor from ``p.grad`` to the gradient of the unscaled loss.

    Returns:
        The sums, over the perturbed parameters.
    """
    moved = [tensor for tensor, perturbed in zip(space.tensors, space.perturbed, strict=True) if perturbed]
    sums = [torch.zeros_like(tensor, dtype=wide_dtype(tensor.dtype)) for tensor in moved]
    count = 0
    for instance in instances:
        space.take_gradients()
        instance.run()
        gradients = [None if t.grad is None else dense(t.grad).to(s.dtype) for t, s in zip(moved, sums, strict=True)]
        if all(g is None or bool(torch.isfinite(g).all()) for g in gradients):
            count += 1
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.add_((gradient * unit).square_())
        del gradients  # not beside those of the next instance
    space.take_gradients()
    return SquaredGradients(sums, count)


def top_mask(values: Sequence[Tensor], num_kept: int) -> list[Tensor]:
    """Mark the largest numbers of all tensors together, exactly `num_kept` of them.

    One threshold for all; of the numbers that equal it, the first ones in the order of the tensors are kept. The
    threshold is found digit by digit from histograms, so nothing is sorted and memory beyond the result is bounded.

    Args:
        values: finite tensors >= 0, float32 or float64, on any devices.
        num_kept: how many to keep, 0 <= num_kept <= their number.

    Returns:
        Boolean tensors of the same shapes.
    """
    total = sum(value.numel() for value in values)
    if num_kept >= total or num_kept <= 0:
        return [torch.full_like(value, num_kept > 0, dtype=torch.bool) for value in values]
    wide = wide_dtype(*(value.dtype for value in values))
    threshold, num_ties = _threshold(values, num_kept, wide)
    masks = []
    for value in values:
        mask = torch.empty(value.numel(), dtype=torch.bool, device=value.device)
        for part, chunk in zip(torch.split(mask, CHUNK), torch.split(value.reshape(-1), CHUNK), strict=True):
            key = _key(chunk, wide)
            torch.gt(key, threshold, out=part)
            if num_ties:
                ties = (key == threshold).nonzero()[:num_ties, 0]
                part[ties] = True
                num_ties -= len(ties)
        masks.append(mask.view(value.shape))
    return masks


def _threshold(values: Sequence[Tensor], rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """The `rank`-th largest key, and how many keys equal to it are among the `rank` largest."""
    bits = torch.finfo(dtype).bits
    prefix, remaining = 0, rank
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.long)
        for value in values:
            for chunk in torch.split(value.reshape(-1), CHUNK):
                counts += _digit_counts(_key(chunk, dtype), prefix, shift, bits)
        above = counts.flip(0).cumsum(0)
        digit_from_top = int((above >= remaining).nonzero()[0])
        if digit_from_top:
            remaining -= int(above[digit_from_top - 1])
        prefix = (prefix << DIGIT) | (len(counts) - 1 - digit_from_top)
    return prefix, remaining


def _digit_counts(keys: Tensor, prefix: int, shift: int, bits: int) -> Tensor:
    """Histogram of the digit at `shift` of the keys whose higher digits are `prefix`."""
    if shift + DIGIT < bits:
        keys = keys[keys >> (shift + DIGIT) == prefix]
    return torch.bincount((keys >> shift) & ((1 << DIGIT) - 1), minlength=1 << DIGIT).cpu()


def _key(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers in the order of numbers >= 0: their bit pattern."""
    return value.to(dtype).contiguous().view(torch.int64 if dtype == torch.float64 else torch.int32)
