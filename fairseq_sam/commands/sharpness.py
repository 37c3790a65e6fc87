"""``fairseq-sam sharpness``: how much the loss rises when the weights move a given distance.

Along the worst direction, the steepest one, random ones, and for each instance along its own (δ-SAM Table 4).
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fairseq_sam.analysis.corruption import STEPS, moves_all_weights
from fairseq_sam.analysis.plots import BITS, draw_curves, figure, save, set_log_scale, show_names_below
from fairseq_sam.analysis.sharpness import (
    DIRECTIONS,
    adversarial_risk,
    ascent_sharpness,
    average_sharpness,
    worst_sharpness,
)
from fairseq_sam.commands import common, options
from fairseq_sam.core.method import PRESETS
from fairseq_sam.core.scales import SCALES

RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TITLES = {
    "worst": "worst direction", "ascent": "along the gradient", "average": "random directions, mean and standard error",
    "instance": "each instance in its own worst direction",
}  # fmt: skip
KINDS = tuple(TITLES)
USES = {
    "steps": ("worst", "instance"), "method": ("worst", "ascent", "instance"), "norm": ("worst", "ascent", "instance"),
    "directions": ("average",), "instances": ("instance",),
}  # fmt: skip
INSTANCES = 200


def balls() -> list[str]:
    """Return the methods whose T stretches a ball, the first of each kind.

    Where T is made from the gradient, the rise at small radii is much the same for all models: that is what T is for.
    """
    found = {
        (method.scale, method.granularity, method.ball): name
        for name, method in reversed(PRESETS.items())
        if moves_all_weights(method) and not SCALES[method.scale].gradient_based
    }
    return [name for name in PRESETS if name in found.values()]


def main(arguments: Sequence[str]) -> None:
    """Measure each checkpoint at each radius; write ``sharpness.tsv`` and ``sharpness.png``."""
    parser = options.parser("sharpness", __doc__ or "")
    parser.add_argument(
        "--radii",
        nargs="+",
        action=options.Distinct,
        type=options.positive,
        default=RADII,
        help="distances; default %(default)s",
    )
    parser.add_argument(
        "--norm", type=options.norm, help="of the distance: l2, linf or a number; default l2, and average is always l2"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        action=options.Distinct,
        choices=KINDS,
        default=KINDS[:3],
        help="directions; default %(default)s",
    )
    parser.add_argument(
        "--steps", type=options.integer(1), help=f"ascent steps of worst, default {STEPS}, and of instance, default 1"
    )
    parser.add_argument("--directions", type=options.integer(1), help=f"random directions; default {DIRECTIONS}")
    parser.add_argument(
        "--method", choices=balls(), help="whose scale T stretches the ball, but for average; default sam, T = 1"
    )
    parser.add_argument(
        "--instances", type=options.integer(1), help=f"single instances, at random; default {INSTANCES}"
    )
    args = parser.parse_args(arguments)
    options.refuse_unused(parser, args, "kinds", USES)
    options.fill(args, {"norm": "l2", "method": "sam", "directions": DIRECTIONS, "instances": INSTANCES})
    table, image = args.out / "sharpness.tsv", args.out / "sharpness.png"
    rows: list[dict[str, Any]] = []
    with common.drawing(lambda: rows and plot(rows, image)):
        for model in common.trained_models(args, table.name, image.name):
            for row in measured(args, model):
                rows.append(row)
                model.write(table.name, rows)
    common.written(table, image)


def measured(args: argparse.Namespace, of: common.Measured) -> Iterator[dict[str, Any]]:
    """Measure a model.

    Yields:
        A row for each radius and direction.
    """
    model, loss_sum, batches, method = of.trained.model, of.trained.loss_sum, of.batches, PRESETS[args.method]
    single = []
    if "instance" in args.kinds:
        single = of.note("instances", common.batches_of(args, of.trained, batch_size=1, number=args.instances))
    for radius in args.radii:
        ball: dict[str, Any] = {"epsilon": radius, "norm": args.norm, "method": method}
        for kind in args.kinds:
            progress = common.Progress(f"{kind} sharpness of {of.name} at {radius:g}")
            if kind == "worst":
                found = worst_sharpness(model, batches, loss_sum, **ball, steps=args.steps or STEPS, progress=progress)
            elif kind == "ascent":
                found = ascent_sharpness(model, batches, loss_sum, **ball)
            elif kind == "average":
                found = average_sharpness(
                    model, batches, loss_sum, epsilon=radius, directions=args.directions, seed=args.seed,
                    progress=progress,
                )  # fmt: skip
            else:
                found = adversarial_risk(model, single, loss_sum, **ball, steps=args.steps or 1, progress=progress)
            yield {
                "model": of.name, "direction": kind, "norm": "l2" if kind == "average" else args.norm,
                "method": "" if kind == "average" else args.method, "radius": radius, "loss": found.loss,
                "perturbed loss": found.perturbed_loss, "sharpness": found.sharpness, "standard error": found.error,
            }  # fmt: skip


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw sharpness against the radius, a panel for each kind of direction, a curve for each model.

    Args:
        rows: of the table.
        path: the file.
    """
    kinds = list(dict.fromkeys(row["direction"] for row in rows))
    made, axes = figure(len(kinds), 2 if len(kinds) > 3 else len(kinds))
    for place, kind in enumerate(kinds):
        own = [row for row in rows if row["direction"] == kind]
        curves, errors = {}, {}
        for name in dict.fromkeys(row["model"] for row in own):
            same = sorted((row for row in own if row["model"] == name), key=lambda row: float(row["radius"]))
            curves[name] = [row["radius"] for row in same], [row["sharpness"] for row in same]
            errors[name] = [row["standard error"] for row in same]
        x = f"distance ({ {'l2': 'L2', 'linf': 'L∞'}.get(str(own[0]['norm']), own[0]['norm']) })"
        has_errors = any(error > 0 for each in errors.values() for error in each)
        draw_curves(
            axes[place], curves, x=x, y=f"rise of the loss\n({BITS})", title=TITLES[kind],
            errors=errors if has_errors else None, legend=False,
        )  # fmt: skip
        axes[place].set_xscale("log")
        set_log_scale(axes[place])
    show_names_below(made, axes)
    save(made, path)
