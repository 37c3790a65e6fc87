"""``fairseq-sam gradients``: gradient norms by epoch and by layer (GA-SAM Figs. 4, 5).

From the logs that ``fairseq-train … --sam-gradient-log N`` writes beside its checkpoints.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_sam.analysis.gradients import norms_by_epoch, norms_by_layer, read_gradients
from fairseq_sam.analysis.plots import draw_curves, figure, save, set_whole_numbers, show_names_below
from fairseq_sam.analysis.tables import write_rows
from fairseq_sam.commands import common, options
from fairseq_sam.commands.settings import digest_of_files, write_settings

FILE = "gradients.jsonl"


def main(arguments: Sequence[str]) -> None:
    """Read each run's log; write ``gradients.tsv`` and ``gradients.png``."""
    parser = options.Parser("gradients", __doc__ or "")
    parser.add_argument("runs", nargs="+", type=Path, help=f"folders of runs, with {FILE} in them, or such files")
    parser.add_argument(
        "--names", nargs="+", help="names of the runs in tables and plots; default what their paths differ in"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and the plot")
    options.add_overwrite(parser)
    args = parser.parse_args(arguments)
    logs = [run / FILE if run.is_dir() else run for run in args.runs]
    for run, log in zip(args.runs, logs, strict=True):
        if not log.is_file():
            raise ValueError(
                f"expected a run's folder with {FILE}, or such a file, got {run}; --sam-gradient-log writes it"
            )
    names = common.model_names(logs, args.names)
    common.make_folder(args.out)
    common.refuse_earlier(args, "gradients.tsv", "gradients.png")
    rows: list[dict[str, Any]] = []
    for name, log in zip(names, logs, strict=True):
        gradients = read_gradients(log)
        for by, found in (("epoch", norms_by_epoch(gradients)), ("layer", norms_by_layer(gradients))):
            rows += [
                {"run": name, "by": by, "group": group, "number": number, "norm": norm}
                for group, norms in found.items()
                for number, norm in norms.items()
            ]
    common.remove_earlier(args, "gradients.tsv", "gradients.png")
    write_rows(args.out / "gradients.tsv", rows)
    logged = [
        {"name": name, "log": log.resolve(), "digest": digest_of_files(log), "finished": True}
        for name, log in zip(names, logs, strict=True)
    ]
    write_settings(args, logged)
    plot(rows, args.out / "gradients.png")
    common.written(args.out / "gradients.tsv", args.out / "gradients.png")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the norm by epoch and by layer: of one run a curve for each group, of several a panel with one for each run.

    Args:
        rows: of the table.
        path: the file.
    """
    several = len({row["run"] for row in rows}) > 1
    panels: dict[tuple[str, str], dict[str, tuple[list[float], list[float]]]] = {}
    for row in rows:
        panel, name = (row["group"], row["run"]) if several else ("", row["group"])
        xs, ys = panels.setdefault((row["by"], panel), {}).setdefault(name, ([], []))
        xs.append(row["number"])
        ys.append(row["norm"])
    made, axes = figure(len(panels), 3 if several else 2)
    for place, ((by, group), curves) in enumerate(panels.items()):
        x = {"epoch": "epoch", "layer": "layer, from the bottom"}[by]
        title = f"{group}, by {by}" if group else f"by {by}"
        if several:  # also one that has no such group, so that a run has the same colour in all panels
            curves = {run: curves.get(run, ([], [])) for run in dict.fromkeys(row["run"] for row in rows)}
        draw_curves(axes[place], curves, x=x, y="mean norm of the gradient", title=title, legend=not several)
        set_whole_numbers(axes[place])
    if several:
        show_names_below(made, axes)
    save(made, path)
