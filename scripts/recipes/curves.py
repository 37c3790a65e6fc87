"""Obtained scores over what columns or methods differ in: a sampling rate, a sparse ratio, their cost."""

import math
import textwrap
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


def draw(shown: Sequence[Panel], x: str | None, title: str, out: Path, span: tuple[float, float] | None = None) -> None:
    """Draw mean and standard deviation over seeds into a file, whose ending says the format.

    Args:
        shown: the plots, side by side.
        x: what the horizontal axis is.
        title: above them.
        out: file to write.
        span: lowest and highest score on the vertical axes; an arrow with its number stands for a mean that lies
            outside. Default all scores.
    """
    from fairseq_sam.analysis.plots import MARKERS, figure, save, show_names_below

    made, every = figure(len(shown), width=7.2 if len(shown) == 1 else 5.4, height=4.8)
    made.suptitle(textwrap.fill(title, int(11 * made.get_figwidth())))
    for axes, panel in zip(every, shown, strict=True):
        for number, (name, level) in enumerate(panel.levels.items()):
            axes.axhline(level.mean, color=f"C{number}", linestyle="--").set_gid(name)
            if not math.isnan(level.std):
                axes.axhspan(level.mean - level.std, level.mean + level.std, color=f"C{number}", alpha=0.12, lw=0)
        for number, (name, points) in enumerate(panel.curves.items(), start=len(panel.levels)):
            color = f"C{number}"
            places, means = [point.x for point in points], [point.mean for point in points]
            spread = [0.0 if math.isnan(point.std) else point.std for point in points]
            (line,) = axes.plot(places, means, color=color, marker=MARKERS[number % len(MARKERS)])
            line.set_gid(name)
            if len(points) == 1:
                axes.errorbar(places, means, yerr=spread, fmt="none", ecolor=color, capsize=3)
            low, high = ([mean + sign * std for mean, std in zip(means, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=color, alpha=0.15, lw=0)
            for place, mean in zip(places, means, strict=True):
                if span and not span[0] <= mean <= span[1]:
                    edge, up = (span[0], 1) if mean < span[0] else (span[1], -1)
                    axes.annotate(
                        f"{mean:.1f}", (place, edge), (0, 26 * up), textcoords="offset points", ha="center",
                        color=color, arrowprops={"arrowstyle": "->", "color": color},
                    )  # fmt: skip
        if span:
            axes.set_ylim(*span)
        axes.set_title(panel.title)
        axes.set_xlabel(LABELS.get(x or RATE, x or RATE))
        unit = f" ({panel.metric.unit})" if panel.metric.unit else ""
        axes.set_ylabel(f"{panel.metric.name}{unit}")
        axes.grid(alpha=0.3)
    show_names_below(made, every)
    save(made, out)
