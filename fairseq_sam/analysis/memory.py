"""How much memory is free, so that what needs more is refused before it begins."""

import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")


def check_memory(needed: int, device: torch.device, what: str, advice: str) -> None:
    """Refuse what needs more memory than is free; where that is not known, nothing is refused.

    Args:
        needed: bytes.
        device: where.
        what: needs them.
        advice: what needs less.

    Raises:
        ValueError: with both numbers in GiB.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{what} needs about {needed / 2**30:.3g} GiB of memory ({device}), but {free / 2**30:.3g} GiB are free; "
            f"{advice}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated."""
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes can be allocated on a device; None if that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
