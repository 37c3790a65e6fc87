"""What wraps a model for several workers: torch's DistributedDataParallel, fairscale's SlowMo."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def torch_ddp(module: nn.Module) -> DistributedDataParallel | None:
    """Find torch's DDP inside fairseq's proxies."""
    found = (part for part in _wrappers(module) if isinstance(part, DistributedDataParallel))
    return next(found, None)


def slowmo(module: nn.Module) -> Any:
    """Find fairscale's SlowMo inside fairseq's proxies; None if there is none, or it reduces nothing in backward.

    It averages gradients over the workers of a node at the end of every backward pass, and weights over all workers
    now and then, after an update.
    """
    found = (part for part in _wrappers(module) if type(part).__name__ == "SlowMoDistributedDataParallel")
    wrapper = next(found, None)
    return wrapper if getattr(wrapper, "local_node_group", None) is not None else None


@contextmanager
def without_reduction(wrapper: Any) -> Iterator[None]:
    """Let SlowMo's backward passes leave gradients alone, as ``no_sync`` does for torch's DDP."""
    group = wrapper.local_node_group
    try:
        wrapper.local_node_group = None
        yield
    finally:
        wrapper.local_node_group = group


def _wrappers(module: nn.Module) -> Iterator[nn.Module]:
    candidate: Any = module
    while isinstance(candidate, nn.Module):
        yield candidate
        candidate = vars(candidate).get("_modules", {}).get("module")
