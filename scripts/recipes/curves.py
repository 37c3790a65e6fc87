"""Obtained scores over what columns or methods differ in: a sampling rate, a sparse ratio, their cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scripts.recipes.recipe import Metric, Recipe, RecipeError
from scripts.recipes.tables import Row, table_rows

RATE = "rate"
PASSES = "passes"
LABELS = {RATE: "training data (%)", PASSES: "forward-backward passes per update"}


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
        x: where it is.
        mean: over seeds.
        std: over seeds; NaN for one seed.
    """

    x: float
    mean: float
    std: float


@dataclass
class Panel:
    """A plot.

    Attributes:
        title: what it shows.
        metric: the score.
        curves: points by name, from the left.
        levels: scores of methods that have no x, by name.
    """

    title: str
    metric: Metric
    curves: dict[str, list[Point]] = field(default_factory=dict)
    levels: dict[str, Point] = field(default_factory=dict)

    def add(self, name: str, row: Row, x: float | None) -> None:
        """Add a method's scores, if there are any."""
        if not row.values:
            return
        if x is None:
            self.levels[name] = Point(math.nan, row.mean, row.std)
        else:
            self.curves.setdefault(name, []).append(Point(x, row.mean, row.std))
            self.curves[name].sort()


def panels(recipes: Sequence[Recipe], obtained: Path, x: str | None = None) -> list[Panel]:
    """Return the plots of a recipe that have scores.

    Args:
        recipes: its columns at one size.
        obtained: file of runs.
        x: an option by which columns differ, such as ``rate``: a plot for each task and score, with a curve for each
            method. Or a flag by which methods differ, such as ``sam-sparsity``: a plot for each column, with a curve
            through the methods that have the flag. Or ``passes``: a plot for each column, with a point for each method
            over what it costs. Default ``rate``.

    Raises:
        RecipeError: if neither columns nor methods have it, or there are no scores.
    """
    x = x or RATE
    of_columns = all(x in recipe.options for recipe in recipes)
    of_methods = x == PASSES or any(x in flags for recipe in recipes for flags in recipe.methods.values())
    if not (of_columns or of_methods):
        raise RecipeError(
            f"--x must be an option of the columns or a flag of some methods of the recipe, or passes, got {x!r}"
        )
    found: dict[str, Panel] = {}
    for recipe in recipes:
        task = column_without_rate(recipe) if of_columns else recipe.column
        panel = found.setdefault(f"{task}, {recipe.metric.name}", Panel(task, recipe.metric))
        for row in table_rows(recipe, obtained, recipe.folder / "expected.tsv"):
            flags = recipe.methods.get(row.method, {})
            if of_columns:
                share = float(recipe.options[x])
                panel.add(row.method, row, 100.0 * share if x == RATE else share)
            elif x == PASSES:
                panel.add(row.method, row, row.passes)
            elif x in flags:
                panel.add(str(flags["optimizer"]), row, float(flags[x]))
            else:
                panel.add(row.method, row, None)
    drawn = [panel for panel in found.values() if panel.curves]
    if not drawn:
        raise RecipeError(f"{obtained} has no scores of {recipes[0].name} at --size {recipes[0].size}; run it first")
    return drawn


def column_without_rate(recipe: Recipe) -> str:
    """The name of the column, or the title of a recipe whose columns are rates alone."""
    rate = recipe.options.get(RATE)
    name = recipe.column if rate is None else recipe.column.removesuffix(f"{float(rate):.0%}")
    return name.strip() or recipe.title


def draw(shown: Sequence[Panel], x: str | None, title: str, out: Path) -> None:
    """Draw mean and standard deviation over seeds into a file, whose ending says the format.

    Args:
        shown: the plots, side by side.
        x: what the horizontal axis is.
        title: above them.
        out: file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(shown) + 0.4, 3.9), layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for number, (name, level) in enumerate(panel.levels.items()):
            axes.axhline(level.mean, color=f"C{number}", linestyle="--", label=name)
            if not math.isnan(level.std):
                axes.axhspan(level.mean - level.std, level.mean + level.std, color=f"C{number}", alpha=0.12, lw=0)
        for number, (name, points) in enumerate(panel.curves.items(), start=len(panel.levels)):
            places, means = [point.x for point in points], [point.mean for point in points]
            spread = [0.0 if math.isnan(point.std) else point.std for point in points]
            bars = spread if len(points) == 1 else None
            look = {"color": f"C{number}", "marker": "osD^vPX*"[number % 8], "label": name, "capsize": 3}
            axes.errorbar(places, means, yerr=bars, **look)
            low, high = ([mean + sign * std for mean, std in zip(means, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=f"C{number}", alpha=0.15, lw=0)
        axes.set_title(panel.title)
        axes.set_xlabel(LABELS.get(x or RATE, x or RATE))
        unit = f" ({panel.metric.unit})" if panel.metric.unit else ""
        axes.set_ylabel(f"{panel.metric.name}{unit}")
        axes.grid(alpha=0.3)
        axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
