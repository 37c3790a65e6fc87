"""Faults of fairseq that would hit our runs, mended in the smallest way."""

import functools
import importlib.util
import logging
import sys
import types
from typing import Any

import numpy
from fairseq import checkpoint_utils, options
from fairseq.data import data_utils, language_pair_dataset, token_block_dataset
from fairseq.file_io import PathManager
from fairseq.nan_detector import NanDetector
from fairseq.optim import AMPOptimizer
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from fairseq_sam.adapter.config import TWO_PRECISIONS
from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.core.method import PRESETS

logger = logging.getLogger(__name__)


def resume_with_the_same_batches() -> None:
    """Let a run that resumes after its first epoch see the batches of the uninterrupted run. Others are untouched.

    fairseq groups sentences into batches with the random seed of the epoch in which a process starts, and keeps them
    for all later epochs. A process that resumes in epoch 3 therefore trains on other batches than one that began in
    epoch 1. Here they are made as at the start of epoch 1, and then only shuffled for their epoch, as without the
    interruption. Tasks that make new batches for each epoch are left alone.
    """
    original = Trainer.get_train_iterator
    if getattr(original, "resumes_with_the_same_batches", False):
        return

    @functools.wraps(original)
    def get_train_iterator(self: Trainer, epoch: int, *args: Any, **kwargs: Any) -> Any:
        if epoch == 1 or not _starts_here(self, args, kwargs):
            return original(self, epoch, *args, **kwargs)
        iterator = original(self, 1, *args, **kwargs)
        dataset = self.task.dataset(self.cfg.dataset.train_subset)
        if self.cfg.dataset.update_epoch_batch_itr or not self.task.can_reuse_epoch_itr(dataset):
            return original(self, epoch, *args, **kwargs)
        iterator.epoch = epoch
        return iterator

    get_train_iterator.resumes_with_the_same_batches = True  # type: ignore[attr-defined]
    Trainer.get_train_iterator = get_train_iterator


class _Numpy1(types.ModuleType):
    """numpy as modules know it that were written before its version 2."""

    compat = types.SimpleNamespace(long=int)

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)

    @staticmethod
    def percentile(*args: Any, interpolation: str = "linear", **kwargs: Any) -> Any:
        return numpy.percentile(*args, **{"method": interpolation, **kwargs})


def run_with_numpy_2() -> None:
    """Let ``--sample-break-mode eos`` and ``--num-batch-buckets`` work where numpy has dropped what they call."""
    for module in (token_block_dataset, language_pair_dataset, data_utils):
        if not hasattr(module.np, "compat"):
            module.np = _Numpy1("numpy")


