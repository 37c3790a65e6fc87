"""fairseq's micro-batches as the engine's batches: ``task.train_step`` is a black box that runs once per pass."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from fairseq.optim import AMPOptimizer
from torch import Tensor

from fairseq_sam.adapter.instance_losses import Captured, capture_output, check_sum, instance_losses
from fairseq_sam.adapter.slicing import COUNTS, Slicer
from fairseq_sam.analysis.memory import is_out_of_memory
from fairseq_sam.core.batch import Weigh

logger = logging.getLogger(__name__)

Ran = TypeVar("Ran")
LOGGED_COUNTS = (*COUNTS, "sample_size")


class Pass(NamedTuple):
    """What a task's ``train_step`` returns."""

    loss: Any
    sample_size: Any
    logging_output: Any


class Call(NamedTuple):
    """How ``task.train_step`` is called in the running update.

    Attributes:
        train_step: the task's own method.
        model: the model as the trainer passes it, possibly wrapped.
        criterion: the criterion.
        optimizer: the trainer's optimizer, possibly a wrapper of ours.
        update_num: number of updates done so far.
        extra: further keyword arguments.
        slicer: cuts samples of the task.
        no_sync: makes a context in which torch's DDP does not reduce gradients.
    """

    train_step: Callable[..., tuple[Any, Any, Any]]
    model: Any
    criterion: Any
    optimizer: Any
    update_num: int
    extra: Mapping[str, Any]
    slicer: Slicer
    no_sync: Callable[[], AbstractContextManager[Any]]


class MicroBatch:
    """A sample of fairseq.

    Args:
        call: how the task is called.
        sample: what the data loader gave, on its device.
        is_dummy: stands in for a missing sample of this worker; gives no gradient.
        synchronises: backward passes reduce gradients over workers as torch's DDP does.
    """

    def __init__(self, call: Call, sample: Any, is_dummy: bool = False, synchronises: bool = False) -> None:
        self._call = call
        self._sample = sample
        self._is_dummy = is_dummy
        self._synchronises = synchronises

    def __len__(self) -> int:
        """Return the number of instances.

        Raises:
            UnsliceableBatchError: if they cannot be told apart.
        """
        return self._call.slicer.num_instances(self._sample)

    @property
    def is_dummy(self) -> bool:
        """Whether the batch stands in for a missing one."""
        return self._is_dummy

    def loud(self) -> "MicroBatch":
        """Return the same batch, whose backward passes reduce gradients over workers."""
        return MicroBatch(self._call, self._sample, self._is_dummy, synchronises=True)

    def select(self, indices: Sequence[int]) -> "MicroBatch":
        """Return a batch of some instances, with its counts.

        Raises:
            UnsliceableBatchError: if they cannot be told apart.
        """
        sample = self._call.slicer.select(self._sample, list(indices))
        return MicroBatch(self._call, sample, self._is_dummy, self._synchronises)

    def run(self) -> Pass:
        """Run forward and backward."""
        call = self._call
        with nullcontext() if self._synchronises else call.no_sync():
            arguments = (self._sample, call.model, call.criterion, call.optimizer, call.update_num, self._is_dummy)
            result = Pass(*call.train_step(*arguments, **call.extra))
        return result._replace(sample_size=result.sample_size * 0) if self._is_dummy else result

    def run_with_losses(self) -> tuple[Pass, Tensor]:
        """Run forward and backward; return the losses of the instances as well."""
        found: list[Tensor] = []

        def backward_from(loss: Tensor, captured: Captured) -> Tensor:
            with torch.no_grad():  # a task may run backward from parts of the loss: it is compared below
                found[:] = [self._losses(captured, loss, compares=False)]
            return loss

        result = self._run_from(backward_from)
        if not self._is_dummy:
            check_sum(self._call.criterion, found[0], result.loss)
        return result, found[0]

    def run_weighted(self, weigh: Weigh, *numbers: Tensor) -> tuple[Pass, Tensor]:
        """Run forward, and backward of the weighted sum of the instances' losses; return these as well."""
        found: list[Tensor] = []

        def backward_from(loss: Tensor, captured: Captured) -> Tensor:
            losses = self._losses(captured, loss)
            found[:] = [losses.detach()]
            total = (weigh(found[0], *numbers).to(losses.device, losses.dtype) * losses).sum()
            if not loss._is_view():
                loss.detach_()  # what its own graph has saved is as large as the output
            return total * 0.0 if self._is_dummy else total

        result = self._run_from(backward_from)
        return result._replace(loss=result.loss.detach()), found[0]

    def _run_from(self, backward_from: Callable[[Tensor, Captured], Tensor]) -> Pass:
        """Run forward, and backward from what a function makes of the loss and the captured output."""
        plain_backward = self._call.optimizer.backward
        with capture_output(self._call.criterion, self._call.model) as captured:

            def backward(loss: Tensor) -> None:
                chosen = backward_from(loss, captured)
                captured.release()
                plain_backward(chosen)

            with _shadowed(self._call.optimizer, backward):
                return self.run()

    def losses(self) -> Tensor:
        """Run forward without gradient; return the losses of the instances."""
        with (
            torch.no_grad(),
            self._call.no_sync(),
            capture_output(self._call.criterion, self._call.model) as captured,
            _shadowed(self._call.optimizer, lambda loss: None),
        ):
            result = self._quiet().run()
            return self._losses(captured, result.loss)

    def _quiet(self) -> "MicroBatch":
        return MicroBatch(self._call, self._sample, self._is_dummy) if self._synchronises else self

    def _losses(self, captured: Captured, loss: Any, compares: bool = True) -> Tensor:
        call = self._call
        device = "cuda" if torch.is_tensor(loss) and loss.is_cuda else "cpu"
        with torch.autocast(device, enabled=isinstance(call.optimizer, AMPOptimizer) and device == "cuda"):
            # A dummy's loss is multiplied by 0 on its way, so there is nothing to compare with.
            expected = loss if compares and not self._is_dummy else None
            return instance_losses(call.criterion, call.model, captured, self._sample, len(self), expected)


