"""What a command's tables were made with, beside them; digests of files and of data."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq_sam._version import __version__

NO_SETTINGS = ("command", "started", "checkpoints", "runs", "names", "out", "overwrite")  # of the flags


def write_settings(args: argparse.Namespace, measured: Sequence[Mapping[str, Any]]) -> Path:
    """Write what a command's tables were made with beside them: ``COMMAND.json``, with its runs, the last one last.

    Args:
        args: of ``Parser``; the same for all calls of one run, which take each other's place.
        measured: each model's or run's name, files and digests, and whether its numbers are all there.

    Returns:
        The file.
    """
    path: Path = args.out / f"{args.command}.json"
    flags = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    own = {"started": args.started, "fairseq_sam": __version__, "flags": flags, "measured": measured}
    runs = [run for run in _runs(path) if run.get("started") != args.started]
    whole = {"command": args.command, "runs": [*runs, own]}
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(whole, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _runs(path: Path) -> list[dict[str, Any]]:
    """The runs that a file tells of; none of a damaged one."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def digest_of_files(*paths: Path) -> str:
    """Return a name for what files hold: eight hexadecimal digits."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:8]


def digest_of_data(batches: Any) -> str:
    """Return a name for what batches hold, wherever the data lie: eight hexadecimal digits.

    Args:
        batches: tensors and plain values in lists, tuples and mappings.
    """
    found = hashlib.sha256()
    for part in _parts(batches):
        found.update(part)
    return found.hexdigest()[:8]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield b"mapping"
        for key in sorted(value, key=str):
            yield from (str(key).encode(), *_parts(value[key]))
    elif isinstance(value, list | tuple):
        yield f"{len(value)} parts".encode()
        for each in value:
            yield from _parts(each)
    else:
        yield repr(value).encode()
