"""``fairseq-sam epsilon``: how much the loss rises against ε, and the ε at which it rises by a wanted fraction.

The perturbation is that of a training step of the method: with dropout, on batches as large as in training, each with
its own. Prints the flags.
"""

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairseq_sam.analysis.epsilon import (
    FRACTION,
    LEAST,
    MOST,
    PER_DECADE,
    Probe,
    Rise,
    Suggestion,
    suggest_epsilon,
)
from fairseq_sam.analysis.plots import draw_curves, figure, save, show_names_below
from fairseq_sam.commands import common, options
from fairseq_sam.core.method import SUMMARIES, Method

NUM_BATCHES = 8
AXES = ("norm", "scale", "granularity", "steps", "gradient", "scope")


def main(arguments: Sequence[str]) -> None:
    """Measure each checkpoint; write ``epsilon.tsv`` and ``epsilon.png``, and print the flags."""
    parser = options.parser(
        "epsilon", " ".join((__doc__ or "").split()), max_tokens=None, subset="train", num_batches=NUM_BATCHES
    )
    parser.add_argument("--method", choices=list(SUMMARIES), default="sam", help="the preset; default sam")
    parser.add_argument("--norm", type=options.norm, help="l2, linf or a number > 1; default the preset's")
    parser.add_argument("--scale", help="scale operator T; default the preset's")
    parser.add_argument("--granularity", help="of T; default the preset's")
    parser.add_argument("--steps", type=options.integer(1), help="ascent steps K; default the preset's")
    parser.add_argument("--gradient", help="unit of the gradient that T sees, mean or sum; default the preset's")
    parser.add_argument("--scope", help="what shares a perturbation, microbatch or update; default the preset's")
    parser.add_argument(
        "--update-freq", type=options.integer(1),
        help="batches of an update, all workers', which with --scope update share a perturbation; default as in "
        "training. --num-batches counts such updates then",
    )  # fmt: skip
    parser.add_argument(
        "--fraction", type=options.positive, default=FRACTION, help="wanted rise / loss; default %(default)s"
    )
    parser.add_argument("--least", type=options.positive, default=LEAST, help="smallest ε; default %(default)g")
    parser.add_argument("--most", type=options.positive, default=MOST, help="largest ε; default %(default)g")
    parser.add_argument(
        "--per-decade",
        type=options.integer(1),
        default=PER_DECADE,
        help="ε in a decade of the grid; default %(default)s",
    )
    parser.add_argument("--fresh", action="store_true", help="of models with new weights (--seed), as before training")
    args = parser.parse_args(arguments)
    if args.update_freq is not None and args.scope != "update":
        parser.error(f"--update-freq is only used with --scope update, got {args.update_freq}")
    if not args.least < args.most:
        parser.error(f"--least must be smaller than --most, got {args.least:g} and {args.most:g}")
    method = Method.from_preset(args.method, **{axis: getattr(args, axis) for axis in AXES})
    rows: list[dict[str, Any]] = []
    suggestions: dict[str, Suggestion] = {}

    def per_update(trained: Any) -> int:
        return int(args.update_freq or trained.micro_batches) if method.scope == "update" else 1

    def batches_of(args: argparse.Namespace, trained: Any) -> list[Any]:
        given = {"max_tokens": args.max_tokens, "batch_size": args.batch_size}
        limits = trained.batch_limits | {name: value for name, value in given.items() if value is not None}
        return common.batches_of(args, trained, number=args.num_batches * per_update(trained), **limits)

    own = ", ".join(f"{axis} {value}" for axis, value in shown_axes(method).items())
    table, image = args.out / "epsilon.tsv", args.out / "epsilon.png"
    with common.drawing(lambda: suggestions and plot(suggestions, image, f"{args.method}: {own}")):
        for model in common.trained_models(args, table.name, image.name, chosen=batches_of):
            if args.fresh:
                model.trained.forget(args.seed)
            probe = model.trained.probe(model.batches, method, per_update(model.trained))
            first = {"model": model.name, "method": args.method, **shown_axes(method)}
            with common.about(model.name):

                def found(curve: Sequence[Rise], model: common.Measured = model, first: dict[str, Any] = first) -> None:
                    suggestions[model.name] = Suggestion(None, args.fraction, tuple(curve))  # as far as it is known
                    rows[:] = [row for row in rows if row["model"] != model.name]
                    rows.extend({**first, **columns_of(rise)} for rise in curve)
                    model.write(table.name, rows)

                suggestions[model.name] = search(args, model.name, probe, found)
    common.written(table, image)
    for name, suggestion in suggestions.items():
        print(f"{name}: {advice(suggestion, args)}")