def _starts_here(trainer: Trainer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the training data is loaded now for a run of ours whose batches would be kept over epochs."""
    names = ("combine", "load_dataset", "data_selector", "shard_batch_itr", "disable_iterator_cache")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return (
        getattr(trainer.cfg.optimizer, "_name", None) in PRESETS
        and given.get("load_dataset", True)
        and not given.get("disable_iterator_cache", False)
        and type(trainer.task).get_batch_iterator is FairseqTask.get_batch_iterator
    )


def unscale_once() -> None:
    """Let ``--amp`` divide gradients by the loss scale once.

    fairseq unscales for clipping under the base optimizer's name and steps under its wrapper's, so that torch's scaler
    does not know and divides again. Adam hides it, SGD does not. Runs without our optimizers are untouched.
    """
    original = AMPOptimizer.step
    if getattr(original, "unscales_once", False):
        return

    @functools.wraps(original)
    def step(self: AMPOptimizer) -> None:
        states = self.scaler._per_optimizer_states
        if unwrap(self) is not None and id(self.optimizer) in states:
            states[id(self.fp32_optimizer)] = states[id(self.optimizer)]
        original(self)

    step.unscales_once = True  # type: ignore[attr-defined]
    AMPOptimizer.step = step


def bfloat16_is_not_a_tpu() -> None:
    """Let ``--bf16`` on the command line run on CPU and GPU; fairseq takes it for ``--tpu``. Others are untouched.

    Undone where the command line is read: fairseq asks for a TPU as early as when it starts its workers.
    """
    original = options.parse_args_and_arch
    if getattr(original, "knows_bfloat16", False):
        return

    @functools.wraps(original)
    def parse_args_and_arch(*args: Any, **kwargs: Any) -> Any:
        try:
            parsed = original(*args, **kwargs)
        except ValueError as error:  # of --fp16 and a TPU
            given = kwargs.get("input_args") or (args[1] if len(args) > 1 else None) or sys.argv
            if PRESETS.keys().isdisjoint(given) or "--tpu" in given or "--fp16 and --tpu" not in str(error):
                raise
            raise ConfigurationError(TWO_PRECISIONS.format("fp16", "bf16")) from None
        for namespace in parsed if isinstance(parsed, tuple) else (parsed,):
            asked = getattr(namespace, "bf16", False) and getattr(namespace, "tpu", False)
            ours = getattr(namespace, "optimizer", None) in PRESETS
            if asked and ours and importlib.util.find_spec("torch_xla") is None:
                namespace.tpu = False
        return parsed

    parse_args_and_arch.knows_bfloat16 = True  # type: ignore[attr-defined]
    options.parse_args_and_arch = parse_args_and_arch


def find_nan_in_transformers() -> None:
    """Let fairseq's search for the module with a NaN end with its error, ``gradients are Nan/Inf``.

    torch's old backward hooks raise StopIteration on modules that return dictionaries of lists, such as the encoder of
    a Transformer. Modules without children return tensors, and are where a NaN comes up first.
    """
    original = NanDetector.add_hooks
    if getattr(original, "skips_containers", False):
        return

    @functools.wraps(original)
    def add_hooks(self: NanDetector, module: Any) -> None:
        backward, self.backward = self.backward, self.backward and not any(module.children())
        original(self, module)
        self.backward = backward

    add_hooks.skips_containers = True  # type: ignore[attr-defined]
    NanDetector.add_hooks = add_hooks


def copy_checkpoints_whole() -> None:
    """Let ``checkpoint_last.pt`` and ``checkpoint_best.pt`` be whole at any moment.

    fairseq writes a checkpoint under another name first, but copies it over its last and best ones in place: a run
    that is killed then cannot be resumed. Remote paths are copied as before.
    """
    original = PathManager.copy
    if getattr(original, "copies_whole", False):
        return

    @functools.wraps(original)
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if not PathManager.supports_rename(dst_path):
            return original(src_path, dst_path, overwrite)
        result = original(src_path, dst_path + ".tmp", True)
        PathManager.rename(dst_path + ".tmp", dst_path)
        return result

    copy.copies_whole = True  # type: ignore[attr-defined]
    PathManager.copy = staticmethod(copy)


def a_finished_run_stays_finished() -> None:
    """Let a run that has done its ``--max-update`` updates train no more when its command is given again.

    fairseq looks at the number after each update only, so it would do one more. Other runs are untouched.
    """
    original = checkpoint_utils.load_checkpoint
    if getattr(original, "knows_the_end", False):
        return

    @functools.wraps(original)
    def load_checkpoint(cfg: Any, trainer: Trainer, **kwargs: Any) -> Any:
        loaded = original(cfg, trainer, **kwargs)
        limit, done = trainer.cfg.optimization.max_update, trainer.get_num_updates()
        if unwrap(trainer.optimizer) is not None and 0 < limit <= done:
            logger.info("all %d updates of --max-update %d are done: nothing is left to train", done, limit)
            trainer.cfg.optimization.max_epoch = -1  # 0 would mean without end
        return loaded

    load_checkpoint.knows_the_end = True  # type: ignore[attr-defined]
    checkpoint_utils.load_checkpoint = load_checkpoint
