"""The presets as fairseq optimizers: flags, and delegation of everything to a base optimizer."""

import logging
import math
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import cache
from types import UnionType
from typing import Any, NamedTuple, Optional

import torch
from fairseq import optim
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY, OPTIMIZER_REGISTRY, FairseqOptimizer, register_optimizer
from omegaconf import DictConfig, OmegaConf

from fairseq_sam._version import __version__
from fairseq_sam.adapter.errors import CheckpointError, ConfigurationError
from fairseq_sam.adapter.radius import UPDATES, forget_others, settings_of
from fairseq_sam.analysis.epsilon import FRACTION
from fairseq_sam.core.memory import Memory
from fairseq_sam.core.method import PRESETS, Method, flag
from fairseq_sam.core.signals import signals_wait

logger = logging.getLogger(__name__)

STATE_KEY = "sharpness_aware"  # where the method's state rides in the optimizer's state dict
AUTO = "auto"  # as --sam-epsilon: the run finds the radius
STATE_FORMAT = 1  # of that state; goes up when an older version could not read it


class Flag(NamedTuple):
    """A flag without its ``--sam-``."""

    name: str
    type: Any
    help: str


# The flags by axis. A flag that is not given keeps the preset's value.
FLAGS_BY_AXIS: dict[str, tuple[Flag, ...]] = {
    "ball": (
        Flag(
            "epsilon",
            Any,
            "radius of the perturbation, >= 0 (0: the base optimizer bit for bit), or auto: the radius at which the "
            "perturbation raises the loss by --sam-rise, measured in the first 8 updates that would be sharpness-aware",
        ),
        Flag(
            "rise",
            float,
            f"with --sam-epsilon auto: wanted rise of the loss, as a fraction of it, > 0 (default: {FRACTION:g})",
        ),
        Flag("norm", str, "norm of the ball: l2, linf or a number > 1"),
        Flag("ball", str, "one ball for the whole model, or one for each group of the granularity"),
        Flag("epsilon_min", float, "radius at learning rate --sam-lr-min, in [0, epsilon]; linear between (GSAM)"),
        Flag(
            "lr_max",
            float,
            "learning rate at which the radius is epsilon, > --sam-lr-min (default: the schedule's peak)",
        ),
        Flag("lr_min", float, "learning rate at which the radius is --sam-epsilon-min, >= 0"),
    ),
    "ascent steps": (
        Flag("steps", int, "number K of ascent steps, >= 1; an update costs K + 1 passes"),
        Flag("step_size", float, "length of one ascent step, > 0 (default: 1.5 epsilon / K)"),
        Flag(
            "step_rule",
            str,
            "steps of length --sam-step-size along the steepest ascent, or of --sam-step-size times the gradient",
        ),
        Flag("init", str, "the ascent starts at zero, or at uniform noise in the ball (--sam-where embeddings only)"),
        Flag("dropout", str, "random masks of the ascent passes: those of the last pass, or fresh ones"),
    ),
    "ascent gradient": (
        Flag(
            "ascent",
            str,
            "gradient of the batch, of the batch with delta-SAM's weights, of each instance, or a random direction",
        ),
        Flag("ascent_fraction", float, "share of the batch that the ascent sees, in (0, 1]"),
        Flag("m", int, "number of parts of the batch, each with its own perturbation, >= 1"),
        Flag("delta_eta", float, "floor of the denominator of delta-SAM's weights, > 0"),
        Flag(
            "gradient",
            str,
            "unit of the gradient that T sees: per unit of sample size (token, sentence), or as the criterion sums it",
        ),
    ),
    "scale T": (
        Flag("scale", str, "diagonal scale operator T, by which the ball is stretched"),
        Flag("granularity", str, "what one group of T is (sentence: --sam-where embeddings only)"),
        Flag("asam_eta", float, "added to |w| by the scale weight_abs, >= 0"),
        Flag("max_scale", float, "cap of a gradient-based T, in multiples of its model-wise value, > 0 (inf: no cap)"),
    ),
    "mask": (
        Flag("mask", str, "perturb all weights, those with most Fisher information, or random tensors"),
        Flag(
            "sparsity",
            float,
            "share of weights (fisher) or tensors (random; 1 - beta) that is not perturbed, in [0, 1)",
        ),
        Flag("mask_interval", int, "updates between refreshes of the Fisher mask, >= 1"),
        Flag("fisher_samples", int, "instances that the Fisher mask is made from, >= 1"),
        Flag("exclude", str, "regular expression: parameters with a matching name are trained but not perturbed"),
    ),
    "descent gradient": (
        Flag(
            "descent",
            str,
            "gradient of the update: at the last point, mean of all K + 1, mean of the first K, GSAM's "
            "decomposition, or the last on the instances whose loss rose most (ESAM)",
        ),
        Flag("gsam_alpha", float, "weight of the component that gsam subtracts, >= 0"),
        Flag("esam_gamma", float, "share of the instances that sds keeps, in (0, 1]"),
    ),
    "where": (
        Flag("where", str, "perturb weights, or outputs of the word embeddings"),
        Flag(
            "rounding",
            str,
            "half-precision weights at w + a: to nearest, or at random: small perturbations survive on average",
        ),
        Flag("scope", str, "one perturbation for each micro-batch of each worker, or one for the whole update"),
    ),
    "when": (
        Flag("start_epoch", int, "first sharpness-aware epoch, >= 1; plain steps before it"),
        Flag("start_update", int, "number of plain updates before the first sharpness-aware one, >= 0"),
        Flag("end_epoch", int, "last sharpness-aware epoch, >= --sam-start-epoch; plain steps after it"),
        Flag("end_update", int, "number of updates after which steps are plain, > --sam-start-update"),
        Flag("interval", int, "every n-th update is sharpness-aware, >= 1"),
        Flag("between", str, "updates between: plain steps, or with the last sharpness component (LookSAM)"),
        Flag("look_alpha", float, "weight of the reused component, in multiples of the gradient's norm, >= 0"),
    ),
    "log": (
        Flag(
            "gradient_log",
            int,
            "write each parameter's gradient norm every n-th update into gradients.jsonl of --save-dir, >= 1",
        ),
    ),
}
SAM_FLAGS: tuple[Flag, ...] = tuple(flag for flags in FLAGS_BY_AXIS.values() for flag in flags)