def search(args: argparse.Namespace, name: str, probe: Probe, found: Callable[[Sequence[Rise]], None]) -> Suggestion:
    """Search for a model's radius.

    Args:
        args: of the command.
        name: of the model.
        probe: of the model.
        found: is told after each measurement of all so far, by growing radius.
    """
    curve: list[Rise] = []

    def add(rise: Rise) -> None:
        curve.append(rise)
        curve.sort(key=lambda each: each.epsilon)
        found(curve)

    return suggest_epsilon(
        probe, fraction=args.fraction, least=args.least, most=args.most, per_decade=args.per_decade, found=add,
        progress=common.Progress(f"ε of {args.method} on {name}"),
    )  # fmt: skip


def columns_of(rise: Rise) -> dict[str, float]:
    """Return the columns of the table that a measurement fills."""
    return {
        "epsilon": rise.epsilon, "loss": rise.loss, "perturbed loss": rise.perturbed_loss,
        "relative rise": rise.relative,
    }  # fmt: skip


def advice(suggestion: Suggestion, args: argparse.Namespace) -> str:
    """Return the flags that the suggestion amounts to, with the rise that was measured, or why there is none."""
    if suggestion.found is None:
        first, last = suggestion.curve[0], suggestion.curve[-1]
        where = (
            f"--least below {args.least:g}"
            if first.relative >= suggestion.fraction
            else f"--most above {last.epsilon:g}"
        )
        return (
            f"the loss does not rise by {suggestion.fraction:g} of it between ε = {first.epsilon:g} "
            f"({first.relative:+.2g}) and {last.epsilon:g} ({last.relative:+.2g}); set {where}, or another --fraction"
        )
    words = ["--optimizer", args.method, "--sam-epsilon", f"{suggestion.found.epsilon:.3g}"]
    for axis in AXES:
        if getattr(args, axis) is not None:
            words += [f"--sam-{axis}", str(getattr(args, axis))]
    if args.update_freq is not None:
        words += ["--update-freq", str(args.update_freq)]  # that of the training is not repeated
    return f"{' '.join(words)}   (the loss rises by {suggestion.found.relative:.3g} of it)"


def shown_axes(method: Method) -> dict[str, Any]:
    """Return the axes that the command sets, as the table and the plot have them."""
    norm = {2.0: "l2", math.inf: "linf"}.get(method.norm, method.norm)
    return {axis: getattr(method, axis) for axis in AXES} | {"norm": norm}


def plot(suggestions: dict[str, Suggestion], path: Path, title: str) -> None:
    """Draw the relative rise against ε, a curve for each model, with the suggested ε.

    Args:
        suggestions: by model.
        path: the file.
        title: the method, with its axes.
    """
    made, (axes,) = figure(width=5.6, height=4.2)
    curves = {}
    for name, suggestion in suggestions.items():
        shown = [rise for rise in suggestion.curve if 0 < rise.relative < float("inf")]
        label = name if suggestion.epsilon is None else f"{name}: ε = {suggestion.epsilon:.2g}"
        curves[label] = [rise.epsilon for rise in shown], [rise.relative for rise in shown]
    draw_curves(
        axes, curves, x="radius ε", y="rise of the loss / loss", title="\n".join(textwrap.wrap(title, 60)), legend=False
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for number, suggestion in enumerate(suggestions.values()):
        axes.axhline(suggestion.fraction, color="black", linewidth=0.8, linestyle=":")
        if suggestion.epsilon is not None:
            axes.axvline(suggestion.epsilon, color=f"C{number}", linewidth=0.8, linestyle=":")
    show_names_below(made, [axes])
    save(made, path)
