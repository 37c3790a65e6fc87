"""Checkpoints under torch's safe loader: what a fairseq checkpoint may hold, and averaging."""

import argparse
import collections
import re
import typing
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
