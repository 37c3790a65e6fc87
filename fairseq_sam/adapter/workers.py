"""torch's DistributedDataParallel inside fairseq's wrappers."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def torch_ddp(module: nn.Module) -> DistributedDataParallel | None:
    """Find torch's DDP inside fairseq's proxies."""
    candidate: Any = module
    while isinstance(candidate, nn.Module):
        if isinstance(candidate, DistributedDataParallel):
            return candidate
        candidate = vars(candidate).get("_modules", {}).get("module")
    return None
