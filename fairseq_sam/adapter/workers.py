"""Several workers: what is reduced, by whom and when; torch's DistributedDataParallel, fairscale's SlowMo."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_sam.core.fisher import SquaredGradients
from fairseq_sam.core.method import Method
from fairseq_sam.core.tensors import Gradients, wide_dtype


class Workers:
    """The workers of a run, as one of them sees the others.

    Args:
        trainer: the trainer.
        method: the method.
        tensors: the trained parameters.
    """

    def __init__(self, trainer: Any, method: Method, tensors: Sequence[nn.Parameter]) -> None:
        self._trainer = trainer
        self._method = method
        self._tensors = tensors

    @property
    def number(self) -> int:
        """How many workers have the same weights; 1 where each has its own and they are averaged now and then."""
        cfg = self._trainer.cfg
        apart = cfg.optimization.use_bmuf or cfg.distributed_training.ddp_backend == "slowmo"
        return 1 if apart else self.number_of_all

    @property
    def number_of_all(self) -> int:
        """How many workers there are, also where each has weights of its own."""
        return int(self._trainer.data_parallel_world_size)

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        return int(self._trainer.data_parallel_rank)

    @property
    def reduces_in_backward(self) -> bool:
        """Whether torch's DDP reduces gradients in the last backward pass."""
        return bool(self._replicas()) and not self._reduces_after_pass()

    @property
    def synchronises_last_pass(self) -> bool:
        """Whether the wrapper is to reduce in the last pass as in plain training, unless we do it after it."""
        return not (self._reduces_after_pass() or self._slowmos())

    def _reduces_after_pass(self) -> bool:
        """Whether gradients of torch's DDP are reduced by us, once an update's last micro-batch is through.

        Needed where the whole gradient is combined first; and with ``--find-unused-parameters``, since DDP takes a
        parameter as used in its reduction that only an earlier pass without one has used (LayerDrop).
        """
        return self._method.combines_whole_gradient or any(r.find_unused_parameters for r in self._replicas())

    def no_sync(self) -> AbstractContextManager[Any]:
        """Let backward passes reduce nothing."""
        stack = ExitStack()
        for replica in self._replicas():
            stack.enter_context(replica.no_sync())
        for wrapper in self._slowmos():
            stack.enter_context(without_reduction(wrapper))
        return stack

    def reduce_after_pass(self) -> None:
        """Average ``p.grad`` where neither torch's DDP nor SlowMo has done it in the pass."""
        if self._reduces_after_pass() and any(r.require_backward_grad_sync for r in self._replicas()):
            self._average_gradients(self._group, self.number)
        for wrapper in self._slowmos():
            self._average_gradients(wrapper.local_node_group, wrapper.nprocs_per_node)

    def sum(self, gradients: Gradients) -> Gradients:
        """Sum a gradient over workers."""
        return self.sum_with(gradients, 0.0)[0]

    def sum_with(self, gradients: Gradients, number: float) -> tuple[Gradients, float]:
        """Sum a gradient and a number over workers, in one reduction."""
        if self.number == 1:
            return gradients, number
        return all_reduce(gradients, number, self._tensors, self._group)

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Sum numbers over all workers, also those that have weights of their own."""
        if self.number_of_all == 1:
            return list(numbers)
        summed = torch.tensor(numbers, device=self._tensors[0].device)
        distributed_utils.all_reduce(summed, group=self._group)
        return [float(number) for number in summed.tolist()]

    def sum_squares(self, squares: SquaredGradients) -> SquaredGradients:
        """Sum squared gradients over workers, in place."""
        if self.number == 1:
            return squares
        number = torch.tensor([float(squares.num_instances)], device=self._tensors[0].device)
        for tensor in (number, *squares.sums):
            distributed_utils.all_reduce(tensor, group=self._group)
        return SquaredGradients(squares.sums, int(number))

    def share_of(self, wanted: int, available: int) -> int:
        """How many of the wanted instances this worker gives: equal shares, then what is left in order."""
        if self.number == 1:
            return min(wanted, available)
        counts = torch.zeros(self.number, device=self._tensors[0].device)
        counts[self.rank] = available
        distributed_utils.all_reduce(counts, group=self._group)
        limits = [int(count) for count in counts.tolist()]
        shares = [min(limit, wanted // self.number) for limit in limits]
        for worker, limit in enumerate(limits):
            shares[worker] += min(limit - shares[worker], wanted - sum(shares))
        return shares[self.rank]

    @property
    def _group(self) -> Any:
        return self._trainer.data_parallel_process_group

    def _average_gradients(self, group: Any, number: int) -> None:
        gradients, _ = all_reduce([tensor.grad for tensor in self._tensors], 0.0, self._tensors, group)
        for tensor, gradient in zip(self._tensors, gradients, strict=True):
            tensor.grad = None if gradient is None else (gradient / number).to(tensor.dtype)

    def _replicas(self) -> list[DistributedDataParallel]:
        found = (torch_ddp(module) for module in (self._trainer.model, self._trainer.criterion))
        return [replica for replica in found if replica is not None]

    def _slowmos(self) -> list[Any]:
        found = (slowmo(module) for module in (self._trainer.model, self._trainer.criterion))
        return [wrapper for wrapper in found if wrapper is not None]


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


def all_reduce(
    gradients: Gradients, sample_size: float, tensors: Sequence[Tensor], group: Any
) -> tuple[Gradients, float]:
    """Sum gradients, which of them exist, and the sample size over workers."""
    dtype = wide_dtype(*(tensor.dtype for tensor in tensors))
    device = tensors[0].device
    header = torch.tensor([sample_size, *(float(g is not None) for g in gradients)], device=device, dtype=dtype)
    parts = [
        torch.zeros(t.numel(), device=device, dtype=dtype) if g is None else g.detach().to(dtype).reshape(-1)
        for g, t in zip(gradients, tensors, strict=True)
    ]
    joined = torch.cat([header, *parts])
    distributed_utils.all_reduce(joined, group=group)
    header, flat = joined[: len(header)], joined[len(header) :]
    split = torch.split(flat, [t.numel() for t in tensors])
    present = (header[1:] > 0).tolist()
    summed: Gradients = [part.view_as(t) if has else None for part, t, has in zip(split, tensors, present, strict=True)]
    return summed, float(header[0])
