"""What the commands' flags are: their types, and those that all commands on checkpoints take."""

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from fairseq_sam.core.axes import parse_norm

MOST_SEED = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """Takes a command's words; what is wrong with them is one line, as every error of the commands.

    Args:
        command: its name.
        description: what it does.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"fairseq-sam {command}", description=" ".join(description.split()), allow_abbrev=False)
        self.set_defaults(command=command, started=datetime.now().isoformat())
        # Before Python 3.14 argparse takes -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Refuse the words.

        Raises:
            ValueError: with the message.
        """
        raise ValueError(f"{message.removeprefix('argument ')} (all flags: {self.prog} --help)")


class Distinct(argparse.Action):
    """Takes several words, each of them once."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Keep the first of those that are equal."""
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def parser(
    command: str,
    description: str,
    max_tokens: int | None = 4000,
    *,
    subset: str = "valid",
    num_batches: int | None = None,
) -> Parser:
    """Return a parser with what every command on checkpoints takes.

    Args:
        command: its name.
        description: what it does.
        max_tokens: default size of a batch; None for that of the training.
        subset: default split.
        num_batches: default number of batches; None for all of the split.
    """
    size, limit = ("as in training",) * 2 if max_tokens is None else (str(max_tokens), "no limit")
    made = Parser(command, description)
    made.add_argument("checkpoints", nargs="+", type=Path, help="checkpoints of fairseq, to be compared in one plot")
    made.add_argument(
        "--names", nargs="+", help="names of the models in tables and plots; default what their paths differ in"
    )
    made.add_argument("--data", help="folder of the data (data-bin); default the one that each checkpoint names")
    made.add_argument("--subset", default=subset, help="split of the data; default %(default)s")
    made.add_argument(
        "--max-tokens", type=integer(1), default=max_tokens, help=f"size of a batch, padding included; default {size}"
    )
    made.add_argument("--batch-size", type=integer(1), help=f"sentences in a batch; default {limit}")
    all_of_it = "all of the split" if num_batches is None else str(num_batches)
    made.add_argument(
        "--num-batches", type=integer(1), default=num_batches, help=f"batches, chosen at random; default {all_of_it}"
    )
    made.add_argument("--seed", type=integer(0, MOST_SEED), default=1, help="of what is random; default 1")
    add_output(made)
    return made


def add_output(made: Parser) -> None:
    """Add what every command that runs models takes: where to, on which device, with which plugin.

    Args:
        made: the parser.
    """
    made.add_argument("--out", type=Path, required=True, help="folder for the tables (.tsv) and the plots (.png)")
    add_overwrite(made)
    made.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    made.add_argument(
        "--user-dir", type=Path, help="folder of a plugin that has the models or tasks, beside fairseq's and this one's"
    )


def add_overwrite(made: Parser) -> None:
    """Add what makes a command replace the tables of an earlier run.

    Args:
        made: the parser.
    """
    made.add_argument(
        "--overwrite", action="store_true", help="replace the tables that an earlier run of the command left in --out"
    )


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what reads an integer of a range from the command line.

    Args:
        least: the smallest.
        most: the largest; default none.
    """
    allowed = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) and (most is None or int(text) <= most):
                return int(text)
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")

    return read


def number(text: str) -> float:
    """Read a finite number from the command line.

    Raises:
        ArgumentTypeError: if it is none.
    """
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")


def _in_range(holds: Callable[[float], bool], allowed: str) -> Callable[[str], float]:
    """Return what reads a finite number of a range from the command line."""

    def read(text: str) -> float:
        with contextlib.suppress(argparse.ArgumentTypeError):
            if holds(number(text)):
                return number(text)
        raise argparse.ArgumentTypeError(f"must be a finite number {allowed}, got {text}")

    return read


positive = _in_range(lambda value: value > 0, "> 0")
not_negative = _in_range(lambda value: value >= 0, ">= 0")


def norm(text: str) -> str:
    """Read a norm from the command line.

    Raises:
        ArgumentTypeError: if it is none.
    """
    try:
        parse_norm(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be l2, linf or a number > 1, got {text}") from None
    return text


def pattern(text: str) -> str:
    """Read a regular expression from the command line.

    Raises:
        ArgumentTypeError: if it is none.
    """
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None
    return text


def refuse_unused(parser: Parser, args: argparse.Namespace, choice: str, uses: Mapping[str, Sequence[str]]) -> None:
    """Refuse flags that nothing of what was chosen uses.

    Args:
        parser: of the command.
        args: its flags; one that was not given is None.
        choice: the flag that chooses.
        uses: for each flag, which of the choices use it.

    Raises:
        ValueError: with the flag, and with the choices that it is of.
    """
    chosen = getattr(args, choice)
    for name, wanted in uses.items():
        if getattr(args, name) is not None and not {*wanted} & {*chosen}:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is of the --{choice} {', '.join(wanted)} only, got --{choice} {' '.join(chosen)}")


def fill(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Set flags that were not given to their defaults.

    Args:
        args: in which they are None.
        defaults: by name.
    """
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
