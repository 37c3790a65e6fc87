"""Numbers of an analysis in a file: a header, then a row for each measurement; goes on after a stop."""

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@contextmanager
def now_and_then(write: Callable[[], None], every: float = 1.0) -> Iterator[Callable[[], None]]:
    """Let a long measurement write what it has, so that a kill loses little.

    Args:
        write: writes all that was measured.
        every: seconds that must have passed since it was last called.

    Yields:
        A function to be called after each measurement. It writes if it is time to; at the end, after an interrupt
        too, what is not yet written is.
    """
    last, is_written = time.monotonic(), True

    def added() -> None:
        nonlocal last, is_written
        is_written = False
        if time.monotonic() - last >= every:
            write()
            last, is_written = time.monotonic(), True

    try:
        yield added
    finally:
        if not is_written:
            write()
