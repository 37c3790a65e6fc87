"""What a run's flags say: the method, how its radius is found, the base optimizer."""

import math
from argparse import Namespace
from dataclasses import MISSING
from typing import Any

from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY
from omegaconf import DictConfig, OmegaConf

from fairseq_sam.adapter.flags import SAM_FLAGS, base_flags, base_names, is_interpolation
from fairseq_sam.adapter.radius import UPDATES
from fairseq_sam.analysis.epsilon import FRACTION
from fairseq_sam.core.axes import flag
from fairseq_sam.core.method import PRESETS, Method

AUTO = "auto"  # as --sam-epsilon: the run finds the radius


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
            if name not in own and value is not None and not is_interpolation(declared.default):
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
