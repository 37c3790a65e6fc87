"""What came out of the recipes, a line for each: the paper's gain, ours, and whether it is more than chance."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.recipes.obtained import MINUTES, OBTAINED
from scripts.recipes.recipe import Recipe, column_names, read_recipe, recipe_folders, size_names
from scripts.recipes.tables import Row, probability, table_rows

SIGNIFICANT = 0.05
HEAD = ["recipe", "what the paper trains", "method", "paper's gain", "our gain", "p", "seeds", "verdict"]


class Comparison(NamedTuple):
    """A method beside the baseline in one column of a table; gains are positive where the method is better."""

    method: str
    paper: float
    ours: float
    p_value: float
    seeds: int
    digits: int

    @property
    def verdict(self) -> str:
        """In a word: see ``verdict``."""
        return verdict(self.ours, self.p_value)


def verdict(gain: float, p_value: float) -> str:
    """Say in a word what a difference to the baseline shows.

    Args:
        gain: positive where the method is better.
        p_value: of the paired test; NaN if there is none, as for one seed.

    Returns:
        ``gain`` or ``loss`` for p < 0.05, else ``no gain``; ``undecided`` without a p-value.
    """
    if math.isnan(p_value):
        return "undecided"
    return "no gain" if p_value >= SIGNIFICANT else "gain" if gain > 0 else "loss"


def comparisons(folder: Path, size: str) -> list[Comparison]:
    """The comparisons of one method with the baseline that were run and that the paper has, a column each.

    The method is the one that gains most in the paper, of those that were run. Columns of training times are left out.

    Args:
        folder: the recipe's.
        size: ``mini`` or ``paper``.
    """
    columns = [read_recipe(folder, size, column) for column in column_names(folder, size)]
    found = [
        _compared(recipe, rows[0], row)
        for recipe in columns
        if recipe.metric.name != MINUTES
        for rows in [table_rows(recipe, folder / OBTAINED, folder / "expected.tsv")]
        for row in rows[1:]
        if row.values and rows[0].values and not math.isnan(row.expected[0] - rows[0].expected[0])
    ]
    if not found:
        return []
    best = max(found, key=lambda comparison: comparison.paper).method
    return [comparison for comparison in found if comparison.method == best]


def verdicts(size: str = "mini") -> list[list[str]]:
    """The table's words, head first: a line for each recipe that was run and whose figures the paper has.

    Args:
        size: ``mini`` or ``paper``.
    """
    table = [HEAD]
    for folder in recipe_folders():
        found = comparisons(folder, size) if size in size_names(folder) else []
        if found:
            recipe = read_recipe(folder, size)
            digits = found[0].digits
            p_values = [each.p_value for each in found if not math.isnan(each.p_value)]
            table.append([
                f"[{recipe.paper}](examples/{recipe.name}/README.md)",
                recipe.title + (f" ({len(found)} columns)" if len(found) > 1 else ""),
                found[0].method,
                _range([f"{each.paper:+.{digits}f}" for each in sorted(found, key=lambda each: each.paper)]),
                _range([f"{each.ours:+.{digits}f}" for each in sorted(found, key=lambda each: each.ours)]),
                _range([probability(p_value) for p_value in sorted(p_values)]),
                _range([str(seeds) for seeds in sorted(each.seeds for each in found)]),
                _summary([each.verdict for each in found]),
            ])  # fmt: skip
    return table


def _compared(recipe: Recipe, base: Row, row: Row) -> Comparison:
    sign = {"higher": 1, "lower": -1}[recipe.metric.better]
    return Comparison(
        method=row.method,
        paper=sign * (row.expected[0] - base.expected[0]),
        ours=sign * (row.mean - base.mean),
        p_value=row.p_value,
        seeds=len(row.values.keys() & base.values.keys()),
        digits=recipe.metric.digits,
    )


def _range(ordered: Sequence[str]) -> str:
    """Return the first and the last of some, or the one that there is."""
    return " to ".join(dict.fromkeys((*ordered[:1], *ordered[-1:])))


def _summary(words: Sequence[str]) -> str:
    """One word where all agree, else each with its number."""
    if len(set(words)) == 1:
        return words[0]
    return ", ".join(f"{word} in {words.count(word)}" for word in dict.fromkeys(words))
