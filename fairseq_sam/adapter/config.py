"""Checks of the whole configuration, before a task reads any data."""

import functools
import logging
from argparse import Namespace
from typing import Any

from fairseq import tasks
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.distributed import utils as distributed_utils
from fairseq.optim import OPTIMIZER_REGISTRY
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fairseq_sam.adapter.choices import check_base, gradient_log_of, method_of, peak_learning_rate, rise_of
from fairseq_sam.adapter.errors import ConfigurationError, end
from fairseq_sam.adapter.instance_losses import check_criterion
from fairseq_sam.adapter.regularizers import RegularizedCriterion
from fairseq_sam.core.axes import TENSOR_GRANULARITIES
from fairseq_sam.core.method import PRESETS, Method

logger = logging.getLogger(__name__)

TWO_PRECISIONS = "--{} and --{} are two precisions of one run; leave one of them out"

# Bases that fairseq refuses with --memory-efficient-fp16 and --memory-efficient-bf16.
WITHOUT_MEMORY_EFFICIENCY = ("adadelta", "adagrad", "sgd")


def check_config(cfg: Any) -> None:
    """Refuse a run that cannot work: values, contradicting flags, modes.

    Args:
        cfg: fairseq's whole configuration. One whose optimizer is not a preset of ours passes.

    Raises:
        ValueError: names the flag, its value and what to do instead.
    """
    optimizer = cfg.get("optimizer")
    name = str(getattr(optimizer, "_name", None))
    if name not in PRESETS:
        return
    check_base(optimizer)
    gradient_log_of(optimizer)
    rise_of(name, optimizer)
    method = method_of(name, optimizer).with_peak(peak_learning_rate(cfg))
    criterion = getattr(cfg.criterion, "_name", cfg.criterion)
    if method.needs_losses and method.epsilon > 0 and criterion in CRITERION_REGISTRY:
        check_criterion(CRITERION_REGISTRY[criterion])
    own_check = getattr(CRITERION_REGISTRY.get(criterion), "check_method", None)
    if own_check is not None and method.epsilon > 0:
        own_check(cfg.criterion, method)
    if (
        method.where == "embeddings"
        and isinstance(CRITERION_REGISTRY.get(criterion), type)
        and issubclass(CRITERION_REGISTRY[criterion], RegularizedCriterion)
    ):
        raise ValueError(
            f"--criterion {criterion} runs several passes whose predictions it compares, and --optimizer {name} would "
            "perturb the word embeddings of each differently; use the criterion without its regulariser, or a method "
            "that perturbs weights"
        )
    common, distributed = cfg.common, cfg.distributed_training
    if method.ascent == "weighted" and (common.fp16 or common.bf16):
        logger.warning(
            "--optimizer %s weighs instances by second differences of their losses, which half-precision weights "
            "round away; use --amp, which keeps fp32 weights", name,
        )  # fmt: skip
    warn_of_no_start(name, method, cfg.optimization)
    chosen = [flag for flag in ("fp16", "bf16", "amp") if getattr(common, flag, False)]
    if len(chosen) > 1:
        raise ValueError(TWO_PRECISIONS.format(*chosen))
    flat = common.fp16 and not common.memory_efficient_fp16 and not common.fp16_no_flatten_grads
    if flat and method.has_groups and method.granularity in TENSOR_GRANULARITIES:
        raise ValueError(
            f"--fp16 flattens all parameters into one vector, but {name} uses --sam-granularity "
            f"{method.granularity}, which needs tensors; add --fp16-no-flatten-grads, or use --amp, or choose "
            "--sam-granularity element or model"
        )
    if method.rounding == "stochastic" and not (common.fp16 or common.bf16):
        raise ValueError(
            "--sam-rounding stochastic rounds weights in half precision, and those of this run are fp32; leave it out, "
            "or train with --fp16 or --bf16"
        )
    base = str(optimizer.base_optimizer)
    if (common.memory_efficient_fp16 or common.memory_efficient_bf16) and base in WITHOUT_MEMORY_EFFICIENCY:
        flag = "--memory-efficient-fp16" if common.memory_efficient_fp16 else "--memory-efficient-bf16"
        able = ", ".join(n for n in sorted(OPTIMIZER_REGISTRY) if n not in (*WITHOUT_MEMORY_EFFICIENCY, *PRESETS))
        raise ValueError(
            f"{flag} cannot be used with --base-optimizer {base}, which needs fp32 weights; use --fp16 or --bf16 "
            f"without it, or a base optimizer that can do without: {able}"
        )
    if base == "composite" and not getattr(optimizer, "groups", None):
        raise ValueError(
            "--base-optimizer composite takes its groups from a YAML file of fairseq-hydra-train (optimizer.groups); "
            "on the command line use another base optimizer"
        )
    if distributed.zero_sharding == "os" and distributed.distributed_world_size == 1:
        raise ValueError(
            "--zero-sharding os shares the optimizer's state among workers, and there is one; leave it out"
        )
    if chosen and getattr(cfg.optimization, "use_bmuf", False):
        raise ValueError(
            f"--use-bmuf cannot be used with --{chosen[0]}: fairseq's BMUF runs backward past the optimizer that "
            "scales the loss and keeps fp32 weights, so that these are never updated or by wrong gradients; leave one "
            "of them out"
        )
    apart = "--use-bmuf" if getattr(cfg.optimization, "use_bmuf", False) else ""
    apart = "--ddp-backend slowmo" if distributed.ddp_backend == "slowmo" else apart
    if apart and method.scope == "update":
        raise ValueError(
            f"--sam-scope update cannot be used with {apart}: each worker has weights of its own there, and no "
            "perturbation to share; use --sam-scope microbatch"
        )
    if distributed.ddp_backend == "slowmo" and distributed.slowmo_base_algorithm == "sgp":
        raise ValueError(
            f"--slowmo-base-algorithm sgp is not supported by --optimizer {name}: it rewrites the weights in every "
            "forward pass; use --slowmo-base-algorithm localsgd"
        )
    if distributed.ddp_backend == "fully_sharded":
        raise ValueError(
            f"--ddp-backend fully_sharded is not supported by --optimizer {name}: parameters are flat shards without "
            "layers; use pytorch_ddp or legacy_ddp"
        )
    if distributed.pipeline_model_parallel:
        raise ValueError(f"--pipeline-model-parallel is not supported by --optimizer {name}; leave it out")


