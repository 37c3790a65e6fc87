"""The seam: ``Trainer.train_step`` is wrapped once, and ``task.train_step`` is a black box that runs once per pass."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.modules import SinusoidalPositionalEmbedding
from fairseq.optim import FP16Optimizer
from fairseq.trainer import Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fairseq_sam.adapter.batches import (
    Call,
    MicroBatch,
    Pass,
    Passes,
    UpdateBatch,
    joined,
    resized,
    summed_loss,
    without_counts,
)
from fairseq_sam.adapter.embeddings import word_embeddings
from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.optimizers import SharpnessAwareOptimizer, peak_learning_rate, unwrap
from fairseq_sam.adapter.radius import search, settings_of
from fairseq_sam.adapter.slicing import Slicer
from fairseq_sam.adapter.workers import slowmo, torch_ddp, without_reduction
from fairseq_sam.analysis.epsilon import Probe, Rises, loss_rise, probe_of, with_epsilon
from fairseq_sam.analysis.memory import is_out_of_memory
from fairseq_sam.core.descent import local
from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.fisher import SquaredGradients, squared_gradients
from fairseq_sam.core.measurements import Measurements
from fairseq_sam.core.passes import fisher_information, reuse, run_apart, split
from fairseq_sam.core.space import TABLES, ParameterSpace
from fairseq_sam.core.step import SharpnessAwareStep
from fairseq_sam.core.tensors import Gradients, add_all, wide_dtype
from fairseq_sam.core.undo import all_or_nothing

logger = logging.getLogger(__name__)

TABLES.add(SinusoidalPositionalEmbedding)
LEAST_SURVIVED = 0.5  # of a perturbation, in half precision; below it the user is warned


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
        is_retry = bool(vars(self).get("_amp_retries"))  # AMP tries the same samples again after an overflow
        if is_retry and isinstance(running, SharpnessAwareTrainStep):
            optimizer.undo_update(counts=False)
            running.begin(samples)
            return plain_train_step(self, samples, raise_oom)
        optimizer.begin_update()
        try:
            vars(self.task).pop("train_step", None)  # what an interrupt may have left
            update = SharpnessAwareTrainStep(self, optimizer, samples, raise_oom)
            self.task.train_step = update
            result = plain_train_step(self, samples, raise_oom)
            update.log()
            optimizer.end_update()
            return result
        except BaseException:
            optimizer.undo_update()
            raise
        finally:
            left = vars(self.task).pop("train_step", None)
            if isinstance(left, SharpnessAwareTrainStep):
                left.release()

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
        raise_oom: an error for lack of memory is the caller's.
    """

    def __init__(
        self, trainer: Trainer, optimizer: SharpnessAwareOptimizer, samples: Sequence[Any], raise_oom: bool = False
    ) -> None:
        self._trainer = trainer
        self._raise_oom = raise_oom
        self._optimizer = optimizer
        self._task_train_step: Callable[..., tuple[Any, Any, Any]] = trainer.task.train_step
        self._slicer = Slicer(trainer.task)
        self.begin(samples)

    def begin(self, samples: Sequence[Any]) -> None:
        """Start an update with these micro-batches."""
        self._samples = samples
        self._index = -1
        peak = peak_learning_rate(self._trainer.cfg)
        self._method = self._optimizer.method.with_peak(peak).at(self._trainer.get_lr())
        self._searches = self._optimizer.searches_radius
        self._search_passes = 0.0  # of the search for the radius in this update
        self._step: SharpnessAwareStep[Any] | None = None
        self._clean: Passes | None = None
        self._prepared: list[tuple[Any, bool]] | None = None
        self._offset = 0
        self._collected = 0.0  # share of the update's instances that the Fisher mask was made from
        self._unread: list[dict[str, tuple[Any, int]]] = []  # what is logged of each micro-batch, with its digits

    def release(self) -> None:
        """Let go of the weights' memory: while something else has it, the next update copies them instead."""
        self._step = self._clean = None

    def log(self) -> None:
        """Log what was measured in the update; fairseq has waited for its end by now."""
        if not self._unread:
            return
        with metrics.aggregate("train"):  # where fairseq logs an update
            for logged in self._unread:
                for key, (value, digits) in logged.items():
                    metrics.log_scalar(key, _value(value), weight=1, round=digits)
                if "sam_survived" in logged:
                    self._warn_of_rounding(_value(logged["sam_survived"][0]))
            self._log_skipped()
        self._unread = []

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
        try:
            self._index += 1
            self._call = Call(
                self._task_train_step, model, criterion, optimizer, update_num, extra, self._slicer, self._no_sync
            )
            batch = MicroBatch(self._call, sample, ignore_grad)
            gradients = [tensor.grad for tensor in self._space.tensors] if self._num_workers() > 1 else []
            with all_or_nothing(self._space.tensors, self._space.buffers):
                try:
                    return self._run(batch)
                except RuntimeError as error:
                    if self._raise_oom or self._num_workers() == 1 or not is_out_of_memory(error):
                        raise
                    self._space.put_gradients(gradients)
                    return self._skip(error)
        except BaseException:  # fairseq drops the update for lack of memory, or writes crash.pt
            self._optimizer.undo_update()
            raise

    def _run(self, batch: MicroBatch) -> Pass:
        update_num = self._call.update_num
        if self._index >= len(self._samples):  # fairseq looks for the module in which a NaN came up
            return batch.run()
        if self._searches and self._index == 0:
            self._search(update_num)
        if not self._is_active():
            return self._step_between(batch, update_num)
        if self._index == 0:
            self._optimizer.memory.component = None  # that of this update is the sum over its micro-batches
            self._refresh_mask(update_num)
        if self._method.scope == "update":
            return self._share_perturbation(batch)
        if batch.is_dummy:
            return self._reduced(self._last(batch).run())
        return self._perturb_microbatch(batch)

    def _is_active(self) -> bool:
        """Whether this update is sharpness-aware; those in which its radius is searched for are not."""
        return not self._searches and self._method.is_active(self._optimizer.epoch, self._call.update_num)

    def _skip(self, error: RuntimeError) -> Pass:
        """Run a dummy batch in place of a micro-batch that did not fit into memory, so that all workers go on together.

        fairseq clears the gradients of this worker alone, in this micro-batch and all later ones of the update; under
        torch's DDP they are reduced by then, and the replicas go apart.
        """
        self._trainer._log_oom(error)
        logger.warning("update %d goes on without micro-batch %d of this worker", self._call.update_num, self._index)
        if self._trainer.cuda:
            torch.cuda.empty_cache()
        sample, _ = self._trainer._prepare_sample(self._trainer._dummy_batch, is_dummy=True)
        try:
            return without_counts(self._run_again(MicroBatch(self._call, sample, is_dummy=True)))
        except RuntimeError as again:
            raise self._lost_step(again) from error

    def _lost_step(self, error: RuntimeError) -> RuntimeError:
        """An error that fairseq does not recover from: the other workers wait for what this one cannot give."""
        reason = str(error).replace("out of memory", "no memory left").splitlines()[0]
        return RuntimeError(
            f"update {self._call.update_num}: worker {self._trainer.data_parallel_rank} ran short of memory where the "
            f"others wait for it ({reason}); resume from the last checkpoint with smaller batches (--max-tokens)"
        )

    def _run_again(self, batch: MicroBatch) -> Pass:
        if self._is_active() and self._method.scope == "update":
            return self._share_perturbation(batch, is_retry=True)
        if self._is_active():
            return self._reduced(self._last(batch).run())
        return self._step_between(batch, self._call.update_num)

    # -- updates ---------------------------------------------------------------------------------------------------

    def _step_between(self, batch: MicroBatch, update_num: int) -> Pass:
        """A plain step, or one with the sharpness component of the last sharpness-aware update."""
        metrics.log_scalar("sam_passes", 1 + self._search_passes, weight=1, round=2)
        if self._optimizer.logged:  # of weight 0: a log line of plain updates alone shows numbers and not None
            self._unread.append({})
            for key in self._optimizer.logged:
                metrics.log_scalar(key, 0.0, weight=0)
        memory, method = self._optimizer.memory, self._method
        if not memory.component or method.has_ended(self._optimizer.epoch, update_num):
            return self._reduced(self._plain(batch))
        if batch.is_dummy and method.scope == "microbatch":
            return self._reduced(batch.run())
        shared = method.scope == "update"
        workers = (self._sum, self._num_workers()) if shared else (local, 1)
        finish = self._is_last_microbatch()
        result = reuse(
            method, self._space, memory, batch, finish=finish, shared=shared, reduce=workers[0], num_workers=workers[1]
        )
        return self._reduced(result)

    def _plain(self, batch: MicroBatch) -> Pass:
        """A pass of plain training. After an error the gradients of earlier micro-batches are as they were."""
        if self._reduces_in_backward():  # torch's DDP reduces what they have added up
            return self._last(batch).run()
        result, prior, gradients = run_apart(self._space, self._last(batch))
        self._space.put_gradients(add_all(prior, gradients, overwrite=True))
        return result

    def _perturb_microbatch(self, batch: MicroBatch) -> Pass:
        def ascent_gradient(gradients: Gradients, result: Pass) -> tuple[Gradients, float]:
            return gradients, self._unit(result)

        step = self._new_step(str(self._trainer.data_parallel_rank))
        parts = split(self._method, batch)
        clean, last, measured = [], [], Measurements()
        for number, (part, share) in enumerate(parts):
            is_last = number == len(parts) - 1
            first = step.ascend(part, ascent_gradient)
            final = self._last(cast(MicroBatch, part)) if is_last else part
            last.append(step.descend(final, in_backward=is_last and self._reduces_in_backward()))
            clean.append(last[-1] if first is None else first)
            measured.add(step.measured, share)
        self._optimizer.num_ascents += 1
        self._optimizer.num_skipped = self._optimizer.num_skipped + measured.num_skipped
        return self._reduced(self._finish(measured, joined(clean), joined(last)))

    def _share_perturbation(self, batch: MicroBatch, is_retry: bool = False) -> Pass:
        if self._index == 0 and not is_retry:
            step = self._new_step("")
            parts = self._microbatches()
            real = {place: part for place, part in parts.items() if not part.is_dummy}
            spares = self._num_workers() > 1 and not self._raise_oom
            try:
                self._clean = step.ascend(UpdateBatch(real or parts, spares_memory=spares), self._reduced_ascent)
            except RuntimeError as error:  # not of a pass: those are spared
                if spares and is_out_of_memory(error):
                    raise self._lost_step(error) from error
                raise
            self._step = step
            self._optimizer.num_ascents += 1
        if self._step is None:  # the ascent ran out of memory; fairseq goes on with the next micro-batch
            return self._reduced(self._last(batch).run())
        finish = self._is_last_microbatch()
        last = self._step.descend(
            self._last(batch),
            finish=finish,
            shared=True,
            in_backward=self._reduces_in_backward(),
            reduce=self._sum,
            offset=None if batch.is_dummy else self._offset,
        )
        self._offset += len(batch) if self._method.selects and not batch.is_dummy else 0
        if finish:
            self._optimizer.num_skipped = self._optimizer.num_skipped + self._step.measured.num_skipped
        return self._reduced(self._finish(self._step.measured, self._clean_result(last), last))

    def _clean_result(self, last: Pass) -> Pass:
        """What a shared ascent's first pass returned of the micro-batch, or of the part of the update that it saw."""
        if self._clean is None or not self._clean.results:
            return last
        if self._method.ascent_fraction < 1:
            return joined(list(self._clean.results.values()))
        return self._clean.results.get(self._index, last)

    def _refresh_mask(self, update_num: int) -> None:
        """Collect single instances for the Fisher mask from the micro-batches of all workers."""
        memory = self._optimizer.memory
        wanted = memory.instances_wanted(self._method, self._space, update_num)
        if not wanted:
            return
        real = {place: part for place, part in self._microbatches().items() if not part.is_dummy}
        batch = UpdateBatch(real)
        number = self._own_share(wanted, len(batch))
        unit, salt = 1.0 / _loss_scale(self._trainer.optimizer), f"{self._trainer.data_parallel_rank}.{update_num}"
        squares = self._local_information(batch, number, unit, salt)
        self._collected = number / max(len(batch), 1)
        if self._num_workers() > 1:
            squares = self._summed_squares(squares)
        if update_num == 0 or not memory.mask:
            logger.info("Fisher mask: from %d of %d instances so far", squares.num_instances, wanted)
        memory.add_squares(self._method, self._space, squares)

    def _local_information(self, batch: UpdateBatch, number: int, unit: float, salt: str) -> SquaredGradients:
        """What this worker gives to the Fisher mask; nothing if its instances do not fit into memory."""
        try:
            return fisher_information(self._space, batch, number, unit, salt)
        except RuntimeError as error:
            if self._raise_oom or self._num_workers() == 1 or not is_out_of_memory(error):
                raise
            self._trainer._log_oom(error)
            return squared_gradients((), self._space, unit)

    def _search(self, update_num: int) -> None:
        """Measure the radius on this update's micro-batches, those of all workers together, if it is due."""
        if self._method.has_ended(self._optimizer.epoch, update_num) and not self._optimizer.has_warned_of_search:
            self._optimizer.has_warned_of_search = True
            logger.warning(
                "--sam-epsilon auto: the last sharpness-aware update (--sam-end-epoch, --sam-end-update) came before "
                "the radius was found, so that none was; let it end later, or give a number for --sam-epsilon"
            )
        if not self._method.is_active(self._optimizer.epoch, update_num):
            return
        self._refresh_mask(update_num)
        try:
            settings = settings_of(self._optimizer.method, float(self._optimizer.rise or 0.0))
            probes = search(self._optimizer.memory, self._probe(), settings)
            self._search_passes = probes * (1.0 + with_epsilon(self._method, 1.0).passes)
        except RuntimeError as error:
            if self._raise_oom or not is_out_of_memory(error) or self._trainer.data_parallel_world_size == 1:
                raise
            raise self._lost_step(error) from error

    def _probe(self) -> Probe:
        parts = self._microbatches()
        real = {place: part for place, part in parts.items() if not part.is_dummy}
        shared = self._method.scope == "update"
        batches: list[Any] = [UpdateBatch(real or parts)] if shared else list(real.values())

        def ascent_gradient(gradients: Gradients, result: Any) -> tuple[Gradients, float]:
            return self._reduced_ascent(gradients, result) if shared else (gradients, self._unit(result))

        def rises(epsilon: float) -> list[Rises]:
            return [
                loss_rise(
                    with_epsilon(self._method, epsilon), self._space, batch, ascent_gradient,
                    memory=self._optimizer.memory, embeddings=self._embeddings(), summed_loss=summed_loss,
                )
                for batch in batches
            ]  # fmt: skip

        return probe_of(self._space, rises, self._summed_rises)

    def _summed_rises(self, rises: Rises) -> Rises:
        """Add up what all workers have found, also those that have weights of their own."""
        if self._trainer.data_parallel_world_size == 1:
            return rises
        numbers = torch.tensor(rises, device=self._space.tensors[0].device)
        distributed_utils.all_reduce(numbers, group=self._trainer.data_parallel_process_group)
        return Rises(*numbers.tolist())

    def _microbatches(self) -> dict[int, MicroBatch]:
        """All micro-batches of the update, prepared once as the trainer prepares them."""
        if self._prepared is None:
            self._prepared = [self._trainer._prepare_sample(sample) for sample in self._samples]
        return {place: MicroBatch(self._call, *pair) for place, pair in enumerate(self._prepared)}

    def _new_step(self, salt: str) -> SharpnessAwareStep[Any]:
        salt = f"{salt}.{self._call.update_num}.{self._index}"
        scales_loss = _scaler(self._trainer.optimizer) is not None
        memory = self._optimizer.memory
        return SharpnessAwareStep(self._method, self._space, memory, self._embeddings(), salt, scales_loss)

    def _embeddings(self) -> WordEmbeddings | None:
        if self._method.where != "embeddings":
            return None
        return word_embeddings(self._trainer.get_model(), self._trainer.task)

    def _is_last_microbatch(self) -> bool:
        return self._index == len(self._samples) - 1

    # -- workers ---------------------------------------------------------------------------------------------------

    def _num_workers(self) -> int:
        """How many workers have the same weights; 1 where each has its own and they are averaged now and then."""
        cfg = self._trainer.cfg
        apart = cfg.optimization.use_bmuf or cfg.distributed_training.ddp_backend == "slowmo"
        return 1 if apart else int(self._trainer.data_parallel_world_size)

    def _last(self, batch: MicroBatch) -> MicroBatch:
        """The batch for the last pass: torch's DDP reduces in it, unless gradients are reduced after it."""
        return batch if self._reduces_after_pass() or self._slowmos() else batch.loud()

    def _reduced(self, result: Pass) -> Pass:
        """Do what torch's DDP, SlowMo and the checkpoint need at the end of a micro-batch; passes its result on."""
        if self._reduces_after_pass() and any(r.require_backward_grad_sync for r in self._replicas()):
            self._average_gradients(self._trainer.data_parallel_process_group, self._num_workers())
        for wrapper in self._slowmos():
            self._average_gradients(wrapper.local_node_group, wrapper.nprocs_per_node)
        if (
            self._method.between == "reuse"
            and self._is_active()
            and self._method.scope == "microbatch"
            and self._is_last_microbatch()
            and self._num_workers() > 1
        ):
            component = self._sum(self._optimizer.memory.component_of(self._space))
            self._optimizer.memory.component = None
            self._optimizer.memory.add_component(self._space, component)
        return result

    def _average_gradients(self, group: Any, num_workers: int) -> None:
        tensors = self._space.tensors
        gradients, _ = _all_reduce([tensor.grad for tensor in tensors], 0.0, tensors, group)
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = None if gradient is None else (gradient / num_workers).to(tensor.dtype)

    def _sum(self, gradients: Gradients) -> Gradients:
        """Sum a gradient over workers."""
        return self._all_reduce(gradients, 0.0)[0]

    def _reduced_ascent(self, gradients: Gradients, result: Passes) -> tuple[Gradients, float]:
        """Sum the ascent gradient and the sample size over workers, in one reduction."""
        gradients, sample_size = self._all_reduce(gradients, result.sample_size)
        return gradients, self._unit(result._replace(sample_size=sample_size))

    def _all_reduce(self, gradients: Gradients, number: float) -> tuple[Gradients, float]:
        if self._num_workers() == 1:
            return gradients, number
        return _all_reduce(gradients, number, self._space.tensors, self._trainer.data_parallel_process_group)

    def _own_share(self, wanted: int, available: int) -> int:
        """How many of the wanted instances this worker gives: equal shares, then what is left in order."""
        workers, rank = self._num_workers(), int(self._trainer.data_parallel_rank)
        if workers == 1:
            return min(wanted, available)
        counts = torch.zeros(workers, device=self._space.tensors[0].device)
        counts[rank] = available
        distributed_utils.all_reduce(counts, group=self._trainer.data_parallel_process_group)
        limits = [int(count) for count in counts.tolist()]
        shares = [min(limit, wanted // workers) for limit in limits]
        for worker, limit in enumerate(limits):
            shares[worker] += min(limit - shares[worker], wanted - sum(shares))
        return shares[rank]

    def _summed_squares(self, squares: SquaredGradients) -> SquaredGradients:
        group = self._trainer.data_parallel_process_group
        number = torch.tensor([float(squares.num_instances)], device=self._space.tensors[0].device)
        for tensor in (number, *squares.sums):
            distributed_utils.all_reduce(tensor, group=group)
        return SquaredGradients(squares.sums, int(number))

    # -- what fairseq knows ----------------------------------------------------------------------------------------

    @functools.cached_property
    def _space(self) -> ParameterSpace:
        modules = {"": self._trainer.get_model(), "criterion": self._trainer.get_criterion()}
        try:
            space = ParameterSpace.of(modules, exclude=self._optimizer.method.exclude)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        masters = _master_weights(self._trainer.optimizer, space.tensors)
        return space if masters is None else space.with_masters(masters)

    def _unit(self, result: Any) -> float:
        """Factor from ``p.grad`` (summed over the sample, times the loss scale) to the method's gradient unit."""
        divisor = (float(result.sample_size) or 1.0) if self._method.gradient == "mean" else 1.0
        return 1.0 / (divisor * _loss_scale(self._trainer.optimizer))

    def _replicas(self) -> list[DistributedDataParallel]:
        found = (torch_ddp(module) for module in (self._trainer.model, self._trainer.criterion))
        return [replica for replica in found if replica is not None]

    def _slowmos(self) -> list[Any]:
        found = (slowmo(module) for module in (self._trainer.model, self._trainer.criterion))
        return [wrapper for wrapper in found if wrapper is not None]

    def _reduces_in_backward(self) -> bool:
        return bool(self._replicas()) and not self._reduces_after_pass()

    def _reduces_after_pass(self) -> bool:
        """Whether gradients of torch's DDP are reduced by us, once an update's last micro-batch is through.

        Needed where the whole gradient is combined first; and with ``--find-unused-parameters``, since DDP takes a
        parameter as used in its reduction that only an earlier pass without one has used (LayerDrop).
        """
        return self._method.combines_whole_gradient or any(r.find_unused_parameters for r in self._replicas())

    def _no_sync(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for replica in self._replicas():
            stack.enter_context(replica.no_sync())
        for wrapper in self._slowmos():
            stack.enter_context(without_reduction(wrapper))
        return stack

    # -- what the user sees ----------------------------------------------------------------------------------------

    def _finish(self, measured: Measurements, clean: Pass, last: Pass) -> Pass:
        logged = {
            "sam_eps": (measured.perturbation_norm, 8),
            "sam_passes": (measured.num_passes + self._collected, 2),
            "sam_capped": (measured.num_capped, 2),
        }
        if measured.survived is not None:
            logged["sam_survived"] = (measured.survived, 4)
            # Masters that were just made from weights in half precision are rounded as these.
            self._optimizer.has_new_masters = self._optimizer.has_new_masters and self._masters_are_new()
        if self._method.has_first_pass:
            logged["sam_gnorm"] = (measured.gradient_norm, 4)
        if measured.num_forwards:
            logged["sam_forwards"] = (measured.num_forwards, 2)
        if self._method.ascent_fraction < 1:
            clean = resized(clean, last)
        elif self._method.measures_sharpness and clean is not last:
            logged["sam_sharp"] = (_bits(last) - _bits(clean), 5)
        self._optimizer.logged |= logged.keys() - {"sam_passes"}
        self._unread.append(logged)
        return Pass(clean.loss, last.sample_size, clean.logging_output)

    def _warn_of_rounding(self, survived: float) -> None:
        told = self._optimizer.has_warned_of_rounding or self._optimizer.has_new_masters
        if survived < LEAST_SURVIVED and not told:
            self._optimizer.has_warned_of_rounding = True
            logger.warning(
                "rounding to %s leaves %.0f %% of the perturbation (sam_survived); use --amp, whose weights are fp32, "
                "or a larger --sam-epsilon, or --sam-rounding stochastic",
                str(self._space.tensors[0].dtype).removeprefix("torch."), 100 * survived,
            )  # fmt: skip

    def _masters_are_new(self) -> bool:
        """Whether the fp32 masters are no more exact than the weights in half precision."""
        pairs = zip(self._space.masters, self._space.tensors, strict=True)
        return all(master is not None and torch.equal(master, tensor.detach().float()) for master, tensor in pairs)

    def _log_skipped(self) -> None:
        metrics.log_scalar("sam_skipped", _value(self._optimizer.num_skipped), weight=0)


def _bits(result: Pass) -> Any:
    """Loss per unit of sample size, in bits as fairseq's own losses: a number, or a tensor that is not read yet."""
    loss = result.loss.detach() if isinstance(result.loss, Tensor) else result.loss
    return loss / ((float(result.sample_size) or 1.0) * math.log(2))


def _value(number: Any) -> float:
    return float(number.detach()) if isinstance(number, Tensor) else float(number)


def _wrappers(optimizer: Any) -> list[Any]:
    """The trainer's optimizer and those inside it, outermost first."""
    chain = []
    while optimizer is not None:
        chain.append(optimizer)
        inner = (vars(optimizer).get(name) for name in ("fp32_optimizer", "wrapped_optimizer", "_optimizer"))
        optimizer = next((candidate for candidate in inner if candidate is not None), None)
    return chain


def _scaler(optimizer: Any) -> Any:
    """What scales the loss, None if nothing does."""
    scalers = (vars(wrapper).get("scaler", vars(wrapper).get("_grad_scaler")) for wrapper in _wrappers(optimizer))
    return next((scaler for scaler in scalers if scaler is not None), None)


def _loss_scale(optimizer: Any) -> float:
    """By what ``optimizer.backward`` multiplies the loss."""
    scaler = _scaler(optimizer)
    if scaler is None:
        return 1.0
    return float(scaler.get_scale() if hasattr(scaler, "get_scale") else scaler.loss_scale)


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
