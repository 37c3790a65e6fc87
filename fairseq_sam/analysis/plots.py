"""Plots of analyses, one curve for each model, for the screen and for black-and-white print."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator

BITS = "bits per token or sentence"  # the unit of losses
MARKERS, LINES = "osD^vPX*", ("-", "--", "-.", ":")
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # by name, places and values


def figure(
    panels: int = 1, columns: int | None = None, *, width: float = 4.8, height: float = 3.8
) -> tuple[Figure, list[Axes]]:
    """Return a figure and the axes of its panels.

    Args:
        panels: how many.
        columns: in a row, default all.
        width: of a panel, inches.
        height: of a panel, inches.
    """
    columns = min(columns or panels, panels)
    rows = -(-panels // columns)
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [axis for row in made.subplots(rows, columns, squeeze=False) for axis in row]
    for spare in axes[panels:]:
        spare.set_axis_off()
    return made, axes[:panels]


def draw_curves(
    axes: Axes,
    curves: Curves,
    *,
    x: str,
    y: str,
    title: str = "",
    errors: Mapping[str, Sequence[float]] | None = None,
    legend: bool = True,
    **options: Any,
) -> None:
    """Draw curves, with a legend.

    Args:
        axes: where.
        curves: by name, which is shown as it is. One without values is not drawn, but keeps its colour, so that a
            model has the same one in all panels.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        title: of the panel.
        errors: half the length of the error bars of each value, by name; default none.
        legend: whether the panel has one; without it ``show_names_below`` makes one for all panels.
        options: of ``Axes.plot``.
    """
    drawn = [name for name, (places, _) in curves.items() if places]
    for number, (name, (places, values)) in enumerate(curves.items()):
        if not places:
            continue
        style = {
            "color": f"C{number}",
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }
        (line,) = axes.plot(places, values, label=str(number), markersize=4, **{**style, **options})
        line.set_gid(name)
        if errors is not None:
            axes.errorbar(places, values, errors[name], fmt="none", ecolor=f"C{number}", capsize=3)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if drawn and legend:
        show_names(axes, drawn)


def show_names(axes: Axes, names: Iterable[str], **options: Any) -> None:
    """Draw a legend; the names are shown as they are, also with signs that matplotlib takes for formulas.

    Args:
        axes: whose curves have labels, which the names replace.
        names: in the order of the curves.
        options: of ``Axes.legend``.
    """
    _write_names(axes.legend(**{"fontsize": "small", "framealpha": 0.7, **options}), names)


def _write_names(legend: Legend, names: Iterable[str]) -> None:
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def show_names_below(made: Figure, panels: Iterable[Axes], most: int = 4) -> None:
    """Draw one legend for all panels, below them, where it covers no curve.

    Args:
        made: the figure.
        panels: with curves of ``draw_curves``, or other lines and bars whose ``gid`` is a name.
        most: names in a row.
    """
    lines = {
        str(each.get_gid()): each for axes in panels for each in [*axes.get_lines(), *axes.patches] if each.get_gid()
    }
    width = max(map(len, lines), default=0) * 0.09 + 0.6  # of a name with its line, inches
    columns = max(1, min(len(lines), most, int(made.get_figwidth() / width)))
    if lines:
        labels = [str(number) for number in range(len(lines))]
        _write_names(made.legend(list(lines.values()), labels, loc="outside lower center", ncols=columns), lines)


def set_whole_numbers(axes: Axes) -> None:
    """Make the ticks of the horizontal axis whole numbers, such as ranks and layers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def set_few_ticks(axes: Axes, most: int = 5) -> None:
    """Make the horizontal axis have so few ticks that small numbers with many zeros do not cover one another."""
    axes.xaxis.set_major_locator(MaxNLocator(most))


def set_log_scale(axes: Axes) -> None:
    """Make the scale of the values a logarithmic one; with values that are not positive, one that is linear near 0.

    Args:
        axes: with curves on it.
    """
    curves = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]  # no ends of error bars
    values = [float(value) for line in curves for value in np.asarray(line.get_ydata(), float) if math.isfinite(value)]
    sizes = [abs(value) for value in values if value]
    if sizes and min(values) > 0:
        axes.set_yscale("log")
    elif sizes:
        axes.set_yscale("symlog", linthresh=max(min(sizes), 1e-4 * max(sizes)))


def save(made: Figure, path: Path) -> None:
    """Write a figure, 200 dots per inch.

    Args:
        made: the figure.
        path: the file, whose ending says the format; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=200)