@cache
def base_flags(name: str) -> dict[str, tuple[Any, Field[Any]]]:
    """Return type and dataclass field of each flag of a base optimizer, by destination.

    Optimizers with a dataclass give their fields; the legacy ones give what their ``add_args`` adds to a parser.

    Args:
        name: a name in fairseq's optimizer registry.
    """
    config = OPTIMIZER_DATACLASS_REGISTRY.get(name)
    if config is not None:
        return {f.name: (f.type, f) for f in fields(config) if not f.name.startswith("_")}
    parser = ArgumentParser(allow_abbrev=False, add_help=False)
    adder = getattr(OPTIMIZER_REGISTRY[name], "add_args", None)
    if adder is not None:
        adder(parser)
    flags: dict[str, tuple[Any, Field[Any]]] = {}
    for action in parser._actions:
        kind = bool if action.nargs == 0 else action.type if isinstance(action.type, type) else Any
        metadata = {"help": action.help}
        if len(action.option_strings) > 1:
            metadata["argparse_alias"] = action.option_strings[1]
        default = None if action.default is SUPPRESS else action.default
        declared: Any = field(default=default, metadata=metadata)
        flags[action.dest] = (kind, declared)
    return flags


def _is_interpolation(default: Any) -> bool:
    return isinstance(default, str) and default.startswith("${")


