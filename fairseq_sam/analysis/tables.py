"""Numbers of an analysis in a file: a header, then a row for each measurement; goes on after a stop."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with tabs between their columns, which are all keys in the order of their first use.

    Args:
        path: the file; its folder is made.
        rows: at least one; floats are written with six significant digits.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({key: shown(value) for key, value in row.items()} for row in rows)
    partial.replace(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read what ``write_rows`` wrote; none if the file is not there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def shown(value: Any) -> str:
    """Return a number with six significant digits, anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
