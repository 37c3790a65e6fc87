"""The axes that a method is a choice on: their choices, and the numbers that belong to single choices."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fairseq_sam.core.scales import SCALES

ASCENTS = ("batch", "weighted", "instance", "random")
GRANULARITIES = ("element", "filter", "tensor", "layer", "model", "sentence")
BALLS = ("model", "group")
STEP_RULES = ("steepest", "gradient")
MASKS = ("none", "fisher", "random")
DESCENTS = ("last", "mean", "mean_ascent", "gsam", "sds")
BETWEENS = ("plain", "reuse")
PLACES = ("weights", "embeddings")
STARTS = ("zero", "uniform")
GRADIENTS = ("mean", "sum")
SCOPES = ("microbatch", "update")
DROPOUTS = ("same", "fresh")
ROUNDINGS = ("nearest", "stochastic")

# Granularities whose groups are cut along tensors; they have no meaning on a flattened parameter vector.
TENSOR_GRANULARITIES = ("filter", "tensor", "layer")

CHOICES: dict[str, tuple[str, ...]] = {
    "ascent": ASCENTS,
    "scale": tuple(SCALES),
    "granularity": GRANULARITIES,
    "ball": BALLS,
    "step_rule": STEP_RULES,
    "mask": MASKS,
    "descent": DESCENTS,
    "between": BETWEENS,
    "where": PLACES,
    "init": STARTS,
    "gradient": GRADIENTS,
    "scope": SCOPES,
    "dropout": DROPOUTS,
    "rounding": ROUNDINGS,
}


DEFAULT_MAX_SCALE = 1000.0


class Setting(NamedTuple):
    """A number that only some choices of one axis use.

    Attributes:
        axis: the axis.
        defaults: the default for each choice that uses the number.
        allowed: the allowed values, in words.
        least: smallest allowed value.
        most: largest allowed value.
    """

    axis: str
    defaults: Mapping[str, float]
    allowed: str
    least: float
    most: float = math.inf


TINY, BELOW_ONE = math.ulp(0.0), math.nextafter(1.0, 0.0)  # ends of open intervals

# Defaults: delta_eta, delta-SAM table 5; sparsity (fisher) and mask_interval, FSAM 6.1; sparsity (random) and
# esam_gamma, Du et al. 2022 (beta and gamma 0.5 in their runs on CIFAR); look_alpha, Liu et al. 2022; fisher_samples
# and gsam_alpha are ours, the papers at hand give no number for language models.
SETTINGS: dict[str, Setting] = {
    "delta_eta": Setting("ascent", {"weighted": 1e-4}, "a finite number > 0", TINY),
    "sparsity": Setting("mask", {"fisher": 0.9, "random": 0.5}, "a number in [0, 1)", 0.0, BELOW_ONE),
    "mask_interval": Setting("mask", {"fisher": 100}, "an integer >= 1", 1),
    "fisher_samples": Setting("mask", {"fisher": 128}, "an integer >= 1", 1),
    "gsam_alpha": Setting("descent", {"gsam": 0.4}, "a finite number >= 0", 0.0),
    "esam_gamma": Setting("descent", {"sds": 0.5}, "a number in (0, 1]", TINY, 1.0),
    "look_alpha": Setting("between", {"reuse": 0.7}, "a finite number >= 0", 0.0),
}


def flag(field: str) -> str:
    """Name a field as a plain-PyTorch user and a command-line user know it."""
    return f"{field} (--sam-{field.replace('_', '-')})"


def parse_norm(value: str | float) -> float:
    """Return the order `p` of a norm given as ``l2``, ``linf`` or a number.

    Args:
        value: ``"l2"``, ``"linf"`` (any case), or a number in (1, inf], also as a string.

    Returns:
        The order, a float in (1, inf].

    Raises:
        ValueError: if the value is none of these.
    """
    names = {"l2": 2.0, "linf": math.inf}
    try:
        order = names[value.lower()] if isinstance(value, str) and value.lower() in names else float(value)
    except (TypeError, ValueError):
        order = math.nan
    if not order > 1.0:
        raise ValueError(f"{flag('norm')} must be l2, linf or a number > 1, got {value!r}")
    return order


# Fields that may be None: no value, or one that follows from the others.
OPTIONAL = frozenset(("step_size", "epsilon_min", "lr_max", "end_epoch", "end_update", *SETTINGS))


def check_number(
    field: str,
    value: Any,
    least: float,
    allowed: str,
    *,
    strict: bool = False,
    finite: bool = True,
    most: float = math.inf,
) -> None:
    """Refuse a field's value that is no number in its range.

    Args:
        field: name of the field.
        value: its value.
        least: smallest allowed value; not allowed itself if `strict`.
        allowed: the allowed values, in words.
        strict: whether the value must be above `least`.
        finite: whether infinity is refused.
        most: largest allowed value.

    Raises:
        ValueError: names flag, value and range.
    """
    if value is None and field in OPTIONAL:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not number
        or not (value > least if strict else value >= least)
        or value > most
        or (finite and math.isinf(value))
    ):
        raise ValueError(f"{flag(field)} must be {allowed}, got {value!r}")


def check_integer(field: str, value: Any, least: int) -> None:
    """Refuse a field's value that is no integer, or below the least.

    Args:
        field: name of the field.
        value: its value.
        least: smallest allowed value.

    Raises:
        ValueError: names flag, value and range.
    """
    if value is None and field in OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{flag(field)} must be an integer >= {least}, got {value!r}")


def check_pattern(field: str, value: Any) -> None:
    """Refuse a field's value that is no regular expression.

    Args:
        field: name of the field.
        value: its value.

    Raises:
        ValueError: names flag, value and error.
    """
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{flag(field)} must be a regular expression, got {value!r}: {error}") from error


def resolved(field: str, value: Any, setting: Setting, choice: str) -> Any:
    """Return a setting's value: the given one, its default, or None where the choice does not use it.

    Args:
        field: name of the setting.
        value: what is given; None for the default.
        setting: its row of ``SETTINGS``.
        choice: the choice on the setting's axis.

    Raises:
        ValueError: if the choice does not use the setting, or the value is out of range.
    """
    if value is None:
        return setting.defaults.get(choice)
    if choice not in setting.defaults:
        users = " or ".join(f"--sam-{setting.axis} {name}" for name in setting.defaults)
        raise ValueError(
            f"{flag(field)} is only used by {users}, got {field} {value} with {setting.axis} {choice!r}; "
            f"leave it out or change {flag(setting.axis)}"
        )
    if "integer" in setting.allowed:
        check_integer(field, value, int(setting.least))
    else:
        check_number(field, value, setting.least, setting.allowed, most=setting.most)
    return value
