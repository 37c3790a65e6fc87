"""``fairseq-sam theory``: GA-SAM's analytic trials on MNIST (2.4, C.1, Figs. 1 and 2).

A perceptron is trained to a minimum on training images, and from there to minima on test images and on mixtures:
losses on the line through both minima, and how far the minimum moves with the share of test images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fairseq_sam.analysis.plots import draw_curves, figure, save
from fairseq_sam.analysis.tables import read_rows, write_rows
from fairseq_sam.analysis.theory import (
    L2,
    LinePoint,
    Shift,
    correlation,
    line,
    minimise,
    objective,
    perceptron,
    read_mnist,
    shifts,
)
from fairseq_sam.commands import common


def main(arguments: Sequence[str]) -> None:
    """Run the trials; write ``line.tsv``, ``shifts.tsv`` and ``theory.png``."""
    parser = argparse.ArgumentParser(
        prog="fairseq-sam theory", description=" ".join((__doc__ or "").split()), allow_abbrev=False
    )
    parser.add_argument("mnist", type=Path, help="folder of MNIST: train-images-idx3-ubyte.gz and so on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables and the plot")
    parser.add_argument("--number", type=int, default=10000, help="images of each part; default %(default)s")
    parser.add_argument("--trials", type=int, default=100, help="mixtures; default %(default)s")
    parser.add_argument("--l2", type=float, default=L2, help="weight of the L2 penalty; default %(default)s")
    parser.add_argument("--iterations", type=int, default=200, help="of L-BFGS; default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the first weights; default %(default)s")
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float32)
    train, test = (read_mnist(args.mnist, split, args.number) for split in ("train", "t10k"))
    model = perceptron(seed=args.seed)
    norm = minimise(objective(model, train, args.l2), iterations=5 * args.iterations)
    print(f"training minimum: the gradient's norm is {norm:.2g}", flush=True)
    points = line(model, train, test, [step / 20 for step in range(-20, 41)], l2=args.l2)
    write_rows(args.out / "line.tsv", [vars(point) for point in points])
    settings = {"images": str(args.number), "l2": f"{args.l2:g}", "seed": str(args.seed)}
    table = args.out / "shifts.tsv"
    rows: list[dict[str, object]] = [dict(row) for row in read_rows(table) if settings.items() <= row.items()]
    known = {str(row["eta"]) for row in rows}
    etas = [trial / args.trials for trial in range(1, args.trials + 1)]

    def add(shift: Shift) -> None:
        rows.append({**settings, "eta": f"{shift.eta:.6g}", "distance": shift.distance})
        write_rows(table, rows)

    left = [eta for eta in etas if f"{eta:.6g}" not in known]
    shifts(
        model, train, test, left, l2=args.l2, iterations=args.iterations, found=add,
        progress=common.Progress("shifts of the minimum"),
    )  # fmt: skip
    found = sorted((Shift(float(str(row["eta"])), float(str(row["distance"]))) for row in rows), key=lambda s: s.eta)
    plot(points, found, args.out / "theory.png")
    print(f"correlation of eta and the shift's length over {len(found)} trials: {correlation(found):.4f}")
    common.written(args.out / "line.tsv", table, args.out / "theory.png")


def plot(points: Sequence[LinePoint], found: Sequence[Shift], path: Path) -> None:
    """Draw the losses on the line and the shifts' lengths.

    Args:
        points: on the line.
        found: the shifts.
        path: the file.
    """
    made, axes = figure(2)
    alphas = [point.alpha for point in points]
    curves = {
        "training loss": (alphas, [point.train for point in points]),
        "test loss": (alphas, [point.test for point in points]),
        "shifted training loss": (alphas, [point.shifted for point in points]),
    }
    x = "α (0: minimum of the test loss, 1: of the training loss)"
    draw_curves(axes[0], curves, x=x, y="loss (nats, with the penalty)", marker="")
    shown = {
        f"{len(found)} trials, correlation {correlation(found):.3f}": (
            [s.eta for s in found],
            [s.distance for s in found],
        )
    }
    draw_curves(axes[1], shown, x="share η of test data in the mixture", y="‖δ‖, shift of the minimum", linestyle="")
    axes[1].set_xlim(left=0)
    axes[1].set_ylim(bottom=0)
    save(made, path)
