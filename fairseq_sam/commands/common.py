"""What the commands share: models and their data, progress, errors in one line."""

import argparse
import contextlib
import itertools
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch

from fairseq_sam.analysis.memory import is_out_of_memory
from fairseq_sam.analysis.tables import write_rows
from fairseq_sam.commands.settings import digest_of_data, digest_of_files, write_settings

PLUGIN = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = "; a smaller --max-tokens or --batch-size, or --cpu, takes less memory"
SHOWN_EVERY = 10.0  # seconds between two lines of progress where the output is no terminal


def model_names(checkpoints: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """Return the models' names: the given ones, or the fewest parts of their paths that tell them apart.

    Raises:
        ValueError: if there are not as many names as checkpoints, two are the same or one is empty.
    """
    if names is not None:
        if len(names) != len(checkpoints) or len(set(names)) != len(names) or not all(map(str.strip, names)):
            raise ValueError(
                f"--names must be {len(checkpoints)} different names, one for each checkpoint, got {names}"
            )
        return list(names)
    whole = [path.resolve() for path in checkpoints]
    if len(set(whole)) < len(whole):
        raise ValueError("two of the files are the same; name each once")
    if len(whole) == 1:
        return [whole[0].parent.name or whole[0].stem]
    stems = [path.with_suffix("") for path in whole]
    return distinguishing_parts(stems if len(set(stems)) == len(stems) else whole)


def distinguishing_parts(paths: Sequence[Path]) -> list[str]:
    """Return the fewest parts that tell paths apart, counted from the end: folders rather than files, near ones."""
    most = max(len(path.parts) for path in paths)
    columns = [
        tuple(path.parts[-place] if place <= len(path.parts) else "" for path in paths) for place in range(1, most + 1)
    ]
    differing = [place for place in [*range(1, most), 0] if len(set(columns[place])) > 1]
    for number in range(1, len(differing) + 1):
        for places in itertools.combinations(differing, number):
            rows = zip(*(columns[place] for place in sorted(places, reverse=True)), strict=True)
            names = ["/".join(filter(None, row)) for row in rows]
            if len(set(names)) == len(names) and all(names):
                return names
    return list(map(str, paths))


@dataclass(frozen=True)
class Measured:
    """A model that a command measures.

    Attributes:
        name: in tables and plots.
        trained: ``Trained``.
        batches: of its data.
        record: what ``COMMAND.json`` says of it.
        save: writes that, once there is a table.
        write: writes a table of a name into ``--out``; before the first one those of an earlier run are removed.
    """

    name: str
    trained: Any
    batches: list[Any]
    record: dict[str, Any]
    save: Callable[[], Any]
    write: Callable[[str, Sequence[Mapping[str, Any]]], Any]

    def note(self, what: str, batches: list[Any]) -> list[Any]:
        """Let ``COMMAND.json`` tell of further batches, by their number and digest.

        Args:
            what: they are, in the plural.
            batches: which are returned.
        """
        self.record.update({what: len(batches), f"{what} digest": digest_of_data(batches)})
        self.save()
        return batches


def trained_models(
    args: argparse.Namespace,
    *tables: str,
    chosen: Callable[[argparse.Namespace, Any], list[Any]] | None = None,
    **options: Any,
) -> Iterator[Measured]:
    """Load the models of a command one after the other; random numbers are for each those of ``--seed``.

    Before the first is measured, all others are loaded too, with their data, so that hours are not spent before one
    that is damaged. The settings are written with the first table, and after a model that it is finished.

    Args:
        args: of ``parser``.
        tables: which the command writes, and plots: those of an earlier run are refused, or with ``--overwrite``
            removed when the first is written. Without any, an earlier run is gone on with.
        chosen: the batches of a model; default ``batches_of``.
        options: of ``Trained``.

    Yields:
        The models.
    """
    refuse_earlier(args, *tables)
    names = model_names(args.checkpoints, args.names)
    check_files(args.checkpoints)
    make_folder(args.out)
    import_user_module(args.user_dir)
    from fairseq_sam.adapter.trained import Trained

    def load(path: Path) -> tuple[Any, list[Any]]:
        torch.manual_seed(args.seed)
        trained = Trained(path, args.data, cpu=args.cpu, **options)
        return trained, (chosen or batches_of)(args, trained)

    models = dict(zip(names, args.checkpoints, strict=True))
    for name in names[1:]:
        trained, batches = load(models[name])
        check_loss(name, trained, batches[:1])
    records: list[dict[str, Any]] = []
    has_begun = not tables

    def save() -> None:
        if has_begun:
            write_settings(args, records)

    def write(table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        nonlocal has_begun
        if not has_begun:
            remove_earlier(args, *tables)
            has_begun = True
            save()
        write_rows(args.out / table, rows)

    for name, path in models.items():
        trained, batches = load(path)
        check_loss(name, trained, batches)
        records.append({
            "name": name, "checkpoint": path.resolve(), "weights": digest_of_files(path),
            "data": os.path.abspath(trained.data), "finished": False,
        })  # fmt: skip
        model = Measured(name, trained, batches, records[-1], save, write)
        model.note("batches", batches)
        yield model
        records[-1]["finished"] = True
        save()


def import_user_module(path: Path | None) -> None:
    """Import the plugin of ``--user-dir``, so that fairseq knows its models and tasks.

    Args:
        path: its folder; None for none.

    Raises:
        ValueError: if it is no folder, or cannot be imported.
    """
    if path is None or path.resolve() == PLUGIN:
        return
    if not path.is_dir():
        raise ValueError(f"--user-dir must be the folder of a plugin of fairseq, got {path}, which is no folder")
    from fairseq.utils import import_user_module as load

    try:
        load(argparse.Namespace(user_dir=str(path)))
    except Exception as error:
        raise ValueError(f"--user-dir {path} cannot be imported: {type(error).__name__}: {error}") from error


def check_loss(name: str, trained: Any, batches: list[Any]) -> None:
    """Refuse a model that cannot be analysed.

    Args:
        name: of the model.
        trained: ``Trained``.
        batches: what it is measured on.

    Raises:
        ValueError: if its loss is no finite number.
    """
    loss = trained.objective(batches).loss()
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss of {name}, {trained.path}, must be a finite number, got {loss:g}; take a checkpoint of before "
            "its training diverged"
        )


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Let errors in what is measured say of which model.

    Raises:
        ValueError: with the model's name.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_files(checkpoints: Sequence[Path]) -> None:
    """Refuse checkpoints that are not there.

    Raises:
        ValueError: if one is no file.
    """
    for path in checkpoints:
        if not path.is_file():
            raise ValueError(
                f"expected a checkpoint, got {path}, which is {'a folder' if path.is_dir() else 'no file'}"
            )


def refuse_earlier(args: argparse.Namespace, *names: str) -> None:
    """Refuse a folder with tables of an earlier run, which would be lost, or stand beside those of other settings.

    Args:
        args: of ``Parser``; with ``--overwrite`` they are allowed.
        names: of the command's tables and plots.

    Raises:
        ValueError: if there are some.
    """
    there = [args.out / name for name in names if (args.out / name).is_file()]
    if there and not args.overwrite:
        raise ValueError(
            f"--out {args.out} holds {', '.join(path.name for path in there)} of an earlier run; take another folder, "
            "or replace them with --overwrite"
        )


def remove_earlier(args: argparse.Namespace, *names: str) -> None:
    """Remove tables and plots of an earlier run, and ``COMMAND.json`` with them.

    Args:
        args: of ``Parser``.
        names: of the tables and plots; without any, nothing is removed.
    """
    for path in filter(Path.is_file, [args.out / name for name in (*names, f"{args.command}.json")] if names else []):
        path.unlink()


@contextlib.contextmanager
def drawing(draw: Callable[[], Any]) -> Iterator[None]:
    """Draw what was measured in the block, also if it was left by an interrupt or an error, as far as that can be.

    Args:
        draw: draws, if there is something to draw.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            draw()
        raise
    draw()


def make_folder(path: Path) -> None:
    """Make the folder of ``--out``, so that a measurement is not lost for want of it.

    Raises:
        ValueError: if no file can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be written to, got {path}: {error.strerror}") from None


def batches_of(args: argparse.Namespace, trained: Any, **changed: Any) -> list[Any]:
    """Return the batches that the command line asks for.

    Args:
        args: of ``parser``.
        trained: the model.
        changed: options of ``Trained.batches`` other than the command line's.
    """
    limits = {"max_tokens": args.max_tokens, "batch_size": args.batch_size}
    chosen = {"subset": args.subset, "number": args.num_batches, "seed": args.seed, **limits}
    found: list[Any] = trained.batches(**{**chosen, **changed})
    return found


class Progress:
    """Shows how far a long measurement is: on a terminal in one line, else in a line now and then.

    Args:
        title: what is measured.
        start: parts that were done before it began, which took none of its time.
        stream: where to; default standard error.
    """

    def __init__(self, title: str, start: int = 0, stream: TextIO | None = None) -> None:
        self._title, self._start, self._stream = title, start, stream or sys.stderr
        self._begin = self._shown = time.monotonic()
        self._is_terminal = self._stream.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` parts of the work are done."""
        now = time.monotonic()
        is_last = done >= total
        if not is_last and now - self._shown < (0.2 if self._is_terminal else SHOWN_EVERY):
            return
        self._shown = now
        spent = now - self._begin
        each = spent / max(done - self._start, 1)
        left = "" if is_last else f", {timedelta(seconds=int(each * (total - done)))} left"
        line = f"{self._title}: {done} of {total}, {timedelta(seconds=int(spent))}{left}"
        end = "\n" if is_last or not self._is_terminal else ""
        self._stream.write(("\r\x1b[K" if self._is_terminal else "") + line + end)
        self._stream.flush()


def quiet() -> None:
    """Keep libraries from writing between a command's lines."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it warns of text that is not detokenised


def run(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; what the user can mend is printed in one line.

    Returns:
        The exit status: 0, 2 after an error.
    """
    quiet()
    try:
        command(arguments)
    except Exception as error:
        if not _is_user_s(error):
            raise
        print(f"fairseq-sam: error: {error}{OUT_OF_MEMORY if is_out_of_memory(error) else ''}", file=sys.stderr)
        return 2
    return 0


def _is_user_s(error: Exception) -> bool:
    if isinstance(error, ValueError | OSError) or is_out_of_memory(error):
        return True
    errors = sys.modules.get("fairseq_sam.adapter.errors")
    return errors is not None and isinstance(error, errors.UserError)


def written(*paths: Path) -> None:
    """Say which files were written."""
    print("written: " + ", ".join(map(str, paths)))
