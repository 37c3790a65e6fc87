"""Gradient norms by epoch and by layer (GA-SAM Figs. 4, 5), from the log of ``--sam-gradient-log``."""

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYER = re.compile(r"(?:^|\.)(?P<stack>\w+)\.layers\.(?P<number>\d+)\.")


@dataclass(frozen=True)
class Gradient:
    """The gradient of one update.

    Attributes:
        epoch: counted from 1.
        update: counted from 1.
        norm: 2-norm of the whole, before clipping.
        norms: 2-norm of each parameter's part, by name.
    """

    epoch: int
    update: int
    norm: float
    norms: Mapping[str, float]


def read_gradients(path: str | Path) -> list[Gradient]:
    """Read a log.

    Args:
        path: ``gradients.jsonl`` in a run's folder.

    Raises:
        ValueError: if the file holds no gradient, or is not such a log.
        OSError: if it cannot be read.
    """
    found = []
    for line, row in log_lines(Path(path)):
        try:
            norms = {str(name): _norm(value) for name, value in row["norms"].items()}
            found.append(Gradient(int(row["epoch"]), int(row["update"]), _norm(row["norm"]), norms))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise ValueError(f"expected a log of --sam-gradient-log, but {path} has the line {line[:80]!r}") from None
    if not found:
        raise ValueError(f"expected a log of --sam-gradient-log with at least one update, got {path}")
    return found


def _norm(value: Any) -> float:
    norm = float(value)
    if not 0 <= norm < math.inf:
        raise ValueError(f"expected a norm, got {value!r}")
    return norm


def log_lines(path: Path) -> list[tuple[str, Any]]:
    """Return the lines of a log and what they hold; a line that a kill has cut off is left out.

    Args:
        path: the log.
    """
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append((line, json.loads(line)))
        except json.JSONDecodeError:
            continue
    return found


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack and the number, counted from 1, of the layer that owns a parameter; None outside of layers."""
    match = LAYER.search(name)
    return (match["stack"], int(match["number"]) + 1) if match else None


def stack_of(name: str) -> str:
    """Return the stack of layers that owns a parameter, or the first part of its name."""
    layer = layer_of(name)
    return layer[0] if layer else name.split(".")[0]


def norms_by_epoch(
    gradients: Sequence[Gradient], group: Callable[[str], str] = stack_of
) -> dict[str, dict[int, float]]:
    """Average the gradient's norm over each epoch, for the whole model and for groups of parameters.

    Args:
        gradients: of a run.
        group: from a parameter's name to that of its group.

    Returns:
        For ``all`` and each group, the mean norm by epoch.
    """
    epochs = sorted({gradient.epoch for gradient in gradients})
    names = sorted({group(name) for gradient in gradients for name in gradient.norms})

    def mean(epoch: int, select: Callable[[Gradient], float]) -> float:
        return statistics.fmean(select(gradient) for gradient in gradients if gradient.epoch == epoch)

    whole = {"all": {epoch: mean(epoch, lambda gradient: gradient.norm) for epoch in epochs}}
    parts = {
        name: {epoch: mean(epoch, lambda g, name=name: _joined(g, lambda p: group(p) == name)) for epoch in epochs}  # type: ignore[misc]
        for name in names
    }
    return whole | parts


def norms_by_layer(gradients: Sequence[Gradient]) -> dict[str, dict[int, float]]:
    """Average the norm of each layer's gradient over all updates.

    Args:
        gradients: of a run.

    Returns:
        For each stack of layers (such as ``encoder`` and ``decoder``), the mean norm by layer number, counted from 1.
    """
    layers = sorted({layer for gradient in gradients for layer in map(layer_of, gradient.norms) if layer})
    found: dict[str, dict[int, float]] = {}
    for layer in layers:
        norms = [_joined(gradient, lambda name, layer=layer: layer_of(name) == layer) for gradient in gradients]  # type: ignore[misc]
        found.setdefault(layer[0], {})[layer[1]] = statistics.fmean(norms)
    return found


def _joined(gradient: Gradient, select: Callable[[str], bool]) -> float:
    return math.hypot(*(norm for name, norm in gradient.norms.items() if select(name)))
