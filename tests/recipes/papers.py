"""What the papers' texts say, as far as recipes quote it: figures of tables by row and column, numbers by section.

The texts are not part of the project: they are looked for in ``shared/papers`` beside its folder, under the names in
``FILES``. Without that folder, the tests that compare the recipes with them are skipped, with the reason: in
``test_papers.py`` that of the figures in ``expected.tsv``, in ``test_sources.py`` those of the places that sources name
and of the settings in the papers' tables and lists. All else runs.

Some of the texts' tables came through with faults, which are named where they matter: heads that are broken up, shifted
or lost, and two rows on one line.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

from scripts.recipes.recipe import EXAMPLES, read_recipe, recipe_folders, size_names

FOLDER = EXAMPLES.parents[1] / "shared" / "papers"
FILES = {
    "FSAM": "fsam.txt", "GA-SAM": "ga-sam.txt", "δ-SAM": "delta-sam.txt",
    "SAM for language models": "sam-language-models.txt",
}  # fmt: skip

RECIPES = [path.name for path in recipe_folders()]
TABLES = [name for name in RECIPES if "paper" in size_names(name)]  # the others make models for them
# A paper's plot has no figures that could be written down.
WITH_FIGURES = [name for name in TABLES if "Figure" not in read_recipe(name, "paper").paper]


@cache
def lines_of(file: str) -> list[str]:
    """Lines of a paper's text, without the marks of bold, underlined and mathematical text."""
    text = (FOLDER / file).read_text(encoding="utf-8").replace(r"$\delta$ -", "δ-")
    return re.sub(r"</?\w+>|[*$\\]", "", text).split("\n")


# -- tables ------------------------------------------------------------------------------------------------------------

FIGURE = r"\d+\.\d+"
SPREAD = r"±\d+(?:\.\d+)?"
CITATION = r" *\([A-Z][^()]*\d{4}\w?\)"


class Table(NamedTuple):
    """Rows of a table that follow each other.

    Attributes:
        file: the paper's text.
        after: text that only one line has, above the table's head.
        head: how the first line of the table's head begins.
        columns: by the words of a head's cell, those of several lines together, the recipe's columns whose figures
            stand below it.
        labels: by the recipe's method, how its row begins, if not with the method's name.
        first: what the first line of the rows has, or their heading; default the line below the head.
        end: what the first line after the rows has; default it is empty.
        num_heads: lines of the head.
        by_words: whether the figures of a line follow the words of the head's last line, and not its cells.
        cells: those of the line that belong to the rows.
        turned: whether the recipe's columns are the rows.
        integers: whether figures have no digits after a point.
    """

    file: str
    after: str
    head: str
    columns: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, str] = {}
    first: str = ""
    end: str = ""
    num_heads: int = 1
    by_words: bool = False
    cells: slice = slice(0, None)
    turned: bool = False
    integers: bool = False


class Row(NamedTuple):
    """A line of a table: its number from 1, how it begins, and its figures by cell."""

    line: int
    label: str
    cells: list[list[str]]


def figure(tables: Sequence[Table], column: str, method: str) -> tuple[str, str]:
    """Find a figure of a recipe's table.

    Args:
        tables: where its rows stand.
        column: of the recipe.
        method: of the recipe.

    Returns:
        The figure, with its deviation if it has one, empty where the paper has a dash; and its line, as
        ``expected.tsv`` names it.

    Raises:
        LookupError: if there is none.
    """
    for table in tables:
        row, above = (column, method) if table.turned else (method, column)
        if any(above in names for names in table.columns.values()):
            found = _figure(table, above, table.labels.get(row, row))
            if found:
                return found
    raise LookupError(f"the paper's table has no {method!r} in {column!r}")


def _figure(table: Table, column: str, label: str) -> tuple[str, str] | None:
    head, rows = _read(table)
    own = ((words, names) for words, names in table.columns.items() if column in names)
    words, together = next((words, names) for words, names in own if words in head[table.cells])
    cell, labels = head.index(words, table.cells.start), [label, *table.labels.values()]
    for row, below in zip(rows, [*rows[1:], None], strict=True):
        figures, names = row.cells[cell], _rows_of_line(row.label, labels)
        if below and not below.cells[cell] and len(figures) > len(names) * len(together):
            names = [*names, *_rows_of_line(below.label, labels)]  # the figure of the line below has gone up
        if label in names:
            if len(figures) != len(names) * len(together):
                raise LookupError(f"{table.file}:{row.line}: expected {together} of {names}, got {figures}")
            found = figures[names.index(label) * len(together) + together.index(column)]
            return found.removeprefix("-"), f"{table.file}:{row.line}"
    return None