def _base_fields(bases: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """Union of the bases' flags, each optional: None means the base's own default."""
    owners: dict[str, list[str]] = {}
    for base in bases:
        for name in base_flags(base):
            owners.setdefault(name, []).append(base)
    union = []
    for name, holders in owners.items():
        versions = [base_flags(base)[name] for base in holders]
        kind, first = versions[0]
        if _is_interpolation(first.default):
            union.append((name, kind, field(default=first.default)))
            continue
        metadata: dict[str, Any] = {"help": f"[{', '.join(holders)}] {first.metadata.get('help') or ''}".strip()}
        for _, version in versions:
            if "argparse_alias" in version.metadata:
                metadata["argparse_alias"] = version.metadata["argparse_alias"]
        same = all(other == kind for other, _ in versions)
        union.append(
            (name, Optional[kind] if same and kind is not Any else Any, field(default=None, metadata=metadata))
        )
    return union


def _config_class(bases: tuple[str, ...]) -> type:
    own: list[tuple[str, Any, Any]] = [
        (f"sam_{name}", kind if kind is Any else Optional[kind], field(default=None, metadata={"help": text}))
        for name, kind, text in SAM_FLAGS
    ]
    base = ("base_optimizer", str, field(default="adam", metadata={"help": f"base optimizer: {', '.join(bases)}"}))
    return make_dataclass(
        "SharpnessAwareConfig",
        [base, *own, *_base_fields(bases)],
        bases=(FairseqDataclass,),
    )


def base_names() -> tuple[str, ...]:
    """Names of the optimizers that a preset can wrap: all that are registered and not ours."""
    return tuple(sorted(name for name in OPTIMIZER_REGISTRY if name not in PRESETS))


def method_of(name: str, cfg: Any) -> Method:
    """Build the method that a configuration describes.

    Args:
        name: the preset.
        cfg: configuration with the ``sam_`` fields.

    Raises:
        ValueError: if a value is not allowed.
    """
    axes = [axis for axis, _, _ in SAM_FLAGS if axis in Method.__dataclass_fields__]
    given = {axis: getattr(cfg, f"sam_{axis}", None) for axis in axes}
    return Method.from_preset(name, **{**given, "epsilon": _radius(given["epsilon"])})


def _radius(given: Any) -> float | None:
    """The given radius; None for the preset's, which stands in for one that is to be found."""
    if given is None or given == AUTO:
        return None
    try:
        return float(given)
    except (TypeError, ValueError):
        raise ValueError(f"epsilon (--sam-epsilon) must be a number >= 0, or {AUTO}, got {given!r}") from None


def rise_of(name: str, cfg: Any) -> float | None:
    """Return by which fraction of the loss the radius that is searched for raises it; None where the radius is given.

    Args:
        name: the preset.
        cfg: configuration with the ``sam_`` fields.

    Raises:
        ValueError: if the fraction is not allowed, or a flag contradicts it.
    """
    rise = getattr(cfg, "sam_rise", None)
    if getattr(cfg, "sam_epsilon", None) != AUTO:
        if rise is not None:
            raise ValueError(f"rise (--sam-rise) {rise} is only used with --sam-epsilon {AUTO}; give both or neither")
        return None
    for axis in ("step_size", "epsilon_min"):
        value = getattr(cfg, f"sam_{axis}", None)
        if value is not None and (axis, PRESETS[name].step_rule) != ("step_size", "gradient"):
            raise ValueError(
                f"{flag(axis)} {value} is a length beside a radius that is not known before the run has found it; "
                f"leave it out, or give a number for --sam-epsilon in place of {AUTO}"
            )
    if rise is not None and not 0 < rise < math.inf:
        raise ValueError(f"rise (--sam-rise) must be a finite number > 0, got {rise}")
    start, end, interval = (getattr(cfg, f"sam_{axis}", None) for axis in ("start_update", "end_update", "interval"))
    least = int(start or 0) + UPDATES * int(interval or PRESETS[name].interval) + 1
    if end is not None and end < least:
        raise ValueError(
            f"{flag('end_update')} {end} leaves no sharpness-aware update: --sam-epsilon {AUTO} measures the radius in "
            f"{UPDATES} plain ones; it must be at least {least}, or give a number for --sam-epsilon"
        )
    return FRACTION if rise is None else float(rise)


def gradient_log_of(cfg: Any) -> int:
    """Return every how many updates gradient norms are logged; 0 for never.

    Args:
        cfg: configuration with the ``sam_`` fields.

    Raises:
        ValueError: if the number is not allowed.
    """
    every = getattr(cfg, "sam_gradient_log", None)
    if every is not None and every < 1:
        raise ValueError(f"gradient_log (--sam-gradient-log) must be an integer >= 1, got {every}")
    return every or 0


def peak_learning_rate(cfg: Any) -> float:
    """Return the largest learning rate of a run's schedule.

    Args:
        cfg: fairseq's whole configuration.
    """
    own_peak = getattr(cfg.lr_scheduler, "max_lr", None)  # schedules that rise above --lr
    return float(max([*cfg.optimization.lr, *([own_peak] if own_peak else [])]))


def check_base(cfg: Any) -> None:
    """Refuse an unknown base optimizer, and flags of another base than the chosen one.

    Raises:
        ValueError: names the flag, its value and what is allowed.
    """
    if cfg.base_optimizer not in base_names():
        raise ValueError(f"--base-optimizer must be one of {', '.join(base_names())}, got {cfg.base_optimizer!r}")
    own = base_flags(cfg.base_optimizer)
    for other in base_names():
        for name, (_, declared) in base_flags(other).items():
            value = getattr(cfg, name, None)
            if name not in own and value is not None and not _is_interpolation(declared.default):
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} is a flag of --base-optimizer {other}, "
                    f"but --base-optimizer is {cfg.base_optimizer}; its flags: "
                    + (", ".join(f"--{flag.replace('_', '-')}" for flag in own if flag not in ("lr", "tpu")) or "none")
                )


