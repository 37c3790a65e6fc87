"""Plots of analyses, one curve for each model, for the screen and for black-and-white print."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def draw_curves(axes: Axes, curves: Curves, *, x: str, y: str, title: str = "", **options: Any) -> None:
    """Draw curves with a legend.

    Args:
        axes: where.
        curves: by name.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        title: of the panel.
        options: of ``Axes.plot``.
    """
    for number, (name, (places, values)) in enumerate(curves.items()):
        style = {
            "color": f"C{number}",
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }
        axes.plot(places, values, label=name, markersize=4, **{**style, **options})
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()


def save(made: Figure, path: Path) -> None:
    """Write a figure, 200 dots per inch.

    Args:
        made: the figure.
        path: the file, whose ending says the format; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=200)
