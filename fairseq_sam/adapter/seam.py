"""The seam: ``Trainer.train_step`` is wrapped once, and ``task.train_step`` is a black box that runs once per pass."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.optim import FP16Optimizer
from fairseq.trainer import Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_sam.adapter.optimizers import SharpnessAwareOptimizer, unwrap
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.step import Gradients, SharpnessAwareStep


class Pass(NamedTuple):
    """What a task's ``train_step`` returns."""

    loss: Any
    sample_size: Any
    logging_output: Any


def wrap_trainer() -> None:
    """Wrap ``Trainer.train_step`` and ``Trainer.begin_epoch``, once. Runs without our optimizer are untouched."""
    if getattr(Trainer.train_step, "is_sharpness_aware", False):
        return
    plain_train_step, plain_begin_epoch = Trainer.train_step, Trainer.begin_epoch

    @functools.wraps(plain_train_step)
    def train_step(self: Trainer, samples: Any, raise_oom: bool = False) -> Any:
        optimizer = unwrap(self.optimizer)
        if optimizer is None:
            return plain_train_step(self, samples, raise_oom)
        running = vars(self.task).get("train_step")
        if isinstance(running, SharpnessAwareTrainStep):  # AMP tries the same samples again after an overflow
            running.begin(samples)
            return plain_train_step(self, samples, raise_oom)
        self.task.train_step = SharpnessAwareTrainStep(self, optimizer, samples)
        try:
            return plain_train_step(self, samples, raise_oom)
        finally:
            del self.task.train_step

    @functools.wraps(plain_begin_epoch)
    def begin_epoch(self: Trainer, epoch: int) -> None:
        optimizer = unwrap(self.optimizer)
        if optimizer is not None:
            optimizer.epoch = epoch
        plain_begin_epoch(self, epoch)

    train_step.is_sharpness_aware = True  # type: ignore[attr-defined]
    Trainer.train_step, Trainer.begin_epoch = train_step, begin_epoch


