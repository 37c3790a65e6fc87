"""``fairseq-sam robustness``: loss and scores after adversarial corruptions of the weights (GA-SAM Table 4)."""

import argparse
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fairseq_sam.analysis.corruption import STEPS
from fairseq_sam.analysis.plots import BITS, draw_curves, figure, save, set_few_ticks, set_log_scale, show_names_below
from fairseq_sam.analysis.robustness import RADII, Corrupted, robustness
from fairseq_sam.commands import common, options

# Scores that are drawn, with the labels of their axes.
SCORES = {
    "bleu": "BLEU", "accuracy": "accuracy (%)", "f1": "F1 (%)", "mcc": "Matthews correlation (%)",
    "ppl": "perplexity", "pearson": "Pearson correlation (%)", "spearman": "Spearman correlation (%)",
    "loss": f"loss ({BITS})",
}  # fmt: skip

# How fairseq can join subwords.
JOINED_BY = ("@@ ", "@@", "subword_nmt", "sentencepiece", "wordpiece", "letter", "silence", "_EOW", "none")


def main(arguments: Sequence[str]) -> None:
    """Measure each checkpoint at each radius; write ``robustness.tsv`` and ``robustness.png``."""
    parser = options.parser("robustness", __doc__ or "")
    for norm, ball in (("l2", "L2"), ("linf", "L-infinity")):
        parser.add_argument(
            f"--{norm}",
            nargs="*",
            action=options.Distinct,
            type=options.positive,
            default=RADII[norm],
            help=f"radii of {ball} balls; default %(default)s",
        )
    parser.add_argument(
        "--steps", type=options.integer(1), default=STEPS, help="ascent steps of a corruption; default %(default)s"
    )
    parser.add_argument("--attack-subset", help="split whose loss the corruption makes large; default that of --subset")
    parser.add_argument(
        "--attack-batches", type=options.integer(1), help="batches of it, chosen at random; default all"
    )
    parser.add_argument(
        "--bleu", type=options.integer(0), metavar="BEAM", default=0, help="translate with this beam, and score BLEU"
    )
    parser.add_argument("--remove-bpe", choices=JOINED_BY, help="how subwords are joined for BLEU; default '@@ '")
    args = parser.parse_args(arguments)
    if not (args.l2 or args.linf):
        parser.error("--l2 and --linf must name a radius, got none")
    if args.remove_bpe is not None and not args.bleu:
        parser.error(f"--remove-bpe is of --bleu only, got {args.remove_bpe!r}")
    options.fill(args, {"remove_bpe": "@@ "})
    table, image = args.out / "robustness.tsv", args.out / "robustness.png"
    rows: list[dict[str, Any]] = []
    options_of = {"bleu": args.bleu, "remove_bpe": args.remove_bpe}
    with common.drawing(lambda: rows and plot(rows, image)):
        for model in common.trained_models(args, table.name, image.name, **options_of):
            for corrupted in measured(args, model):
                rows.append(row_of(model.name, corrupted))
                model.write(table.name, rows)
    common.written(table, image)


def measured(args: argparse.Namespace, of: common.Measured) -> Iterator[Corrupted]:
    """Measure a model; a corruption that cannot be reached is told of.

    Yields:
        The model as it is, and after each corruption.
    """
    attack = of.batches
    if args.attack_subset or args.attack_batches:
        subset, number = args.attack_subset or args.subset, args.attack_batches
        attack = common.batches_of(args, of.trained, subset=subset, number=number, flag="--attack-subset")
        of.note("attack batches", attack)
    for corrupted in robustness(
        of.trained.objective(attack),
        radii={norm: radii for norm, radii in (("l2", args.l2), ("linf", args.linf)) if radii},
        steps=args.steps,
        score=functools.partial(of.trained.scores, of.batches),
        progress=common.Progress(f"robustness of {of.name}"),
    ):
        if math.isnan(corrupted.reached):
            print(
                f"{of.name}: at {corrupted.norm} {corrupted.radius:g} a gradient on the way is not finite, so that "
                "nothing is measured there; take a smaller radius, or fewer --steps",
                file=sys.stderr,
            )
        yield corrupted


def row_of(name: str, corrupted: Corrupted) -> dict[str, Any]:
    """Return a row of the table."""
    own = {"norm": corrupted.norm, "radius": corrupted.radius, "reached": corrupted.reached}
    return {"model": name, **own, "attacked loss": corrupted.loss, **corrupted.scores}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each score against the radius, a row of panels for each score, a curve for each model that has it.

    Args:
        rows: of the table.
        path: the file.
    """
    norms = list(dict.fromkeys(row["norm"] for row in rows if row["norm"]))
    shown = [score for score in SCORES if any(score in row for row in rows)]
    made, axes = figure(len(norms) * len(shown), len(norms))
    for place, (norm, score) in enumerate((norm, score) for score in shown for norm in norms):
        curves = {}
        for name in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == name and row["norm"] in ("", norm) and score in row]
            curves[name] = [row["radius"] for row in own], [row[score] for row in own]
        label = {"l2": "L2", "linf": "L∞"}.get(norm, norm)
        draw_curves(axes[place], curves, x=f"radius of the corruption, {label}", y=SCORES[score], legend=False)
        set_few_ticks(axes[place])
        values = [value for _, own in curves.values() for value in own if math.isfinite(value)]
        if score == "ppl" and values and max(values) > 10 * min(values):
            set_log_scale(axes[place])
    show_names_below(made, axes)
    made.suptitle("After adversarial corruptions of the weights")
    save(made, path)
