"""Rows of runs that several tables have: recorded for one of them, they are entered into the others."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.recipes.jobs import Job
from scripts.recipes.obtained import MINUTES, OBTAINED, method_flags, put_row, read_rows
from scripts.recipes.recipe import Recipe, column_names, read_recipe, recipe_folders, size_names

RUNS = Path("runs")  # any folder: jobs are compared by their settings

Row = dict[str, str]


def share_rows(folders: Sequence[Path]) -> int:
    """Enter what other tables have recorded of the same runs, where a table has no row of its own.

    Args:
        folders: the recipes whose tables are filled in.

    Returns:
        How many rows were entered.
    """
    known: dict[Any, dict[str, tuple[Row, Any]]] = {}
    for recipe in (recipe for folder in recipe_folders() for recipe in _columns(folder)):
        for row in _rows_of(recipe):
            if row["method"] in recipe.methods:
                seed = int(row["seed"])
                baseline = Job(recipe, recipe.baseline, seed, RUNS).key
                known.setdefault(Job(recipe, row["method"], seed, RUNS).key, {})[row["metric"]] = row, baseline
    entered = 0
    for recipe in (recipe for folder in folders for recipe in _columns(folder)):
        there = {(row["method"], int(row["seed"])) for row in _rows_of(recipe)}
        for method in recipe.methods:
            for seed in recipe.seeds:
                job = Job(recipe, method, seed, RUNS)
                if (method, seed) not in there and job.key in known:
                    entered += _enter(job, known[job.key])
    return entered


def _columns(folder: Path) -> Iterator[Recipe]:
    for size in size_names(folder):
        for column in column_names(folder, size):
            yield read_recipe(folder, size, column)


def _rows_of(recipe: Recipe) -> list[Row]:
    wanted = {"size": recipe.size, "column": recipe.column, "metric": recipe.metric.name}
    return [row for row in read_rows(recipe.folder / OBTAINED) if wanted.items() <= row.items()]


def _enter(job: Job, found: dict[str, tuple[Row, Any]]) -> int:
    """Put the row of a run into a table; the p-value belongs to a comparison with the same baseline."""
    recipe = job.recipe
    metric = recipe.metric.name
    if metric == MINUTES and MINUTES not in found:
        row, baseline = next(iter(found.values()))
        row = {**row, "value": f"{float(row['seconds']) / 60:.6g}", "valid": "", "p_value": ""}
    elif metric in found:
        row, baseline = found[metric]
    else:
        return 0
    same_baseline = Job(recipe, recipe.baseline, job.seed, RUNS).key == baseline
    own = {"size": recipe.size, "column": recipe.column, "metric": metric, "method": job.method}
    p_value = row["p_value"] if same_baseline and job.method != recipe.baseline else ""
    flags = row["flags"] if "(found: " in row["flags"] else method_flags(job)
    put_row(recipe.folder / OBTAINED, {**row, **own, "p_value": p_value, "flags": flags}, list(recipe.methods))
    return 1
