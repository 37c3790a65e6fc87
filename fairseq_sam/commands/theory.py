"""``fairseq-sam theory``: GA-SAM's analytic trials on MNIST (2.4, C.1, Figs. 1 and 2).

A perceptron is trained to a minimum on training images, and from there to minima on test images and on mixtures:
losses on the line through both minima, and how far the minimum moves with the share of test images. A stopped command
goes on where it was; rows of other settings stay in the tables.
"""

import argparse
import csv
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sam.analysis import theory
from fairseq_sam.analysis.mnist import read_mnist
from fairseq_sam.analysis.plots import draw_curves, figure, save, show_names
from fairseq_sam.analysis.tables import read_rows, write_rows
from fairseq_sam.analysis.theory import Data, LinePoint, Shift
from fairseq_sam.commands import common, options
from fairseq_sam.commands.settings import digest_of_data

ALPHAS = [step / 20 for step in range(-20, 41)]  # from theta* - (theta - theta*) to theta + (theta - theta*)
NEAR = 0.5  # |alpha| up to which a place is near theta*
NUMBER = 1000
SPLITS = ("train", "t10k")


def main(arguments: Sequence[str]) -> None:
    """Run the trials; write ``line.tsv``, ``shifts.tsv``, ``theory.png`` and the training minimum, ``minimum_*.pt``."""
    args = parse(arguments)
    common.make_folder(args.out)
    train, test = images(args.mnist, args.number, args.seed)
    settings = settings_of(args, (train, test))
    model = theory.perceptron(train[0].shape[1], args.hidden, args.activation, args.seed)
    loss_on = theory.penalised(model, args.l2)
    train_loss = loss_on([(1.0, train)])
    line = Table(args.out / "line.tsv", settings, LinePoint, "alpha")
    tables = {
        name: Table(args.out / "shifts.tsv", {**settings, "mixture": name}, Shift, "eta") for name in args.mixture
    }
    reach_minimum(train_loss, args.out / f"minimum_{digest_of_data(settings)}.pt", args.iterations)
    if line.left(ALPHAS):
        line.replace(theory.line(train_loss, loss_on([(1.0, test)]), ALPHAS, iterations=args.iterations))
    etas = [trial / args.trials for trial in range(args.trials + 1)]
    for name, table in tables.items():
        theory.shifts(
            lambda eta, mix=theory.MIXTURES[name]: loss_on(mix(train, test, eta)),
            table.left(etas), iterations=args.iterations, found=table.add, progress=common.Progress(f"{name}: shifts"),
        )  # fmt: skip
    found = {name: table.results for name, table in tables.items()}
    plot(line.results, found, args.out / "theory.png")
    report(line.results, found)
    common.written(line.path, args.out / "shifts.tsv", args.out / "theory.png")