def base_config(cfg: Any) -> Any:
    """Return the base optimizer's own configuration, in the form that its class takes."""
    name = cfg.base_optimizer
    given = {key: getattr(cfg, key, None) for key in base_flags(name)}
    values = {key: value for key, value in given.items() if value is not None}
    if name in OPTIMIZER_DATACLASS_REGISTRY:
        config = OmegaConf.create({"_name": name, **values})
        if isinstance(cfg, DictConfig):  # the base's groups may refer to other sections, such as ${common.tpu}
            config._set_parent(cfg._get_parent())
        return config
    for key, (_, declared) in base_flags(name).items():
        values.setdefault(key, None if declared.default is MISSING else declared.default)
    lr = list(cfg.lr) if not isinstance(cfg.lr, float) else [cfg.lr]
    values = {key: list(v) if OmegaConf.is_list(v) else v for key, v in values.items()}
    return Namespace(optimizer=name, **{**values, "lr": lr})


class SharpnessAwareOptimizer(FairseqOptimizer):
    """A base optimizer with a method's configuration and state beside it.

    Every operation is the base optimizer's. The training step reads `method` and writes `num_ascents` and
    `num_skipped`, which ride in the state dict under ``sharpness_aware``.

    Args:
        cfg: the preset's configuration.
        params: parameters to optimize, as fairseq passes them.

    Raises:
        ValueError: if the configuration is not valid.
    """

    preset: str

    def __init__(self, cfg: DictConfig, params: Any) -> None:
        super().__init__(cfg)
        check_base(cfg)
        self._method = method_of(self.preset, cfg)
        self.rise = rise_of(self.preset, cfg)  # None: the radius is given
        self.base: FairseqOptimizer = optim.build_optimizer(base_config(cfg), list(params))
        self.memory = Memory()
        self.gradient_log = gradient_log_of(cfg)
        self.epoch = 1
        self.logged: set[str] = set()  # what sharpness-aware updates have logged in this run
        self.has_warned_of_rounding = False
        self.has_new_masters = True  # fp32 masters may still be no more exact than the weights in half precision
        self.has_warned_of_search = False
        self.num_ascents = 0
        self.num_skipped: int | torch.Tensor = 0
        # None once the base has updated the weights.
        self._before_update: tuple[dict[str, Any], int, int | torch.Tensor] | None = None

    @property
    def method(self) -> Method:
        """The method, with the radius that this run has found if it was to."""
        if self.rise is None or self.memory.epsilon is None:
            return self._method
        return self._method.with_radius(self.memory.epsilon)

    @property
    def searches_radius(self) -> bool:
        """Whether the radius is still to be found."""
        return self.rise is not None and self.memory.epsilon is None

    @property
    def optimizer(self) -> Any:
        """The base's ``torch.optim.Optimizer``."""
        return self.base.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self.base.optimizer = optimizer

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The base's settings that override those of a checkpoint."""
        return self.base.optimizer_config

    @property
    def params(self) -> Any:
        """The base's parameters."""
        return self.base.params

    @property
    def param_groups(self) -> Any:
        """The base's parameter groups."""
        return self.base.param_groups

    @property
    def lr_scheduler(self) -> Any:
        """The base's own learning-rate scheduler, if it has one (composite)."""
        return getattr(self.base, "lr_scheduler", None)

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """As the base."""
        return self.base.supports_memory_efficient_fp16

    @property
    def supports_step_with_scale(self) -> bool:
        """As the base."""
        return self.base.supports_step_with_scale

    @property
    def supports_groups(self) -> bool:
        """As the base."""
        return self.base.supports_groups

    @property
    def supports_flat_params(self) -> bool:
        """As the base."""
        return self.base.supports_flat_params

    def __getstate__(self) -> Any:
        """Pickle as the base does."""
        return self.base.__getstate__()

    def get_lr(self) -> float:
        """Return the base's learning rate."""
        return self.base.get_lr()

    def set_lr(self, lr: float) -> None:
        """Set the base's learning rate."""
        self.base.set_lr(lr)

    def backward(self, loss: Any) -> None:
        """Run the base's backward pass."""
        self.base.backward(loss)

    def all_reduce_grads(self, module: Any) -> None:
        """Reduce gradients as the base does."""
        self.base.all_reduce_grads(module)

    def multiply_grads(self, c: Any) -> None:
        """Multiply gradients as the base does."""
        self.base.multiply_grads(c)

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Any:
        """Clip gradients as the base does."""
        return self.base.clip_grad_norm(max_norm, aggregate_norm_fn)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Let the base update the weights; an interrupt or a signal waits until it has."""
        with signals_wait():
            self._before_update = self.base.step(*args, **kwargs)  # None: the update is done

    def begin_update(self) -> None:
        """Remember the method's state, in case the update does not come to its end."""
        self._before_update = (dict(vars(self.memory)), self.num_ascents, self.num_skipped)

    def end_update(self) -> None:
        """Keep the method's state, also if the loss scaler has dropped the update."""
        self._before_update = None

    def undo_update(self, counts: bool = True) -> None:
        """Put the method's state back to ``begin_update``, unless the weights are updated by now.

        Args:
            counts: the numbers of ascents and of skipped ones as well.
        """
        if self._before_update is not None:
            memory, num_ascents, num_skipped = self._before_update
            vars(self.memory).update(memory)
            if counts:
                self.num_ascents, self.num_skipped = num_ascents, num_skipped

    def zero_grad(self) -> None:
        """Clear gradients as the base does."""
        self.base.zero_grad()

    def average_params(self) -> None:
        """Average the base's state over workers (BMUF)."""
        self.base.average_params()

    def broadcast_global_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Broadcast the base's state from the first worker."""
        return self.base.broadcast_global_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state with the method's beside it: that of before an update that is not finished."""
        self.undo_update()  # fairseq writes crash.pt while it runs
        own = {
            "format": STATE_FORMAT,
            "version": __version__,
            "preset": self.preset,
            "base": self.cfg.base_optimizer,
            "num_ascents": self.num_ascents,
            "num_skipped": int(self.num_skipped),
            **self.memory.state_dict(),
        }
        return {**self.base.state_dict(), STATE_KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        """Load a state of this class, or one that the base alone wrote (the method then starts anew).

        The base's part of another preset's state is loaded; that preset's own part is left, with a message.

        Raises:
            ConfigurationError: if the state is that of another base optimizer.
            CheckpointError: if the method's part is of a newer format, or not what a preset writes.
        """
        base_state = {key: value for key, value in state_dict.items() if key != STATE_KEY}
        own = checked_state(state_dict.get(STATE_KEY, {}))
        if own.get("base", self.cfg.base_optimizer) != self.cfg.base_optimizer:
            raise ConfigurationError(
                f"the checkpoint's optimizer state is that of --base-optimizer {own['base']}, but --base-optimizer is "
                f"{self.cfg.base_optimizer}; use the same one, or start the optimizer anew with --reset-optimizer"
            )
        if own.get("preset", self.preset) != self.preset:
            logger.warning(
                "the checkpoint is of --optimizer %s: %s goes on with its base optimizer's state and its weights; what "
                "%s remembered is left", own["preset"], self.preset, own["preset"],
            )  # fmt: skip
            own = {}
        self.base.load_state_dict(base_state, optimizer_overrides)
        self.num_ascents = own.get("num_ascents", 0)
        self.num_skipped = own.get("num_skipped", 0)
        self.memory.load_state_dict(own)
        if self.rise is not None:
            forget_others(self.memory, settings_of(self._method, self.rise))


def checked_state(state: Any) -> dict[str, Any]:
    """Return the method's part of an optimizer state if it is one, brought to today's format.

    Format 0, from before there was a number, has the contents of format 1 without version and preset.

    Args:
        state: what a checkpoint holds under ``sharpness_aware``.

    Raises:
        CheckpointError: if it is of a newer format, or its contents are not of the kind that ``state_dict`` gives.
    """
    remedy = "start the optimizer anew with --reset-optimizer"
    if not isinstance(state, dict):
        raise CheckpointError(f"the checkpoint's {STATE_KEY} state is {type(state).__name__}, not a dict; {remedy}")
    number = state.get("format", 0)
    if not isinstance(number, int) or not 0 <= number <= STATE_FORMAT:
        raise CheckpointError(
            f"the checkpoint's {STATE_KEY} state was written by fairseq_sam {state.get('version', '?')} in format "
            f"{number}, and this is {__version__}, which reads formats up to {STATE_FORMAT}; install that version or a "
            f"newer one, or {remedy}"
        )
    fisher = state.get("fisher", {})
    fields: list[tuple[str, Any, type | UnionType]] = [
        *((key, state.get(key, 0), int) for key in ("num_ascents", "num_skipped")),
        *((key, state.get(key, ""), str) for key in ("base", "preset", "version")),
        ("component", state.get("component"), dict | None),
        ("fisher", fisher, dict),
        ("search", state.get("search", {}), dict),
    ]
    if isinstance(fisher, dict):
        fields += [(f"fisher.{key}", fisher.get(key), dict | None) for key in ("mask", "sums")]
        fields += [(f"fisher.{key}", fisher.get(key, 0), int) for key in ("num_instances", "update")]
    for key, value, kind in fields:
        problem = _problem(key, value, kind)
        if problem:
            raise CheckpointError(
                f"the checkpoint's {STATE_KEY} state is not what fairseq_sam writes: {key} {problem}; take another "
                f"checkpoint, or {remedy}"
            )
    search = state.get("search", {})
    radii, epsilon = search.get("radii", []), search.get("epsilon")
    settings = search.get("searched_with", {})
    if not isinstance(settings, dict) or not all(isinstance(v, str | int | float | None) for v in settings.values()):
        raise CheckpointError(
            f"the checkpoint's {STATE_KEY} state is not what fairseq_sam writes: what its radius was searched for with "
            f"is {settings!r}; take another checkpoint, or {remedy}"
        )
    numbers = [*(radii if isinstance(radii, list) else [None]), *([] if epsilon is None else [epsilon])]
    if not all(isinstance(number, float) and not number <= 0 and number != math.inf for number in numbers):
        raise CheckpointError(
            f"the checkpoint's {STATE_KEY} state is not what fairseq_sam writes: the radii of its search are "
            f"{numbers}; take another checkpoint, or {remedy}"
        )
    return state


def _problem(key: str, value: Any, kind: type | UnionType) -> str:
    """What is wrong with a field of the method's state; empty if nothing is."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return f"is {type(value).__name__}"
    if isinstance(value, int) and value < 0:
        return f"is {value}"
    if isinstance(value, dict) and key not in ("fisher", "search"):
        tensors = list(value.values())
        if not all(torch.is_tensor(tensor) for tensor in tensors):
            return f"is {type(value).__name__} of other things than tensors"
        if key == "fisher.mask" and not all(tensor.dtype == torch.bool for tensor in tensors):
            return "holds other numbers than true and false"
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return "holds numbers that are not finite"
    return ""


def register_presets() -> None:
    """Register each preset as an optimizer of fairseq, once."""
    bases = base_names()
    config = _config_class(bases)
    for name in PRESETS:
        if name not in OPTIMIZER_REGISTRY:
            class_name = "".join(part.capitalize() for part in name.split("_")) + "Optimizer"
            cls = type(class_name, (SharpnessAwareOptimizer,), {"preset": name, "__module__": __name__})
            register_optimizer(name, dataclass=config)(cls)


def unwrap(optimizer: Any) -> SharpnessAwareOptimizer | None:
    """Find our optimizer inside fairseq's precision and BMUF wrappers; None if the run does not use one."""
    while optimizer is not None and not isinstance(optimizer, SharpnessAwareOptimizer):
        inner = (vars(optimizer).get(name) for name in ("fp32_optimizer", "wrapped_optimizer", "_optimizer"))
        optimizer = next((candidate for candidate in inner if isinstance(candidate, FairseqOptimizer)), None)
    return optimizer
