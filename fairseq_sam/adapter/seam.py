"""The seam: ``Trainer.train_step`` is wrapped once."""

import functools
from typing import Any

from fairseq.trainer import Trainer

from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.adapter.train_step import SharpnessAwareTrainStep


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
        except FloatingPointError as error:
            optimizer.undo_update()
            update.explain_failure(error)
            raise
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
