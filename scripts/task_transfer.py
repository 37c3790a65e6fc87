#!/usr/bin/env python3
"""Evaluate fine-tuned encoders on tasks that they were not trained on: a table and a plot, models by tasks.

    task_transfer.py adam/checkpoint_best.pt sam/checkpoint_best.pt --names Adam SAM --tasks CoLA-bin MRPC-bin --out OUT

Each task is a folder of prepare_glue.py, made with the dictionary of the models. The encoder stays as it is; a linear
model on its first token is fitted to the task's training split and scored on its validation split (FSAM 6.4).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fairseq_sam.analysis.plots import figure, save, show_names  # noqa: E402
from fairseq_sam.analysis.tables import write_rows  # noqa: E402
from fairseq_sam.commands import common  # noqa: E402

TABLE, PLOT = "transfer.tsv", "transfer.png"


def main(arguments: Sequence[str]) -> None:
    """Evaluate each model on each task; write the table after each, and the plot."""
    parser = argparse.ArgumentParser(
        prog="task_transfer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, help="fine-tuned by the task sentence_prediction")
    parser.add_argument("--names", nargs="+", help="names of the models; default what their paths differ in")
    parser.add_argument("--tasks", nargs="+", type=Path, required=True, help="folders of prepare_glue.py")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {TABLE} and {PLOT}")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    args = parser.parse_args(arguments)
    from scripts.recipes.predictions import Folder
    from scripts.recipes.probes import probe

    models = dict(zip(common.model_names(args.checkpoints, args.names), args.checkpoints, strict=True))
    common.check_files(args.checkpoints)
    common.make_folder(args.out)
    tasks = [Folder(path) for path in args.tasks]
    progress, rows = common.Progress("task transfer"), []
    for name, checkpoint in models.items():
        for task in tasks:
            found = probe(checkpoint, task, cpu=args.cpu)
            rows += [
                {"model": name, "task": task.task.name, "metric": metric, "value": value}
                for metric, value in found.items()
            ]
            write_rows(args.out / TABLE, rows)
            progress(len({(row["model"], row["task"]) for row in rows}), len(models) * len(tasks))
    print(table(rows))
    plot(rows, args.out / PLOT)
    common.written(args.out / TABLE, args.out / PLOT)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: a line for each model, a column for each task and metric.

    Args:
        rows: of ``transfer.tsv``.
    """
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    values = {(row["model"], row["task"], row["metric"]): row["value"] for row in rows}
    lines = [["model", *(f"{task} {metric}" for task, metric in columns)], ["---"] * (len(columns) + 1)]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines.append([model, *(f"{values[(model, *column)]:.2f}" for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each task's first metric, a bar for each model.

    Args:
        rows: of ``transfer.tsv``.
        path: the file.
    """
    shown: dict[str, str] = {}
    for row in rows:
        shown.setdefault(row["task"], row["metric"])
    models = list(dict.fromkeys(row["model"] for row in rows))
    made, (axes,) = figure(width=2.0 + 1.2 * len(shown), height=3.8)
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        values = {
            row["task"]: row["value"] for row in rows if row["model"] == model and shown[row["task"]] == row["metric"]
        }
        places = [place + (number - (len(models) - 1) / 2) * width for place in range(len(shown))]
        bars = axes.bar(
            places, [values[task] for task in shown], width, label=str(number), color=f"C{number}", edgecolor="black",
            hatch=("", "//", "..", "xx")[number % 4],
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(shown)), [f"{task}\n{metric}" for task, metric in shown.items()])
    axes.set_ylabel("score of a linear probe (× 100)")
    axes.margins(y=0.12)
    show_names(axes, models)
    save(made, path)


if __name__ == "__main__":
    sys.exit(common.run(main, sys.argv[1:]))