class Passes(NamedTuple):
    """What a pass over all micro-batches of an update returns.

    Attributes:
        results: result of each micro-batch, by its place in the update.
        sample_size: their sum; that of a dummy is 0.
    """

    results: dict[int, Pass]
    sample_size: float


class UpdateBatch:
    """All micro-batches of an update as one batch.

    Args:
        parts: micro-batches, by place in the update.
        spares_memory: go on without a micro-batch that does not fit into memory; what it has added to ``p.grad`` by
            then stays.
    """

    def __init__(self, parts: Mapping[int, MicroBatch], spares_memory: bool = False) -> None:
        self._parts = dict(parts)
        self._spares_memory = spares_memory

    def __len__(self) -> int:
        """Return the number of instances."""
        return sum(len(part) for part in self._parts.values())

    def run(self) -> Passes:
        """Run forward and backward of every micro-batch."""
        return self._collect(self._of_each(lambda place, part: part.run()))

    def run_with_losses(self) -> tuple[Passes, Tensor]:
        """Run forward and backward; return the losses of the instances as well."""
        return self._with_losses(lambda place, part: part.run_with_losses())

    def run_weighted(self, weigh: Weigh, *numbers: Tensor) -> tuple[Passes, Tensor]:
        """Run forward, and backward of the weighted sum of the instances' losses; return these as well."""
        sizes = [len(part) for part in self._parts.values()]
        shares = dict(zip(self._parts, zip(*(torch.split(each, sizes) for each in numbers), strict=True), strict=True))
        return self._with_losses(lambda place, part: part.run_weighted(weigh, *shares[place]))

    def losses(self) -> Tensor:
        """Run forward without gradient; return the losses of the instances."""
        return self._joined_losses(self._of_each(lambda place, part: part.losses()))

    def select(self, indices: Sequence[int]) -> "UpdateBatch":
        """Return a batch of some instances, in the order of the micro-batches."""
        chosen, start, parts = sorted(indices), 0, {}
        for place, part in self._parts.items():
            rows = [i - start for i in chosen if start <= i < start + len(part)]
            if rows:
                parts[place] = part.select(rows)
            start += len(part)
        return UpdateBatch(parts, self._spares_memory)

    def _of_each(self, run: Callable[[int, MicroBatch], Ran]) -> dict[int, Ran]:
        results = {}
        for place, part in self._parts.items():
            try:
                results[place] = run(place, part)
            except RuntimeError as error:
                if not self._spares_memory or not is_out_of_memory(error):
                    raise
                logger.warning("the ascent goes on without a micro-batch that did not fit into memory: %s", error)
        return results

    def _with_losses(self, run: Callable[[int, MicroBatch], tuple[Pass, Tensor]]) -> tuple[Passes, Tensor]:
        pairs = self._of_each(run)
        results = {place: result for place, (result, _) in pairs.items()}
        return self._collect(results), self._joined_losses({place: losses for place, (_, losses) in pairs.items()})

    def _joined_losses(self, losses: Mapping[int, Tensor]) -> Tensor:
        """One after the other; NaN for a micro-batch without."""
        like = next(iter(losses.values()), torch.zeros(()))
        missing = {place: like.new_full((len(part),), torch.nan) for place, part in self._parts.items()}
        return torch.cat([losses.get(place, missing[place]) for place in self._parts])

    def _collect(self, results: dict[int, Pass]) -> Passes:
        return Passes(results, sum(float(result.sample_size) for result in results.values()))


