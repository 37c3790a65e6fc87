"""``fairseq-sam transfer``: fine-tuned encoders on tasks that they were not trained on (FSAM 6.4).

The encoder stays as it is; a linear model on its first token is fitted to the other task's training split and scored on
its validation split.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_sam.analysis.plots import figure, save, show_names_below
from fairseq_sam.analysis.tables import write_rows
from fairseq_sam.commands import common, options
from fairseq_sam.commands.settings import digest_of_files, write_settings


def main(arguments: Sequence[str]) -> None:
    """Score each checkpoint on each task; write ``transfer.tsv`` and ``transfer.png``, and print the table."""
    parser = options.Parser("transfer", __doc__ or "")
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, help="fine-tuned by fairseq's task sentence_prediction, to be compared"
    )
    parser.add_argument(
        "--tasks", nargs="+", type=Path, required=True,
        help="folders of labelled sentences, as sentence_prediction reads them, with the models' dictionary",
    )  # fmt: skip
    parser.add_argument(
        "--names", nargs="+", help="names of the models in tables and plots; default what their paths differ in"
    )
    parser.add_argument("--subset", default="valid", help="split of the tasks that is scored; default valid")
    parser.add_argument(
        "--batch-size", type=options.integer(1), default=32, help="sentences in a batch; default %(default)s"
    )
    options.add_output(parser)
    args = parser.parse_args(arguments)
    models = dict(zip(common.model_names(args.checkpoints, args.names), args.checkpoints, strict=True))
    common.check_files(args.checkpoints)
    common.make_folder(args.out)
    table, image = args.out / "transfer.tsv", args.out / "transfer.png"
    common.refuse_earlier(args, table.name, image.name)
    common.import_user_module(args.user_dir)
    from fairseq_sam.adapter.probes import probe
    from fairseq_sam.adapter.sentences import LabelledFolder

    folders = named([LabelledFolder(path) for path in args.tasks])
    tasks = {
        task: {
            "folder": folder.path.resolve(),
            "digest": digest_of_files(*sorted(filter(Path.is_file, folder.path.rglob("*")))),
        }
        for task, folder in folders.items()
    }
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    with common.drawing(lambda: rows and plot(rows, image)):
        for name, checkpoint in models.items():
            own = {"name": name, "checkpoint": checkpoint.resolve(), "weights": digest_of_files(checkpoint)}
            measured.append({**own, "tasks": tasks, "finished": False})
            for task, folder in folders.items():
                progress = common.Progress(f"{name} on {task}")
                with common.about(f"{name}, {task}"):
                    found = probe(
                        checkpoint, folder, subset=args.subset, batch_size=args.batch_size, cpu=args.cpu,
                        progress=progress,
                    )  # fmt: skip
                if not rows:
                    common.remove_earlier(args, table.name, image.name)
                rows += [
                    {"model": name, "task": task, "metric": metric, "value": value} for metric, value in found.items()
                ]
                write_rows(table, rows)
                write_settings(args, measured)
            measured[-1]["finished"] = True
            write_settings(args, measured)
    print(markdown(rows))
    common.written(table, image)


def named(folders: Sequence[Any]) -> dict[str, Any]:
    """Return folders by their tasks' names; where two have the same, by what their paths differ in, too.

    Raises:
        ValueError: if one is there twice.
    """
    if len({folder.path.resolve() for folder in folders}) < len(folders):
        raise ValueError("--tasks must name different folders, got one twice")
    found: dict[str, Any] = {}
    for folder in folders:
        same = [other.path.resolve() for other in folders if other.name == folder.name]
        parts = dict(zip(same, common.distinguishing_parts(same), strict=True)) if len(same) > 1 else {}
        part = parts.get(folder.path.resolve())
        found[f"{folder.name} ({part})" if part else folder.name] = folder
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
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
            places, [values[task] for task in shown], width, color=f"C{number}", edgecolor="black",
            hatch=("", "//", "..", "xx")[number % 4], gid=model,
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(shown)), [f"{task}\n{metric}" for task, metric in shown.items()], parse_math=False)
    axes.set_ylabel("score of a linear probe (× 100)")
    axes.margins(y=0.12)
    show_names_below(made, [axes])
    save(made, path)
