"""``fairseq-sam landscape``: the loss on a line between two checkpoints, and on a plane of random directions.

The line goes from the weights before training (``--before``) to those after, and as far beyond (FSAM Fig. 5); the
plane's two directions are filter-normalised (Li et al. 2018; FSAM Fig. 4). A stopped command goes on where it was.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fairseq_sam.analysis.landscape import difference, filter_normalised, landscape, steps
from fairseq_sam.analysis.objective import Objective
from fairseq_sam.analysis.plots import BITS, draw_curves, figure, save, show_names_below
from fairseq_sam.analysis.tables import now_and_then, read_rows, write_rows
from fairseq_sam.commands import common, options
from fairseq_sam.commands.settings import digest_of_files

MOST_NAMES = 4  # of parameters in a message


def main(arguments: Sequence[str]) -> None:
    """Measure each checkpoint; write ``line.tsv`` or ``surface.tsv``, and the plot beside it."""
    parser = options.parser("landscape", __doc__ or "")
    parser.add_argument("--before", type=Path, help="checkpoint of the weights before training: a line, not a plane")
    parser.add_argument("--points", type=options.integer(2), help="along each axis; default 25, on a line 41")
    parser.add_argument(
        "--range",
        nargs=2,
        type=options.number,
        default=(-1.0, 1.0),
        metavar=("FROM", "TO"),
        dest="ends",
        help="of the coordinates; default -1 1",
    )
    parser.add_argument(
        "--exclude", type=options.pattern, default="", help="regular expression: parameters that are held constant"
    )
    args = parser.parse_args(arguments)
    common.check_files([args.before] if args.before else [])
    kind = "line" if args.before else "surface"
    axis = axis_of(parser, args, kind)
    places = [(x,) for x in axis] if kind == "line" else [(x, y) for x in axis for y in axis]
    table = args.out / f"{kind}.tsv"
    image = table.with_suffix(".png")
    earlier, rows = [] if args.overwrite else rows_of(table), []
    others = list(earlier)  # of other settings, models and places; they stay

    def write() -> None:
        write_rows(table, [*rows, *others])

    wanted = set(map(written_place, places))

    def draw() -> None:
        if rows:
            (plot_line if kind == "line" else plot_surface)(rows, image)

    with common.drawing(draw):
        for model in common.trained_models(args):
            name, objective = model.name, model.trained.objective(model.batches, args.exclude)
            with common.about(name):
                directions = (
                    [line(name, model.trained, objective, args.before)] if args.before else plane(objective, args.seed)
                )
            settings = settings_of(args, model)
            kept = [row for row in earlier if settings.items() <= row.items() and place_of(row) in wanted]
            others = [row for row in others if row not in kept]
            rows += kept
            known = set(map(place_of, kept))
            left = [place for place in places if written_place(place) not in known]
            progress = common.Progress(f"landscape of {name}", start=len(known))
            with now_and_then(write) as added:
                for done, point in enumerate(landscape(objective, directions, left), len(known) + 1):
                    place = dict(zip(("x", "y"), written_place(point.place), strict=False))
                    rows.append({**settings, **place, "loss": point.loss})
                    added()
                    progress(done, len(places))
        write()
    common.written(table, image)


def axis_of(parser: options.Parser, args: argparse.Namespace, kind: str) -> list[float]:
    """Return the coordinates along an axis; those that the table could not tell apart are refused."""
    least, most = args.ends
    if not least < most:
        parser.error(f"--range must be two numbers FROM < TO, got {least:g} {most:g}")
    axis = steps(least, most, args.points or {"line": 41, "surface": 25}[kind])
    if len({written_place((x,)) for x in axis}) < len(axis):
        parser.error(
            f"--range must hold {len(axis)} places (--points) that differ in six decimals, got {least:g} {most:g}"
        )
    return axis


def rows_of(table: Path) -> list[dict[str, str]]:
    """Return the rows of an earlier table.

    Raises:
        ValueError: if it is of another command.
    """
    rows = read_rows(table)
    if any("model" not in row for row in rows):
        raise ValueError(f"{table} must be of an earlier landscape, but it has no column model; take another --out")
    return rows


def settings_of(args: argparse.Namespace, model: common.Measured) -> dict[str, str]:
    """Return what the rows of a model were measured with; those with the same settings are kept."""
    return {
        "model": model.name, "subset": args.subset, "seed": str(args.seed), "batches": str(args.num_batches or "all"),
        "exclude": args.exclude, "data": model.record["batches digest"], "weights": model.record["weights"],
        "before": digest_of_files(args.before) if args.before else "",
    }  # fmt: skip


def line(name: str, trained: Any, objective: Objective, before: Path) -> list[Tensor]:
    """Return the direction from the weights before training, and say which ones are held constant."""
    weights = trained.weights_of(before)
    missing = [parameter for parameter in objective.space.names if parameter not in weights]
    direction = difference(objective, weights)
    if missing:
        most = ", ".join(missing[:MOST_NAMES]) + (
            f" and {len(missing) - MOST_NAMES} more" * (len(missing) > MOST_NAMES)
        )
        print(f"{name}: held constant on the line, since {before} lacks them: {most}", file=sys.stderr)
    return direction


def plane(objective: Objective, seed: int) -> list[list[Tensor]]:
    """Return two random directions."""
    return [filter_normalised(objective, seed), filter_normalised(objective, seed + 10**6)]


def written_place(place: tuple[float, ...]) -> tuple[str, ...]:
    """Return coordinates as the table has them."""
    return tuple(f"{coordinate:.6f}" for coordinate in place)


def place_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """Return the coordinates of a row."""
    return tuple(row[axis] for axis in ("x", "y") if row.get(axis))


def plot_line(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss on the line, a curve for each model."""
    curves = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        own = sorted((float(row["x"]), float(row["loss"])) for row in rows if row["model"] == name)
        curves[name] = [x for x, _ in own], [loss for _, loss in own]
    made, (axes,) = figure()
    x = "place α: −1 before training, 0 after it"
    draw_curves(
        axes, curves, x=x, y=f"loss ({BITS})", title="between the weights before and after training", legend=False
    )
    show_names_below(made, [axes])
    save(made, path)


