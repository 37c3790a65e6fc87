"""What a fine-tuned encoder knows of another task: a linear classifier, or regression, on its features.

The encoder stays as it is. Its feature is the last layer's first token, as a classification head sees it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_sam.adapter.sentences import LabelledFolder, first_token, outputs
from fairseq_sam.analysis.corruption import Progress, unseen
from fairseq_sam.analysis.scores import METRICS
from fairseq_sam.analysis.transfer import linear_probe

FORWARD = {"sentence_prediction": first_token}


def probe(
    checkpoint: Path,
    folder: LabelledFolder,
    *,
    subset: str = "valid",
    batch_size: int = 32,
    cpu: bool = False,
    progress: Progress = unseen,
) -> dict[str, float]:
    """Fit a linear model to the training split of another task and score it on another split.

    Args:
        checkpoint: fine-tuned by sentence_prediction.
        folder: of a task of sentence_prediction with the same dictionary.
        subset: the split that is scored.
        batch_size: sentences that run together; changes nothing but rounding.
        cpu: stay on the CPU even if there is a GPU.
        progress: called after each batch of both splits.

    Returns:
        The scores that the folder names (times 100), NaN for a correlation that there is none of; if it names none,
        ``pearson`` and ``spearman``, or ``accuracy``, ``matthews`` and, of two classes, the ``f1`` of the last.

    Raises:
        ValueError: if the folder is of another kind of task, lacks a split or its answers, or the model is of another
            task.
    """
    if folder.trainer != "sentence_prediction":
        raise ValueError(f"{folder.name} is a task of {folder.trainer}, and probes are of whole sentences")
    known, wanted = (_answers(folder, split) for split in ("train", subset))
    (first, second), _ = outputs(
        checkpoint, folder.path, ("train", subset), FORWARD, batch_size=batch_size, cpu=cpu, progress=progress
    )
    if not all(math.isfinite(float(each.sum())) for each in (first, second)):
        raise ValueError(
            f"the model of {checkpoint} gives features that are no finite numbers; take a checkpoint of before its "
            "training diverged"
        )
    found = linear_probe(first, known, second, is_regression=folder.is_regression)
    return {name: METRICS[name](found, wanted, folder.positive) for name in metrics_of(folder)}


def metrics_of(folder: LabelledFolder) -> tuple[str, ...]:
    """Return the names of a folder's scores, the most usual first."""
    if folder.metrics:
        return folder.metrics
    if folder.is_regression:
        return ("pearson", "spearman")
    return ("accuracy", "f1", "matthews") if len(folder.labels) == 2 else ("accuracy", "matthews")


def _answers(folder: LabelledFolder, split: str) -> Sequence[Any]:
    answers = folder.targets(split)
    if not answers:
        raise ValueError(f"{folder.path} has no answers of {split}, in label")
    if not all(math.isfinite(answer) for answer in answers if isinstance(answer, float)):
        raise ValueError(f"{folder.path} has answers of {split} that are no finite numbers")
    return answers