# -- command line ----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options.

    Raises:
        ValueError: if one is wrong.
    """
    parser = options.Parser("theory", __doc__ or "")
    add = parser.add_argument
    add("mnist", type=Path, metavar="MNIST", help="its folder: train-images-idx3-ubyte.gz and so on")
    add("--out", type=Path, required=True, help="folder for the tables and the plot")
    add(
        "--number", type=options.integer(1), default=NUMBER, help="images of each split, at random; default %(default)s"
    )
    add("--trials", type=options.integer(1), default=100, help="mixtures, with η = 1/N, 2/N, …, 1; default %(default)s")
    add(
        "--mixture", nargs="+", choices=list(theory.MIXTURES), default=["samples"],
        help="samples: images are replaced, as in the paper's trials; weights: the two losses are weighted, as in its "
        "Proposition 2; default samples",
    )  # fmt: skip
    add("--activation", choices=list(theory.ACTIVATIONS), default="tanh", help="default %(default)s")
    add(
        "--hidden",
        type=options.integer(1),
        nargs="+",
        default=theory.HIDDEN,
        help="sizes of hidden layers; default 100 100",
    )
    add("--l2", type=options.not_negative, default=theory.L2, help="weight of the penalty; default %(default)s")
    add(
        "--iterations", type=options.integer(1), default=theory.ITERATIONS,
        help="of L-BFGS in a trial at most, five times as many for the training minimum; default %(default)s",
    )  # fmt: skip
    add(
        "--seed",
        type=options.integer(0, options.MOST_SEED),
        default=1,
        help="of weights and choice of images; default %(default)s",
    )
    return parser.parse_args(arguments)


# -- data and settings -----------------------------------------------------------------------------------------------


def images(folder: Path, number: int, seed: int) -> list[Data]:
    """Return as many training as test images, chosen and ordered at random; pixels in [0, 1] less their training mean.

    Args:
        folder: of MNIST.
        number: of each.
        seed: of the choice.

    Raises:
        ValueError: if there are not as many, or the files are not what they should be.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for split in SPLITS:
        pixels, classes = read_mnist(folder, split)
        if number > len(classes):
            raise ValueError(
                f"--number must be at most {len(classes)}, the images of {split} in {folder}, got {number}"
            )
        order = torch.randperm(len(classes), generator=generator)[:number]
        chosen.append((pixels[order].double() / 255, classes[order].long()))
    sizes = [pixels.shape[1] for pixels, _ in chosen]
    if len(set(sizes)) > 1:
        raise ValueError(f"expected images of one size in {folder}, got {sizes[0]} and {sizes[1]} pixels")
    mean = chosen[0][0].mean(0)
    return [(pixels - mean, classes) for pixels, classes in chosen]


def settings_of(args: argparse.Namespace, data: Sequence[Data]) -> dict[str, str]:
    """Return everything that the training minimum depends on, as the tables have it."""
    return {
        "data": digest_of_data(data), "images": str(args.number),
        "hidden": " ".join(map(str, args.hidden)), "activation": args.activation, "l2": str(args.l2),
        "iterations": str(args.iterations), "seed": str(args.seed),
    }  # fmt: skip


def reach_minimum(loss: Any, path: Path, iterations: int) -> None:
    """Move the model to the training minimum: the one in the file, or one that is found and written there.

    Args:
        loss: the training loss.
        path: the file.
        iterations: of a trial.

    Raises:
        ValueError: if the file is broken.
    """
    if path.exists():
        loss.model.load_state_dict(read_weights(path, loss.model))
    else:
        theory.minimise(loss, iterations=5 * iterations)
        torch.save(loss.model.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    value, gradient = loss.loss_and_gradient()
    print(f"training minimum: loss {value:.6g}, the gradient's norm is {theory.length(gradient):.2g}", flush=True)


def read_weights(path: Path, model: nn.Module) -> Mapping[str, Tensor]:
    """Read the weights of a model.

    Raises:
        ValueError: if the file is broken or holds others.
    """
    try:
        found = torch.load(path, weights_only=True)
        shapes = {name: tensor.shape for name, tensor in found.items()}
    except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is broken; remove it") from error
    if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        raise ValueError(f"{path} holds the weights of another model; remove it")
    return found


class Table:
    """Results of one setting in a table that holds those of others, too.

    Attributes:
        path: the file.

    Args:
        path: the file; read if it is there.
        settings: columns and values of the rows that are meant.
        kind: dataclass of a result, whose attributes, floats, are columns.
        key: the attribute by which results are ordered and told apart.

    Raises:
        ValueError: if the table is not one of these.
    """

    def __init__(self, path: Path, settings: Mapping[str, str], kind: type, key: str) -> None:
        self.path, self._settings, self._kind, self._key = path, settings, kind, key
        self._columns = list(kind.__dataclass_fields__)
        own = [row for row in self._rows() if self._is_own(row)]
        try:
            self._results = [kind(*(float(row[column]) for column in self._columns)) for row in own]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} has a row that is no measurement ({error}); remove the row") from error

    @property
    def results(self) -> list[Any]:
        """All results of the settings, in order."""
        return sorted(self._results, key=self._place)

    def left(self, places: Sequence[float]) -> list[float]:
        """Return those of the places that are not in the table."""
        known = {f"{self._place(result):.6g}" for result in self._results}
        return [place for place in places if f"{place:.6g}" not in known]

    def add(self, result: Any) -> None:
        """Add a result, and write the table."""
        self.replace([*self._results, result])

    def replace(self, results: Sequence[Any]) -> None:
        """Put results in the place of all of the settings, and write the table."""
        self._results = list(results)
        others = [row for row in self._rows() if not self._is_own(row)]
        write_rows(self.path, [*others, *({**self._settings, **vars(result)} for result in self.results)])

    def _rows(self) -> list[dict[str, str]]:
        try:
            rows = read_rows(self.path)
        except (csv.Error, UnicodeDecodeError):
            rows = [{}]
        wanted = {self._key, *self._settings}
        if any(None in row or None in row.values() or not wanted <= row.keys() for row in rows):
            raise ValueError(f"{self.path} is no table of this command; move it away or give another --out")
        return rows

    def _is_own(self, row: Mapping[str, str]) -> bool:
        return self._settings.items() <= row.items()

    def _place(self, result: Any) -> float:
        return float(getattr(result, self._key))