def plot_surface(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the surface of each model as filled contours, with the same levels and one colour bar for all."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    levels = levels_of([float(row["loss"]) for row in rows])
    made, axes = figure(len(names), 3)
    for place, name in enumerate(names):
        found = {(float(row["x"]), float(row["y"])): float(row["loss"]) for row in rows if row["model"] == name}
        xs, ys = (sorted({point[axis] for point in found}) for axis in (0, 1))
        grid = [[found.get((x, y), math.nan) for x in xs] for y in ys]
        colours = axes[place].contourf(xs, ys, grid, levels=levels, cmap="viridis_r", extend="max")
        axes[place].contour(xs, ys, grid, levels=levels, colors="black", linewidths=0.4)
        axes[place].plot([0.0], [0.0], "wo", markersize=7, markeredgecolor="black")
        axes[place].plot([0.0], [0.0], "k+", markersize=5)
        axes[place].set_title("\n".join(textwrap.wrap(name, 32)), parse_math=False)
        axes[place].set_xlabel("first direction (1: the filters' norms)")
        axes[place].set_ylabel("second direction (1: the filters' norms)")
        axes[place].set_aspect("equal")
    made.colorbar(colours, ax=axes, label=f"loss ({BITS})", ticks=levels)
    made.suptitle("Around the weights (⊕), in filter-normalised directions")
    save(made, path)


def levels_of(losses: Sequence[float]) -> list[float]:
    """Return round levels from the smallest loss on; the largest tenth of the losses is above the last."""
    finite = torch.tensor([loss for loss in losses if math.isfinite(loss)] or [0.0], dtype=torch.float64)
    least, most = float(finite.min()), float(finite.quantile(0.9))
    most = max(most, least + 1e-6 * max(abs(least), 1.0))
    levels: list[float] = MaxNLocator(12, steps=[1, 2, 2.5, 5, 10]).tick_values(least, most).tolist()
    return levels
