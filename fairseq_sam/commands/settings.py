"""What a command's tables were made with, beside them; digests of files and of data."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq_sam._version import __version__

NO_SETTINGS = ("command", "checkpoints", "runs", "names", "out")  # of the flags


def write_settings(args: argparse.Namespace, measured: Sequence[Mapping[str, Any]]) -> Path:
    """Write what a command's tables were made with beside them: ``COMMAND.json``.

    Args:
        args: of ``Parser``.
        measured: each model's or run's name, files and digests.

    Returns:
        The file.
    """
    path: Path = args.out / f"{args.command}.json"
    flags = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    whole = {"command": args.command, "fairseq_sam": __version__, "flags": flags, "measured": measured}
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    return path


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
