"""The method's state inside a checkpoint, and what is wrong with one that is not ours."""

import math
from types import UnionType
from typing import Any

import torch

from fairseq_sam._version import __version__
from fairseq_sam.adapter.errors import CheckpointError

STATE_KEY = "sharpness_aware"  # where the method's state rides in the optimizer's state dict
STATE_FORMAT = 1  # of that state; goes up when an older version could not read it


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
