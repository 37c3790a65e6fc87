#!/usr/bin/env python3
"""Write the tables of ``benchmarks/README.md`` from the results that the benchmarks wrote, and draw the growth.

    python benchmarks/report.py                      # from benchmarks/results/*.tsv

A figure that misses its target is marked in its table, and listed under it.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter  # noqa: E402

from benchmarks.slopes import AXES, EXPECTED, slope  # noqa: E402
from fairseq_sam.analysis.plots import draw_curves, figure  # noqa: E402
from fairseq_sam.analysis.tables import read_rows  # noqa: E402
from scripts.recipes.marks import put_between  # noqa: E402
from scripts.recipes.tables import markdown  # noqa: E402

FOLDER = ROOT / "benchmarks"
BEGIN, END = "<!-- {}: made by benchmarks/report.py -->", "<!-- end -->"
PAPERS_TOKENS = 4000  # of a batch, from which the targets of a step hold
MISSED = " ✗"

Row = dict[str, str]


@dataclass(frozen=True)
class Target:
    """What a figure shall be.

    Attributes:
        column: of the table.
        most: the largest number that reaches it; for `at_least` the smallest.
        digits: that are compared, and shown.
        holds: for which rows.
        at_least: larger is better.
    """

    column: str
    most: float
    digits: int
    holds: Callable[[Row], bool] = lambda row: True
    at_least: bool = False

    def is_missed(self, row: Row) -> bool:
        """Whether a row has the figure, and it is not reached."""
        if not row.get(self.column) or not self.holds(row):
            return False
        value = round(float(row[self.column]), self.digits)
        return value < self.most if self.at_least else value > self.most


def _is_large(row: Row) -> bool:
    return int(row["tokens"]) >= PAPERS_TOKENS


def _of(*methods: str) -> Callable[[Row], bool]:
    return lambda row: row["method"] in methods


def _device(name: str) -> Callable[[Row], bool]:
    return lambda row: row["device"] == name and _is_large(row)


STEPS = (
    Target("over floor", 1.01, 3, _device("CPU")),
    Target("over floor", 1.03, 3, _device("GPU")),
    Target("beside", 0.02, 3, _is_large),
    Target("over base", 1.30, 3, _of("efficient_sam")),
    Target("over base", 1.25, 3, _of("interval 5", "look_sam")),
    Target("over base", 1.00, 2, _of("before the start")),
    Target("over SAM", 1.20, 3),
    Target("refresh", 0.02, 3),
)
PEERS = (Target("peer over ours", 1.00, 3, at_least=True),)
MEMORY = (
    Target("copies", 1.0, 1, _of("sam", "asam", "efficient_sam", "delta_sam")),
    Target("copies", 2.0, 1, _of("ga_sam", "gsam", "fisher_sam", "look_sam", "multistep_defense")),
)
# Tables: file, columns that are shown with their digits, targets.
TABLES = {
    "steps": (
        {"pass (s)": 3, "base (s)": 3, "step (s)": 3, "passes": 2, "over floor": 3, "error": 3, "beside": 3,
         "over base": 3, "over SAM": 3, "refresh": 3, "rounds": 0},
        STEPS,
    ),
    "peers": (
        {"peer (s)": 3, "ours (s)": 3, "peer over ours": 3, "peer copies": 2, "our copies": 2, "rounds": 0}, PEERS,
    ),
    "memory": ({"over base": 3, "copies": 2, "card's copies": 2}, MEMORY),
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Write the tables that there are results of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="default benchmarks/results")
    parser.add_argument("--readme", type=Path, default=FOLDER / "README.md", help="default benchmarks/README.md")
    args = parser.parse_args(arguments)
    text = args.readme.read_text(encoding="utf-8")
    for name, (columns, targets) in TABLES.items():
        rows = read_rows(args.results / f"{name}.tsv")
        parts = [table(rows, columns, targets), missed(rows, targets)]
        text = put_between(text, BEGIN.format(name), END, "\n\n".join(parts))
    growth = read_rows(args.results / "growth.tsv")
    text = put_between(text, BEGIN.format("growth"), END, growth_table(growth))
    args.readme.write_text(text, encoding="utf-8")
    if growth:
        draw(growth, args.results / "growth.png")
    print(f"written: {args.readme}")


def table(rows: Sequence[Row], columns: dict[str, int], targets: Iterable[Target]) -> str:
    """Return rows as Markdown; what misses its target is marked."""
    keys = [key for key in ("model", "tokens", "method", "peer", "device") if any(row.get(key) for row in rows)]
    used = {column: digits for column, digits in columns.items() if any(row.get(column) for row in rows)}
    body = [
        [
            *(row.get(key, "") for key in keys),
            *(shown(row, column, digits, targets) for column, digits in used.items()),
        ]
        for row in rows
    ]
    return markdown([[*keys, *used], *body]) if rows else "Not measured yet."


def shown(row: Row, column: str, digits: int, targets: Iterable[Target]) -> str:
    """Return a figure with its digits, marked if it misses its target."""
    if not row.get(column):
        return ""
    is_missed = any(target.column == column and target.is_missed(row) for target in targets)
    return f"{float(row[column]):.{digits}f}{MISSED if is_missed else ''}"


def missed(rows: Sequence[Row], targets: Iterable[Target]) -> str:
    """Return the list of rows that miss a target."""
    lines = []
    for row in rows:
        name = ", ".join(row[key] for key in ("model", "tokens", "method", "peer") if row.get(key))
        for target in targets:
            if target.is_missed(row):
                word = "at least" if target.at_least else "at most"
                value = f"{float(row[target.column]):.{target.digits}f}"
                lines.append(f"- {name}: {target.column} {value}, target {word} {target.most:.{target.digits}f}")
    if not rows:
        return ""
    return "\n".join(["Targets missed:", "", *lines]) if lines else "All targets are reached."


def growth_table(rows: Sequence[Row]) -> str:
    """Return fitted slopes beside the expected ones."""
    body = []
    for (axis, column), expected in EXPECTED.items():
        found = slope(rows, axis, column)
        own = [row for row in rows if row["axis"] == axis and row.get(column)]
        if found is not None:
            ends = " to ".join(f"{float(row[column]):.3g}" for row in (own[0], own[-1]))
            body.append(
                [axis, f"{own[0]['value']} to {own[-1]['value']}", column, ends, f"{found:.2f}", f"{expected:g}"]
            )
    head = ["axis", "from, to", "what grows", "its first and last figure", "slope", "expected"]
    return markdown([head, *body]) if body else "Not measured yet."


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what grows along each axis."""
    axes_shown = [axis for axis in AXES if sum(row["axis"] == axis for row in rows) > 1]
    made, panels = figure(len(axes_shown), 3)
    for axes, axis in zip(panels, axes_shown, strict=True):
        columns = [column for own, column in EXPECTED if own == axis]
        curves = {}
        for column in columns:
            own = [row for row in rows if row["axis"] == axis and row.get(column)]
            places = [float(row["parameters" if axis == "parameters" else "value"]) for row in own]
            curves[f"{column}, slope {slope(rows, axis, column) or 0:.2f}"] = (places, [float(r[column]) for r in own])
        is_plain = axis in ("K", "workers")
        draw_curves(axes, curves, x=axis, y="ratio" if is_plain else "seconds", title=axis)
        if is_plain:
            axes.set_ylim(0, 1.1 * max(max(found) for _, found in curves.values()))
        else:
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        if axis != "parameters":
            axes.set_xticks(places, [f"{place:g}" for place in places])
    made.savefig(path, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1:])