def warn_of_no_start(name: str, method: Method, optimization: Any) -> None:
    """Say so where a run ends before its method begins; a later one may go on from there.

    Args:
        name: of the optimizer.
        method: what it does.
        optimization: fairseq's section with ``max_epoch`` and ``max_update``, 0 for no end.
    """
    ends = {
        "epoch": (method.start_epoch, getattr(optimization, "max_epoch", 0)),
        "update": (method.start_update + 1, getattr(optimization, "max_update", 0)),
    }
    for what, (start, last) in ends.items():
        if last and start > last:
            given = start if what == "epoch" else method.start_update
            logger.warning(
                "--optimizer %s is its base optimizer in this run, which ends (--max-%s %d) before the method begins "
                "(--sam-start-%s %d)", name, what, last, what, given,
            )  # fmt: skip


def check_before_data_is_read() -> None:
    """Check the configuration before workers are started, and before a task is set up, once.

    The first is what ``fairseq-train`` does, with one process to print the error. hydra imports the plugin in the
    workers; there, and in a program that sets up a task itself, the second is the first chance.
    """
    if getattr(tasks.setup_task, "checks_sharpness_aware_config", False):
        return
    plain_setup_task, plain_call_main = tasks.setup_task, distributed_utils.call_main
    checked: list[Any] = []  # the configuration of the run, so that it is not warned of twice

    @functools.wraps(plain_setup_task)
    def setup_task(cfg: Any, **kwargs: Any) -> Any:
        root = _root(cfg)
        if root is not None and not any(each is root for each in checked):
            _refuse_in_one_line(root)
        return plain_setup_task(cfg, **kwargs)

    @functools.wraps(plain_call_main)
    def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
        if isinstance(cfg, DictConfig):
            _refuse_in_one_line(cfg)
            checked[:] = [cfg]
        try:
            return plain_call_main(cfg, main, **kwargs)
        finally:
            checked.clear()

    setup_task.checks_sharpness_aware_config = True  # type: ignore[attr-defined]
    tasks.setup_task, distributed_utils.call_main = setup_task, call_main


def _refuse_in_one_line(cfg: Any) -> None:
    try:
        check_config(cfg)
    except ValueError as error:
        refusal = ConfigurationError(str(error))
        if HydraConfig.initialized():  # it would print a traceback
            end(refusal)
        raise refusal from None


def _root(task_cfg: Any) -> Any:
    """Find the whole configuration from a task's part of it."""
    if isinstance(task_cfg, DictConfig):
        parent = task_cfg._get_parent()
        complete = isinstance(parent, DictConfig) and "common" in parent and "optimizer" in parent
        return parent if complete else None
    if isinstance(task_cfg, Namespace) and getattr(task_cfg, "optimizer", None) in PRESETS:
        # Tasks without a dataclass get all flags of the command line, flat.
        parts = ("common", "distributed_training", "optimization", "lr_scheduler")
        sections = {**dict.fromkeys(parts, task_cfg), "criterion": getattr(task_cfg, "criterion", None)}
        optimizer = Namespace(**{**vars(task_cfg), "_name": task_cfg.optimizer})
        return _Flat(optimizer=optimizer, **sections)
    return None


class _Flat(Namespace):
    """A flat namespace that answers like the structured configuration."""

    def get(self, name: str) -> Any:
        return getattr(self, name, None)
