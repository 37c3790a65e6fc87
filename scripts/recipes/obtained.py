"""``obtained.tsv``: one row for each run."""

import csv
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from scripts.recipes.jobs import OUTPUT, Job, training_summary
from scripts.recipes.locks import locked
from scripts.recipes.recipe import ROOT, RecipeError
from scripts.recipes.significance import compare

OBTAINED = "obtained.tsv"
COLUMNS = [
    "size", "column", "method", "seed", "metric", "value", "valid", "p_value", "seconds", "updates", "epochs", "passes",
    "flags", "versions", "hardware", "commit", "date",
]  # fmt: skip
ROW = "row.json"
VERSIONED = (
    "torch", "fairseq-fixed", "fairseq", "numpy", "sacrebleu", "scikit-learn", "scipy", "rouge-score", "tokenizers",
)  # fmt: skip
AUTO = "auto"
MINUTES = "minutes"  # the metric that is the time of training
NUMBERS: dict[str, Callable[[str], float]] = {"seed": int, "seconds": float, "passes": float}
KEY = ("size", "column", "method", "seed", "metric")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table of runs; none if the file is not there.

    Raises:
        RecipeError: if a row is not one of such a table.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{**dict.fromkeys(COLUMNS, ""), **row} for row in csv.DictReader(file, delimiter="\t")]
    for line, row in enumerate(rows, 2):
        for name, kind in NUMBERS.items():
            try:
                kind(row[name])
            except (TypeError, ValueError):
                raise RecipeError(
                    f"{path}, line {line}: {name} must be a number, got {row[name]!r}; the line is damaged: take the "
                    "file from the repository, or remove the line and run the table again"
                ) from None
    return rows


def record_job(job: Job, tables: Sequence[Path]) -> None:
    """Put the row of a finished job into the tables, in place of one for the same method and seed."""
    if job.until is not None:
        return
    kept = job.run / ROW
    if not kept.exists():  # as it was when the run ended, also for a later table
        kept.write_text(json.dumps(_measured(job), indent=1) + "\n", encoding="utf-8")
    row = json.loads(kept.read_text(encoding="utf-8")) | _scored(job)
    row |= {"size": job.recipe.label, "column": job.recipe.column, "method": job.method, "seed": str(job.seed)}
    row["flags"] = method_flags(job)
    for table in tables:
        with _written_alone(table):
            earlier = [each["p_value"] for each in read_rows(table) if _key(each) == _key(row)]
            put_row(table, {"p_value": "".join(earlier), **row}, list(job.recipe.methods))


def all_scores(job: Job) -> dict[str, Any]:
    """Return what was found of a finished job, the minutes of its training too."""
    return {**(job.scores or {}), MINUTES: training_summary(job.run)["seconds"] / 60}


def _scored(job: Job) -> dict[str, str]:
    """The table's metric, and what the development set says: of this metric, of the run, or its lowest loss."""
    scores, metric = all_scores(job), job.recipe.metric.name
    if metric not in scores:
        raise ValueError(f"{job.run} has no score {metric!r}; it has {', '.join(scores)}")
    valid = [scores[name] for name in (f"valid_{metric}", "valid") if name in scores]
    best = valid[0] if valid else training_summary(job.run)["best_valid"]
    return {"metric": metric, "value": f"{scores[metric]:.6g}", "valid": f"{best:.6g}"}


def _measured(job: Job) -> dict[str, str]:
    summary = training_summary(job.run)
    return {
        "seconds": f"{summary['seconds']:.0f}",
        "updates": f"{summary['updates']:.0f}",
        "epochs": f"{summary['epochs']:.0f}",
        "passes": f"{summary['passes']:.3f}",
        "versions": versions(),
        "hardware": hardware(job.cpu),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def write_significance(jobs: Sequence[Job], tables: Sequence[Path]) -> None:
    """Fill in the p-values of the comparisons that need the runs' outputs."""
    for job in jobs:
        recipe = job.recipe
        baseline = Job(recipe, recipe.baseline, job.seed, job.out, job.cpu)
        p_value = None if job.method == recipe.baseline else compare(job, baseline)
        if p_value is None:
            continue
        wanted = (recipe.label, recipe.column, job.method, str(job.seed), recipe.metric.name)
        for table in tables:
            with _written_alone(table):
                for row in read_rows(table):
                    if _key(row) == wanted:
                        put_row(table, {**row, "p_value": f"{p_value:.4g}"}, list(recipe.methods))


def versions() -> str:
    """Versions of what the figures depend on."""
    found = [f"Python {platform.python_version()}"]
    for package in VERSIONED:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def hardware(cpu: bool) -> str:
    """The device of the runs, in words."""
    if not cpu and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return f"CPU ({model})"


def method_flags(job: Job) -> str:
    """The flags in which a method differs from the baseline; with a radius that the run has found."""
    base = job.recipe.methods[job.recipe.baseline]
    flags = " ".join(f"--{name} {value}" for name, value in job.flags.items() if base.get(name) != value)
    if job.flags.get("sam-epsilon") != AUTO:
        return flags
    output = (job.run / OUTPUT).read_text(encoding="utf-8", errors="replace") if (job.run / OUTPUT).exists() else ""
    found = re.findall(r"--sam-epsilon (\S+) is the same for another run", output)
    return flags.replace(f"--sam-epsilon {AUTO}", f"--sam-epsilon {AUTO} (found: {found[-1] if found else 'nothing'})")


def commit() -> str:
    """The commit of the checkout; empty where there is none."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in KEY)


def _written_alone(table: Path) -> AbstractContextManager[int]:
    """Keep other processes from the table; the lock lies elsewhere, since a table may be in a recipe's folder."""
    name = hashlib.sha256(str(table.resolve()).encode()).hexdigest()[:16]
    return locked(Path(tempfile.gettempdir()) / f"fairseq_sam-{os.getuid()}-{name}.lock")


def put_row(table: Path, row: dict[str, str], order: list[str]) -> None:
    """Put a row into its place by size, method and seed; methods that the recipe has no more come last."""
    rows = {_key(each): each for each in read_rows(table)}
    rows[_key(row)] = row
    order = [*order, *(each["method"] for each in rows.values() if each["method"] not in order)]
    columns = [each["column"] for each in rows.values()]

    def place(each: Mapping[str, str]) -> tuple[str, int, int, int]:
        return each["size"], columns.index(each["column"]), order.index(each["method"]), int(each["seed"])

    table.parent.mkdir(parents=True, exist_ok=True)
    partial = table.with_suffix(".part")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=place))
    partial.replace(table)