class SharpnessAwareTrainStep:
    """Stands in for ``task.train_step`` while one update runs.

    Args:
        trainer: the trainer.
        optimizer: our optimizer inside the trainer's.
        samples: the update's micro-batches.
    """

    def __init__(self, trainer: Trainer, optimizer: SharpnessAwareOptimizer, samples: Sequence[Any]) -> None:
        self._trainer = trainer
        self._optimizer = optimizer
        self._task_train_step: Callable[..., tuple[Any, Any, Any]] = trainer.task.train_step
        self.begin(samples)

    def begin(self, samples: Sequence[Any]) -> None:
        """Start an update with these micro-batches."""
        self._samples = samples
        self._index = -1
        self._step: SharpnessAwareStep[Any] | None = None
        self._clean: list[Pass] = []

    def __call__(
        self,
        sample: Any,
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **extra: Any,
    ) -> tuple[Any, Any, Any]:
        """Run all passes of one micro-batch; same arguments and result as ``FairseqTask.train_step``.

        Returns:
            The loss and logging output at the unperturbed weights, and the last pass's sample size.
        """
        self._index += 1

        def run_pass(sample: Any = sample, ignore_grad: bool = ignore_grad) -> Pass:
            return Pass(*self._task_train_step(sample, model, criterion, optimizer, update_num, ignore_grad, **extra))

        if not self._optimizer.method.is_active(self._optimizer.epoch, update_num):
            metrics.log_scalar("sam_passes", 1, weight=1, round=2)
            return run_pass()
        if self._optimizer.method.scope == "update":
            return self._share_perturbation(run_pass)
        return run_pass() if ignore_grad else self._perturb_microbatch(run_pass)

    # -- scopes ----------------------------------------------------------------------------------------------------

    def _perturb_microbatch(self, run_pass: Callable[..., Pass]) -> tuple[Any, Any, Any]:
        def run_without_reduction() -> Pass:
            with self._no_sync():
                return run_pass()

        def ascent_gradient(gradients: Gradients, result: Pass) -> tuple[Gradients, float]:
            return gradients, self._unit(float(result.sample_size))

        step: SharpnessAwareStep[Pass] = SharpnessAwareStep(self._optimizer.method, self._space())
        clean = step.ascend(run_without_reduction, ascent_gradient)
        last = step.descend(run_pass, in_backward=self._reduces_in_backward())
        return self._finish(step, clean, last)

    def _share_perturbation(self, run_pass: Callable[..., Pass]) -> tuple[Any, Any, Any]:
        if self._index == 0:
            step: SharpnessAwareStep[Any] = SharpnessAwareStep(self._optimizer.method, self._space())
            self._clean = step.ascend(functools.partial(self._run_all, run_pass), self._reduce)
            self._step = step
        if self._step is None:  # the ascent ran out of memory; fairseq goes on with the next micro-batch
            return run_pass()
        last = self._step.descend(
            run_pass,
            finish=self._index == len(self._samples) - 1,
            shared=True,
            in_backward=self._reduces_in_backward(),
        )
        return self._finish(self._step, self._clean[self._index], last)

    def _run_all(self, run_pass: Callable[..., Pass]) -> list[Pass]:
        """One ascent pass over all micro-batches of the update."""
        results = []
        with self._no_sync():
            for sample in self._samples:
                prepared, is_dummy = self._trainer._prepare_sample(sample)
                result = run_pass(prepared, is_dummy)
                results.append(result._replace(sample_size=0.0) if is_dummy else result)
        return results

    def _reduce(self, gradients: Gradients, results: list[Pass]) -> tuple[Gradients, float]:
        """Sum the ascent gradient and the sample size over workers, in one reduction."""
        sample_size = sum(float(result.sample_size) for result in results)
        trainer = self._trainer
        if trainer.data_parallel_world_size > 1:
            gradients, sample_size = _all_reduce(
                gradients, sample_size, self._space().tensors, trainer.data_parallel_process_group
            )
        return gradients, self._unit(sample_size)

    # -- what fairseq knows ----------------------------------------------------------------------------------------

    def _space(self) -> ParameterSpace:
        modules = {"": self._trainer.get_model(), "criterion": self._trainer.get_criterion()}
        exclude = self._optimizer.method.exclude
        space = ParameterSpace.of(modules, exclude=exclude)
        masters = _master_weights(self._trainer.optimizer, space.tensors)
        return space if masters is None else ParameterSpace.of(modules, exclude=exclude, masters=masters)

    def _unit(self, sample_size: float) -> float:
        """Factor from ``p.grad`` (summed over the sample, times the loss scale) to the method's gradient unit."""
        divisor = (sample_size or 1.0) if self._optimizer.method.gradient == "mean" else 1.0
        return 1.0 / (divisor * _loss_scale(self._trainer.optimizer))

    def _replicas(self) -> list[DistributedDataParallel]:
        found = (_torch_ddp(module) for module in (self._trainer.model, self._trainer.criterion))
        return [replica for replica in found if replica is not None]

    def _reduces_in_backward(self) -> bool:
        return bool(self._replicas())

    def _no_sync(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for replica in self._replicas():
            stack.enter_context(replica.no_sync())
        return stack

    # -- what the user sees ----------------------------------------------------------------------------------------

    def _finish(self, step: SharpnessAwareStep[Any], clean: Pass, last: Pass) -> tuple[Any, Any, Any]:
        measured = step.measured
        self._optimizer.num_ascents += 1 if self._step is None or self._index == 0 else 0
        if self._step is None or self._index == len(self._samples) - 1:
            self._optimizer.num_skipped += measured.num_skipped
        per_sample = 1.0 / ((float(last.sample_size) or 1.0) * math.log(2))
        logged = {
            "sam_gnorm": (measured.gradient_norm, 4),
            "sam_eps": (measured.perturbation_norm, 8),
            "sam_sharp": ((_value(last.loss) - _value(clean.loss)) * per_sample, 5),
            "sam_passes": (self._optimizer.method.passes, 2),
            "sam_capped": (measured.num_capped, 2),
        }
        for key, (value, digits) in logged.items():
            metrics.log_scalar(key, _value(value), weight=1, round=digits)
        metrics.log_scalar("sam_skipped", self._optimizer.num_skipped, weight=0)
        return clean.loss, last.sample_size, clean.logging_output


def _value(number: Any) -> float:
    return float(number.detach()) if isinstance(number, Tensor) else float(number)


def _torch_ddp(module: nn.Module) -> DistributedDataParallel | None:
    """Find torch's DDP inside fairseq's proxies."""
    candidate: Any = module
    while isinstance(candidate, nn.Module):
        if isinstance(candidate, DistributedDataParallel):
            return candidate
        candidate = vars(candidate).get("_modules", {}).get("module")
    return None


def _wrappers(optimizer: Any) -> list[Any]:
    """The trainer's optimizer and those inside it, outermost first."""
    chain = []
    while optimizer is not None:
        chain.append(optimizer)
        inner = (vars(optimizer).get(name) for name in ("fp32_optimizer", "wrapped_optimizer", "_optimizer"))
        optimizer = next((candidate for candidate in inner if candidate is not None), None)
    return chain


def _loss_scale(optimizer: Any) -> float:
    """By what ``optimizer.backward`` multiplies the loss."""
    for wrapper in _wrappers(optimizer):
        scaler = vars(wrapper).get("scaler", vars(wrapper).get("_grad_scaler"))
        if scaler is not None:
            return float(scaler.get_scale() if hasattr(scaler, "get_scale") else scaler.loss_scale)
    return 1.0


def _master_weights(optimizer: Any, tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """fp32 masters of half-precision parameters, in their order and shapes; None where there are none."""
    holder = next((wrapper for wrapper in _wrappers(optimizer) if isinstance(wrapper, FP16Optimizer)), None)
    if holder is None:
        return None
    if not holder.has_flat_params:
        by_parameter = {id(p): p32 for p, p32 in zip(holder.fp16_params, holder.fp32_params, strict=True)}
        return [by_parameter[id(tensor)].data for tensor in tensors]
    views: dict[int, Tensor] = {}
    for device, flat in holder.fp32_params.items():
        offset = 0
        for p in holder.fp16_params:
            if len(holder.fp32_params) == 1 or p.device.index == device:
                views[id(p)] = flat.data[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
    return [views[id(tensor)] for tensor in tensors]


def _all_reduce(
    gradients: Gradients, sample_size: float, tensors: Sequence[Tensor], group: Any
) -> tuple[Gradients, float]:
    """Sum gradients, which of them exist, and the sample size over workers."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
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
