"""Tables of obtained scores: mean and standard deviation over seeds, beside the paper's."""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.recipes.obtained import read_rows
from scripts.recipes.recipe import Metric, Recipe, RecipeError
from scripts.recipes.significance import paired_t_test

HEAD = ["method", "ours", "difference", "p", "seeds", "passes", "time", "paper", "paper's difference"]
COLUMNS_OF_EXPECTED = ("method", "mean", "std", "source")
AVERAGE = "average"  # name of the column with the averages over the others


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        method: its name.
        values: scores by seed.
        p_value: of the difference to the baseline; NaN if unknown.
        passes: mean per update, NaN if nothing was run.
        seconds: mean time of training.
        expected: the paper's mean and standard deviation, NaN where it has none.
    """

    method: str
    values: dict[int, float]
    p_value: float
    passes: float
    seconds: float
    expected: tuple[float, float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def std(self) -> float:
        """Standard deviation over seeds (n - 1); NaN for one seed."""
        numbers = list(self.values.values())
        if not all(map(math.isfinite, numbers)):
            return math.nan
        return statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def read_expected(path: Path, column: str = "") -> dict[str, tuple[float, float]]:
    """The paper's mean and standard deviation by method, from the rows of a column in ``expected.tsv``."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    own = [row for row in rows if row.get("column", "") == column]
    return {row["method"]: (float(row["mean"] or "nan"), float(row["std"] or "nan")) for row in own}


def table_rows(recipe: Recipe, obtained: Path, expected: Path) -> list[Row]:
    """Rows of one column of the paper's table, in the recipe's order; methods that are only in the paper come last.

    Args:
        recipe: one column of the recipe at one size.
        obtained: file of runs.
        expected: file of the paper's figures.
    """
    wanted = {"size": recipe.size, "column": recipe.column, "metric": recipe.metric.name}
    runs = [row for row in read_rows(obtained) if wanted.items() <= row.items()]
    paper = read_expected(expected, recipe.column)
    values = {
        method: {int(row["seed"]): _score(row["value"], obtained) for row in runs if row["method"] == method}
        for method in (*recipe.methods, *(method for method in paper if method not in recipe.methods))
    }
    rows = []
    for method, scores in values.items():
        own = [row for row in runs if row["method"] == method]
        rows.append(
            Row(
                method=method,
                values=scores,
                p_value=math.nan if method == recipe.baseline else _p_value(own, scores, values[recipe.baseline]),
                passes=_mean([float(row["passes"]) for row in own]),
                seconds=_mean([float(row["seconds"]) for row in own]),
                expected=paper.get(method, (math.nan, math.nan)),
            )
        )
    return rows


def average_rows(columns: Sequence[Sequence[Row]], expected: Path) -> list[Row]:
    """Rows of the averages over a table's columns, of the seeds that all of them have.

    Args:
        columns: rows of each column, of the same methods in the same order.
        expected: file of the paper's figures.
    """
    paper = read_expected(expected, AVERAGE)
    rows: list[Row] = []
    for same in zip(*columns, strict=True):
        seeds = sorted(set.intersection(*(set(row.values) for row in same)))
        values = {seed: statistics.fmean(row.values[seed] for row in same) for seed in seeds}
        base = rows[0].values if rows else {}
        both = sorted(values.keys() & base.keys())
        rows.append(
            Row(
                method=same[0].method,
                values=values,
                p_value=paired_t_test([values[seed] for seed in both], [base[seed] for seed in both]),
                passes=statistics.fmean(row.passes for row in same),
                seconds=statistics.fmean(row.seconds for row in same),
                expected=paper.get(same[0].method, (math.nan, math.nan)),
            )
        )
    return rows


def cells(rows: Sequence[Row], metric: Metric) -> list[list[str]]:
    """The table's words, head first; empty where nothing was run or the paper has nothing."""
    base, sign = rows[0], {"higher": 1, "lower": -1}[metric.better]
    unit = f" ({metric.unit})" if metric.unit else ""
    head = [*HEAD]
    head[1] = f"ours{unit}, {metric.name}, {metric.better} is better"
    table = [head]
    for row in rows:
        is_base = row is base
        better = "" if is_base or math.isnan(row.mean - base.mean) else _mark(sign * (row.mean - base.mean))
        table.append([
            row.method,
            _obtained(row, metric.digits),
            "" if is_base else _signed(row.mean - base.mean, metric.digits) + better,
            probability(row.p_value),
            str(len(row.values)),
            _number(row.passes, 2),
            _duration(row.seconds),
            _with_spread(*row.expected, metric.digits),
            "" if is_base else _signed(row.expected[0] - base.expected[0], metric.digits),
        ])  # fmt: skip
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [_markdown_line(table[0]), "|" + "---|" * len(table[0]), *map(_markdown_line, table[1:])]
    return "\n".join(lines) + "\n"


def latex(table: Sequence[Sequence[str]]) -> str:
    """A LaTeX table for the package booktabs."""
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in table]
    body = [r"\begin{tabular}{l" + "r" * (len(table[0]) - 1) + "}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def tsv(table: Sequence[Sequence[str]]) -> str:
    """A table with tabs between its columns."""
    return "\n".join("\t".join(row) for row in table) + "\n"


FORMATS = {"markdown": markdown, "latex": latex, "tsv": tsv}


def _score(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"{path} has the value {text!r}, which is no number") from None


def _p_value(rows: Sequence[dict[str, str]], scores: dict[int, float], base: dict[int, float]) -> float:
    """Of the bootstrap, the largest over seeds; else of a paired t-test over the seeds that both have."""
    given = [float(row["p_value"]) for row in rows if row["p_value"]]
    if given:
        return max(given)
    seeds = sorted(scores.keys() & base.keys())
    return paired_t_test([scores[seed] for seed in seeds], [base[seed] for seed in seeds])


def _mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers) if numbers else math.nan


def _mark(gain: float) -> str:
    return " ↑" if gain > 0 else " ↓" if gain < 0 else ""


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}" if math.isfinite(value) else "∞"


def _obtained(row: Row, digits: int) -> str:
    """The scores of a method; where runs have none, such as a correlation of constants, how many they are."""
    lost = sum(not math.isfinite(value) for value in row.values.values())
    text = _with_spread(row.mean, row.std, digits)
    return f"{text} ({lost} of {len(row.values)} diverged)".strip() if lost else text


def probability(value: float) -> str:
    """A p-value with three digits; empty if unknown."""
    return "<0.001" if value < 0.001 else _number(value, 3)


def _signed(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:+.{digits}f}"


def _with_spread(mean: float, std: float, digits: int) -> str:
    return _number(mean, digits) + ("" if math.isnan(std) or math.isnan(mean) else f" ± {std:.{digits}f}")


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _markdown_line(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _escaped(cell: str) -> str:
    return "".join(_LATEX.get(character, character) for character in cell)


_LATEX = {
    "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "ρ": r"$\rho$", "×": r"$\times$",
    "‖": r"$\Vert$", "√": r"$\surd$", "ε": r"$\epsilon$", "δ": r"$\delta$", "∞": r"$\infty$", "<": r"$<$",
}  # fmt: skip