def summed_loss(result: Pass | Passes) -> float:
    """Return the sum of the losses of a pass over a micro-batch or an update; 0 of a dummy."""
    passes = list(result.results.values()) if isinstance(result, Passes) else [result]
    return sum(float(torch.as_tensor(each.loss).detach()) for each in passes if float(each.sample_size))


def without_counts(result: Pass) -> Pass:
    """Return a result that adds nothing to any sum."""
    output = {key: _scaled(value, 0) for key, value in result.logging_output.items()}
    return Pass(result.loss * 0, result.sample_size * 0, output)


def joined(results: Sequence[Pass]) -> Pass:
    """Join the results of the parts of a micro-batch into that of the whole."""
    if len(results) == 1:
        return results[0]
    loss = sum(result.loss for result in results)
    sample_size = sum(result.sample_size for result in results)
    outputs = [result.logging_output for result in results]
    return Pass(loss, sample_size, {key: _joined_values([output[key] for output in outputs]) for key in outputs[0]})


def resized(part: Pass, whole: Pass) -> Pass:
    """Bring the result of a part of a micro-batch to the size of the whole: its counts, and sums in proportion.

    Args:
        part: a pass over some of the instances.
        whole: a pass over all of them; gives the counts only.
    """
    ratio = float(whole.sample_size) / (float(part.sample_size) or 1.0)
    if ratio == 1.0:
        return part
    output = {
        key: whole.logging_output[key]
        if key in LOGGED_COUNTS and key in whole.logging_output
        else _scaled(value, ratio)
        for key, value in part.logging_output.items()
    }
    return Pass(part.loss * ratio, whole.sample_size, output)


def _scaled(value: Any, ratio: float) -> Any:
    """A number times the ratio; anything else as it is."""
    is_sum = not isinstance(value, bool | str | list | tuple) and value is not None and math.prod(np.shape(value)) == 1
    return value * ratio if is_sum else value


def _joined_values(values: Sequence[Any]) -> Any:
    """Counts and sums add up, predictions are strung together; anything else is that of the first part."""
    first = values[0]
    if isinstance(first, bool | str) or first is None:
        return first
    if isinstance(first, list | tuple):
        return [value for part in values for value in part]
    if all(math.prod(np.shape(value)) == 1 for value in values):  # also the adaptive loss, a tensor of shape (1,)
        return sum(values)
    return torch.cat(list(values)) if torch.is_tensor(first) else np.concatenate(values)


@contextmanager
def _shadowed(optimizer: Any, backward: Callable[[Tensor], None]) -> Iterator[None]:
    """Let ``optimizer.backward`` be another function; on the instance, so that its class stays what it is."""
    try:
        optimizer.backward = backward
        yield
    finally:
        vars(optimizer).pop("backward", None)
