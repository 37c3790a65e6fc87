"""What stands in for ``task.train_step`` while an update runs; the task's own is a black box, run once a pass."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from fairseq.modules import SinusoidalPositionalEmbedding
from fairseq.trainer import Trainer

from fairseq_sam.adapter.batches import (
    Call,
    MicroBatch,
    Pass,
    Passes,
    UpdateBatch,
    joined,
    summed_loss,
    without_counts,
)
from fairseq_sam.adapter.choices import peak_learning_rate
from fairseq_sam.adapter.embeddings import word_embeddings
from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.optimizers import SharpnessAwareOptimizer
from fairseq_sam.adapter.precision import loss_scale, master_weights, scaler_of
from fairseq_sam.adapter.radius import search, settings_of
from fairseq_sam.adapter.slicing import Slicer
from fairseq_sam.adapter.update_log import UpdateLog
from fairseq_sam.adapter.workers import Workers
from fairseq_sam.analysis.epsilon import Probe, Rises, loss_rise, probe_of, with_epsilon
from fairseq_sam.analysis.memory import is_out_of_memory
from fairseq_sam.core.descent import local
from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.fisher import SquaredGradients, squared_gradients
from fairseq_sam.core.measurements import Measurements
from fairseq_sam.core.passes import fisher_information, reuse, run_apart, split
from fairseq_sam.core.space import TABLES, ParameterSpace
from fairseq_sam.core.step import SharpnessAwareStep
from fairseq_sam.core.tensors import Gradients, add_all
from fairseq_sam.core.undo import all_or_nothing

logger = logging.getLogger(__name__)

TABLES.add(SinusoidalPositionalEmbedding)


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
        self._workers = Workers(self._trainer, self._method, self._space.tensors)
        self._log = UpdateLog(self._optimizer, self._method)

    def release(self) -> None:
        """Let go of the weights' memory: while something else has it, the next update copies them instead."""
        self._step = self._clean = None

    def log(self) -> None:
        """Log what was measured in the update."""
        self._log.write(self._space.tensors[0].dtype)

    def explain_failure(self, error: FloatingPointError) -> None:
        """Tell the user whether the update has failed because of its perturbation."""
        self._log.explain_failure(self._trainer.get_num_updates(), error)

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
                self._task_train_step,
                model,
                criterion,
                optimizer,
                update_num,
                extra,
                self._slicer,
                self._workers.no_sync,
            )
            batch = MicroBatch(self._call, sample, ignore_grad)
            gradients = [tensor.grad for tensor in self._space.tensors] if self._workers.number > 1 else []
            with all_or_nothing(self._space.tensors, self._space.buffers):
                try:
                    return self._run(batch)
                except RuntimeError as error:
                    if self._raise_oom or self._workers.number == 1 or not is_out_of_memory(error):
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
            f"update {self._call.update_num}: worker {self._workers.rank} ran short of memory where the "
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
        self._log.add_plain(1 + self._search_passes)
        memory, method = self._optimizer.memory, self._method
        if not memory.component or method.has_ended(self._optimizer.epoch, update_num):
            return self._reduced(self._plain(batch))
        if batch.is_dummy and method.scope == "microbatch":
            return self._reduced(batch.run())
        shared = method.scope == "update"
        workers = (self._workers.sum, self._workers.number) if shared else (local, 1)
        finish = self._is_last_microbatch()
        result = reuse(
            method, self._space, memory, batch, finish=finish, shared=shared, reduce=workers[0], num_workers=workers[1]
        )
        return self._reduced(result)

    def _plain(self, batch: MicroBatch) -> Pass:
        """A pass of plain training. After an error the gradients of earlier micro-batches are as they were."""
        if self._workers.reduces_in_backward:  # torch's DDP reduces what they have added up
            return self._last(batch).run()
        result, prior, gradients = run_apart(self._space, self._last(batch))
        self._space.put_gradients(add_all(prior, gradients, overwrite=True))
        return result

    def _perturb_microbatch(self, batch: MicroBatch) -> Pass:
        def ascent_gradient(gradients: Gradients, result: Pass) -> tuple[Gradients, float]:
            return gradients, self._unit(result)

        step = self._new_step(str(self._workers.rank))
        parts = split(self._method, batch)
        clean, last, measured = [], [], Measurements()
        for number, (part, share) in enumerate(parts):
            is_last = number == len(parts) - 1
            first = step.ascend(part, ascent_gradient)
            final = self._last(cast(MicroBatch, part)) if is_last else part
            last.append(step.descend(final, in_backward=is_last and self._workers.reduces_in_backward))
            clean.append(last[-1] if first is None else first)
            measured.add(step.measured, share)
        self._optimizer.num_ascents += 1
        self._optimizer.num_skipped = self._optimizer.num_skipped + measured.num_skipped
        return self._reduced(self._log.add(self._space, measured, self._collected, joined(clean), joined(last)))

    def _share_perturbation(self, batch: MicroBatch, is_retry: bool = False) -> Pass:
        if self._index == 0 and not is_retry:
            step = self._new_step("")
            parts = self._microbatches()
            real = {place: part for place, part in parts.items() if not part.is_dummy}
            spares = self._workers.number > 1 and not self._raise_oom
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
            in_backward=self._workers.reduces_in_backward,
            reduce=self._workers.sum,
            offset=None if batch.is_dummy else self._offset,
        )
        self._offset += len(batch) if self._method.selects and not batch.is_dummy else 0
        if finish:
            self._optimizer.num_skipped = self._optimizer.num_skipped + self._step.measured.num_skipped
        clean = self._clean_result(last)
        return self._reduced(self._log.add(self._space, self._step.measured, self._collected, clean, last))

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
        number = self._workers.share_of(wanted, len(batch))
        unit, salt = 1.0 / loss_scale(self._trainer.optimizer), f"{self._workers.rank}.{update_num}"
        squares = self._workers.sum_squares(self._local_information(batch, number, unit, salt))
        self._collected = number / max(len(batch), 1)
        if update_num == 0 or not memory.mask:
            logger.info("Fisher mask: from %d of %d instances so far", squares.num_instances, wanted)
        memory.add_squares(self._method, self._space, squares)

    def _local_information(self, batch: UpdateBatch, number: int, unit: float, salt: str) -> SquaredGradients:
        """What this worker gives to the Fisher mask; nothing if its instances do not fit into memory."""
        try:
            return fisher_information(self._space, batch, number, unit, salt)
        except RuntimeError as error:
            if self._raise_oom or self._workers.number == 1 or not is_out_of_memory(error):
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
            if self._raise_oom or not is_out_of_memory(error) or self._workers.number_of_all == 1:
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

        return probe_of(self._space, rises, lambda found: Rises(*self._workers.sum_numbers(found)))

    def _microbatches(self) -> dict[int, MicroBatch]:
        """All micro-batches of the update, prepared once as the trainer prepares them."""
        if self._prepared is None:
            self._prepared = [self._trainer._prepare_sample(sample) for sample in self._samples]
        return {place: MicroBatch(self._call, *pair) for place, pair in enumerate(self._prepared)}

    def _new_step(self, salt: str) -> SharpnessAwareStep[Any]:
        salt = f"{salt}.{self._call.update_num}.{self._index}"
        scales_loss = scaler_of(self._trainer.optimizer) is not None
        memory = self._optimizer.memory
        return SharpnessAwareStep(self._method, self._space, memory, self._embeddings(), salt, scales_loss)

    def _embeddings(self) -> WordEmbeddings | None:
        if self._method.where != "embeddings":
            return None
        return word_embeddings(self._trainer.get_model(), self._trainer.task)

    def _is_last_microbatch(self) -> bool:
        return self._index == len(self._samples) - 1

    def _last(self, batch: MicroBatch) -> MicroBatch:
        """The batch for the last pass."""
        return batch.loud() if self._workers.synchronises_last_pass else batch

    def _reduced(self, result: Pass) -> Pass:
        """Do what torch's DDP, SlowMo and the checkpoint need at the end of a micro-batch; passes its result on."""
        self._workers.reduce_after_pass()
        if (
            self._method.between == "reuse"
            and self._is_active()
            and self._method.scope == "microbatch"
            and self._is_last_microbatch()
            and self._workers.number > 1
        ):
            component = self._workers.sum(self._optimizer.memory.component_of(self._space))
            self._optimizer.memory.component = None
            self._optimizer.memory.add_component(self._space, component)
        return result

    def _reduced_ascent(self, gradients: Gradients, result: Passes) -> tuple[Gradients, float]:
        """Sum the ascent gradient and the sample size over workers."""
        gradients, sample_size = self._workers.sum_with(gradients, result.sample_size)
        return gradients, self._unit(result._replace(sample_size=sample_size))

    # -- what fairseq knows ----------------------------------------------------------------------------------------

    @functools.cached_property
    def _space(self) -> ParameterSpace:
        modules = {"": self._trainer.get_model(), "criterion": self._trainer.get_criterion()}
        try:
            space = ParameterSpace.of(modules, exclude=self._optimizer.method.exclude)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        masters = master_weights(self._trainer.optimizer, space.tensors)
        return space if masters is None else space.with_masters(masters)

    def _unit(self, result: Any) -> float:
        """Factor from ``p.grad`` (summed over the sample, times the loss scale) to the method's gradient unit."""
        divisor = (float(result.sample_size) or 1.0) if self._method.gradient == "mean" else 1.0
        return 1.0 / (divisor * loss_scale(self._trainer.optimizer))