def _read(table: Table) -> tuple[list[str], list[Row]]:
    """The words above each cell, and the lines with figures."""
    lines = lines_of(table.file)
    (after,) = (number for number, line in enumerate(lines) if table.after in line)
    start = next(n for n in range(after + 1, len(lines)) if lines[n].strip().startswith(table.head))
    heads = [line.split("\t") for line in lines[start : start + table.num_heads]]
    if table.by_words:
        head = re.sub(r"\([^()]*\)", "", " ".join(heads[-1])).split()
        head = [word for word in head if word not in ("Approach", "Corruption")]
    else:
        head = [" ".join(" ".join(cells).split()) for cells in zip_longest(*heads, fillvalue="")][1:]
    first = next(n for n in range(start + table.num_heads, len(lines)) if table.first in lines[n])
    rows = []
    for number, line in enumerate(lines[first:], start=first + 1):
        if number > first + 1 and (table.end in line if table.end else not line):
            break
        rows.append(_row(number, line, table.by_words, r"\d+" if table.integers else FIGURE))
    return head, [row for row in rows if any(row.cells)]


def _row(number: int, line: str, by_words: bool, figure: str) -> Row:
    if by_words:
        radius = re.match(r".*ϵ = \S+ ", line)  # part of a row's name
        rest = re.sub(r"\([^()]*\)", "", line[radius.end() :] if radius else line)
        figures = re.findall(f"{FIGURE}{SPREAD}", rest) or re.findall(FIGURE, rest)
        label = radius[0] if radius else line.partition(figures[0])[0] if figures else line
        return Row(number, label.strip(), [[each] for each in figures])
    label, *cells = line.split("\t")
    return Row(number, re.sub(CITATION, "", label).strip(), [re.findall(f"{figure}|^-$", cell) for cell in cells])


def _rows_of_line(label: str, labels: Sequence[str]) -> list[str]:
    """A line's rows: one, or two of those that are asked for."""
    pairs = ([first, second] for first in labels for second in labels if label == f"{first} {second}")
    return next(pairs, [label])


# -- sections ----------------------------------------------------------------------------------------------------------

SECTION = r"(?:\d|[A-C])(?:\.\d)*"


@cache
def passage(file: str, name: str) -> str | None:
    """Text of a section up to the next heading, or of a table or figure with its caption; None if there is none.

    Where a section says that settings are listed in tables, these are part of it.

    Args:
        file: the paper's text.
        name: such as ``4.2``, ``C.2.1``, ``Table 10`` or ``Figure 2``.
    """
    lines = lines_of(file)
    if " " in name:
        captions = [number for number, line in enumerate(lines) if line.startswith(f"{name}:")]
        return "\n".join(_around(lines, captions[0])) if captions else None
    found = ((number, re.match(rf"[# ]*({SECTION})\s+[A-Z]", line)) for number, line in enumerate(lines))
    headings = {number: heading[1] for number, heading in found if heading}
    for number, heading in headings.items():
        if heading == name:
            end = min((other for other in headings if other > number), default=len(lines))
            text = "\n".join(lines[number:end])
            listed = re.search(r"listed in (.*?)\.\s", text)
            tables = re.findall(r"\d+", listed[1]) if listed else []
            return "\n".join([text, *(passage(file, f"Table {each}") or "" for each in tables)])
    # Where the text has lost a heading, those of its parts are there.
    return "" if any(heading.startswith(f"{name}.") for heading in headings.values()) else None


def _around(lines: Sequence[str], caption: int) -> list[str]:
    """A caption, and the lines of a table that stand above or below it."""
    first, last = caption - 1, caption + 1
    while first >= 0 and not lines[first]:
        first -= 1
    while first >= 0 and lines[first]:
        first -= 1
    while last < len(lines) and not lines[last]:
        last += 1
    while last < len(lines) and lines[last]:
        last += 1
    return lines[first + 1 : last]


def numbers(text: str) -> set[float]:
    """Numbers of a text: also ``2 × 10−5``, ``15,000``, ``250k``; a percentage as its share too."""
    text = re.sub(r"(\d)\s*×\s*10−(\d)", r"\1e-\2", text)
    text = re.sub(r"(?<![\w.])10−(\d)", r"1e-\1", text)
    found = set()
    for digits, unit in re.findall(r"(?<![\w.])(\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?)(k\b| ?%)?", text):
        value = float(digits.replace(",", ""))
        found |= {value * 1000} if unit == "k" else {value, value / 100} if unit else {value}
    return found
