"""Tensors that are moved together."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from fairseq_sam.core.vectors import Factor

# On a GPU starting work takes longer than adding up a small tensor; on a processor what is in its caches counts.
BUCKET = 2**26
CACHED = 2**18  # bytes that a processor moves while they are in its cache
CACHES = ("cpu",)

# A parameter's number, a tensor and a factor whose product is added to it.
Part = tuple[int, Tensor, Factor | None]


def at_once(tensor: Tensor) -> bool:
    """Whether a bucket is moved by one call, where starting work is what takes time."""
    return tensor.device.type not in CACHES


def bucketed(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Put parts together that one call may move: as many as have ``BUCKET`` bytes, on a processor few."""
    bucket: list[Part] = []
    size = 0
    for part in parts:
        _, value, _ = part
        bucket.append(part)
        size += value.numel() * value.element_size()
        if size >= (BUCKET if at_once(value) else CACHED):
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
