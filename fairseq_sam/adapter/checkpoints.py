"""Checkpoints under torch's safe loader: what a fairseq checkpoint may hold, and averaging."""

import argparse
import collections
import functools
import pickle
import re
import struct
import typing
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import omegaconf.base
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from torch import Tensor

from fairseq_sam.adapter.errors import CheckpointError


def checkpoint_classes() -> list[Any]:
    """Return exactly the classes that fairseq's checkpoints hold beside tensors and plain containers.

    ``argparse.Namespace`` (tasks and models without a dataclass), numpy scalars (best metrics after ``--eval-bleu``),
    and what fairseq broadcasts to the other workers of a resumed distributed run.
    """
    multiarray = getattr(np, "_core", None) or np.core
    numpy_classes = [
        multiarray.multiarray._reconstruct,
        multiarray.multiarray.scalar,
        np.ndarray,
        np.dtype,
        np.dtypes.Int64DType,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
    ]
    broadcast = [
        omegaconf.DictConfig,
        omegaconf.ListConfig,
        omegaconf.base.ContainerMetadata,
        omegaconf.base.Metadata,
        omegaconf.nodes.AnyNode,
        typing.Any,
        collections.defaultdict,
        dict,
        list,
        int,
        distributed_utils._TensorPlaceholder,
    ]
    return [argparse.Namespace, *numpy_classes, *broadcast]


def allow_checkpoint_classes() -> None:
    """Let torch's safe loader read fairseq's checkpoints. It stays on: a pickle with any other class is refused."""
    torch.serialization.add_safe_globals(checkpoint_classes())


def explain_unreadable_checkpoints() -> None:
    """Let ``checkpoint_utils.load_checkpoint_to_cpu`` say what is wrong with a file and what to do.

    Checksums are compared first, which torch's reader does not do: a changed bit in a weight would go unnoticed.
    """
    original = checkpoint_utils.load_checkpoint_to_cpu
    if getattr(original, "explains", False):
        return

    @functools.wraps(original)
    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        broken = _broken_record(path)
        if broken:
            raise _damaged(path, f"the checksum of {broken} is not that of its content")
        try:
            return original(path, *args, **kwargs)
        except (CheckpointError, FileNotFoundError, MemoryError):
            raise
        except (RuntimeError, ValueError, OSError, struct.error, pickle.UnpicklingError, EOFError, LookupError,
                TypeError, AttributeError, AssertionError) as error:  # fmt: skip
            if "out of memory" in str(error):
                raise
            raise _explained(path, error) from None

    load_checkpoint_to_cpu.explains = True  # type: ignore[attr-defined]
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


def _broken_record(path: str) -> str | None:
    """The first record of a checkpoint whose content has changed; None if all are whole, or it has no records."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError):
        return "its records"


def _explained(path: str, error: Exception) -> CheckpointError:
    if isinstance(error, EOFError):
        return _damaged(path, "it ends too early")
    if isinstance(error, RuntimeError | OSError | struct.error | UnicodeError):
        return _damaged(path, (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0])
    if not isinstance(error, pickle.UnpicklingError):
        text = " ".join(str(error).split())
        return _damaged(path, f"it is not made as those of fairseq are ({type(error).__name__}: {text})")
    # torch's own message proposes to switch the safe loader off.
    unknown = re.search(r"GLOBAL ([\w.]+)|(?:class|function|call) ([A-Za-z_]\w*\.[\w.]+)", str(error))
    if unknown is None:
        return _damaged(path, "torch's safe loader cannot read it")
    name = unknown.group(1) or unknown.group(2)
    return CheckpointError(
        f"{path} holds {name}, which no checkpoint of fairseq does; it was not loaded, nothing in it was "
        "executed. Take a checkpoint that you trust; a class of your own can be allowed by "
        "torch.serialization.add_safe_globals in your user-dir"
    )


def _damaged(path: str, reason: str) -> CheckpointError:
    advice = (
        "; name another with --restore-file, such as the newest checkpoint_<epoch>_<update>.pt, or remove it to "
        "begin anew"
    )
    return CheckpointError(f"{path} is damaged or no checkpoint: {reason}. Nothing of it was loaded", advice)


def average_weights(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Average the model weights of checkpoints.

    Args:
        paths: checkpoint files of the same model, at least one.

    Returns:
        The last checkpoint with its ``model`` replaced by the mean over `paths`, summed in float64 and stored in the
        weights' own type; integer entries are the last checkpoint's. Optimizer state is left out.

    Raises:
        ValueError: if `paths` is empty or the checkpoints have different parameters.
    """
    if not paths:
        raise ValueError("expected at least one checkpoint to average, got none")
    total: dict[str, Tensor] = {}
    for path in paths:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        model = state["model"]
        if total and model.keys() != total.keys():
            different = sorted(model.keys() ^ total.keys())
            raise ValueError(f"{path} has other parameters than {paths[0]}: {', '.join(different[:5])}")
        for name, weight in model.items():
            exact = weight.double() if weight.is_floating_point() else weight
            total[name] = total[name] + exact if name in total and weight.is_floating_point() else exact
    state["model"] = {
        name: (total[name] / len(paths)).to(weight.dtype) if weight.is_floating_point() else weight
        for name, weight in model.items()
    }
    state.pop("last_optimizer_state", None)
    return state


def last_checkpoints(
    folder: str | Path, count: int, *, by_update: bool = False, upper_bound: int | None = None
) -> list[Path]:
    """Find the newest checkpoints that a run kept.

    Args:
        folder: the run's ``--save-dir``.
        count: how many, >= 1.
        by_update: take ``checkpoint_<epoch>_<update>.pt`` instead of ``checkpoint<epoch>.pt``.
        upper_bound: highest epoch (or update) to take.

    Returns:
        Their paths, newest first.

    Raises:
        ValueError: if `count` is below 1 or there are fewer checkpoints.
    """
    if count < 1:
        raise ValueError(f"the number of checkpoints must be >= 1, got {count}")
    pattern = re.compile(r"checkpoint_\d+_(\d+)\.pt" if by_update else r"checkpoint(\d+)\.pt")
    found = {}
    for path in Path(folder).iterdir():
        match = pattern.fullmatch(path.name)
        if match and (upper_bound is None or int(match.group(1)) <= upper_bound):
            found[int(match.group(1))] = path
    newest = [found[number] for number in sorted(found, reverse=True)[:count]]
    if len(newest) < count:
        kind = "checkpoint_<epoch>_<update>.pt" if by_update else "checkpoint<epoch>.pt"
        raise ValueError(f"expected {count} files {kind} in {folder}, found {len(newest)}; were they kept?")
    return newest