# -- plot and report -------------------------------------------------------------------------------------------------


def plot(points: Sequence[LinePoint], found: Mapping[str, Sequence[Shift]], path: Path) -> None:
    """Draw the losses on the line and the shifts' lengths.

    Args:
        points: on the line.
        found: the shifts, by mixture.
        path: the file.
    """
    made, axes = figure(2, width=5.2, height=4.2)
    alphas = [point.alpha for point in points]
    curves = {
        "training loss": (alphas, [point.train for point in points]),
        "test loss": (alphas, [point.test for point in points]),
        "training loss, shifted by δ": (alphas, [point.shifted for point in points]),
    }
    draw_curves(axes[0], curves, x="α: weights αθ + (1 − α)θ*", y="loss with penalty (nats per image)", marker="")
    for place, name in ((0.0, "θ*"), (1.0, "θ")):
        axes[0].axvline(place, color="black", linewidth=0.6)
        axes[0].annotate(
            name, (place, 0.6), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points"
        )
    trials = {f"{name}: {summary(shifts)}": _places_and_lengths(shifts) for name, shifts in found.items()}
    draw_curves(
        axes[1], trials, x="η: share of test data in the mixture", y="‖δ‖₂: shift of the minimum (unit of the weights)",
        linestyle="", fillstyle="none",
    )  # fmt: skip
    last = max((shift for shifts in found.values() for shift in shifts), key=lambda shift: shift.eta)
    straight = "proportional to η"
    axes[1].plot([0, last.eta], [0, last.distance], color="black", linewidth=0.8, label=straight)
    show_names(axes[1], [*trials, straight])
    axes[1].set_xlim(left=-0.02)
    axes[1].set_ylim(bottom=0)
    save(made, path)


def summary(shifts: Sequence[Shift]) -> str:
    """Return number of trials, correlation coefficient and exponent, in words; without the control at η = 0."""
    trials = [shift for shift in shifts if shift.eta > 0]
    values = theory.correlation(trials), theory.exponent(trials)
    return "{} trials, r = {:.3f}, ∝ η^{:.2f}".format(len(trials), *values)


def report(points: Sequence[LinePoint], found: Mapping[str, Sequence[Shift]]) -> None:
    """Print how well the theorems fit."""
    near = [point for point in points if abs(point.alpha) <= NEAR]
    for where, some in ((f"near θ* (|α| ≤ {NEAR:g})", near), ("on the whole line", points)):
        shifted, unshifted = theory.misfits(some)
        print(f"off the test loss {where}: training loss shifted by δ {shifted:.2%}, not shifted {unshifted:.2%}")
    for name, shifts in found.items():
        control = next(shift for shift in shifts if shift.eta == 0)
        largest = max(shift.gradient for shift in shifts)
        print(f"{name}: {summary(shifts)}; r is the correlation of η and ‖δ‖")
        print(f"{name}: control, ‖δ‖ at η = 0: {control.distance:.2g}; largest gradient reached {largest:.2g}")


def _places_and_lengths(shifts: Sequence[Shift]) -> tuple[list[float], list[float]]:
    return [shift.eta for shift in shifts], [shift.distance for shift in shifts]
