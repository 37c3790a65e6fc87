"""How the cost of a step shall grow along each axis, and how it does."""

import math
import statistics
from collections.abc import Sequence

AXES = ("parameters", "tokens", "K", "tensors", "workers")
# By axis and measured column: the expected slope.
EXPECTED = {
    ("parameters", "step (s)"): 1.0,
    ("parameters", "own (s)"): 1.0,
    ("tokens", "step (s)"): 1.0,
    ("tokens", "own (s)"): 0.0,
    ("K", "step over pass"): 1.0,
    ("tensors", "own (s)"): 1.0,
    ("workers", "over base"): 0.0,
}


def slope(rows: Sequence[dict[str, str]], axis: str, column: str) -> float | None:
    """Fit the slope of a column along an axis.

    Args:
        rows: of the table.
        axis: which one; of `parameters` the abscissa is their number.
        column: what grows.

    Returns:
        The slope of the logarithms by least squares (of the numbers themselves for K), None with fewer than two rows.
    """
    chosen = [row for row in rows if row["axis"] == axis and row.get(column)]
    if len(chosen) < 2:
        return None
    x = [float(row["parameters" if axis == "parameters" else "value"]) for row in chosen]
    y = [float(row[column]) for row in chosen]
    if axis != "K":
        if min(y) <= 0:
            return None
        x, y = [math.log(each) for each in x], [math.log(each) for each in y]
    return statistics.linear_regression(x, y).slope
