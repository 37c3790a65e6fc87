"""What a fine-tuned encoder knows of another task: a linear classifier, or regression, on its features.

The encoder stays as it is. Its feature is the last layer's first token, as a classification head sees it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq_sam.analysis.transfer import linear_probe
from scripts.recipes import predictions
from scripts.recipes.predictions import Folder, Prediction


def probe(checkpoint: Path, folder: Folder, *, cpu: bool = False) -> dict[str, float]:
    """Fit a linear model to the training split of another task and score it on the validation split.

    Args:
        checkpoint: fine-tuned by sentence_prediction.
        folder: prepared folder of a task of sentence_prediction with the same dictionary.
        cpu: stay on the CPU even if there is a GPU.

    Returns:
        The other task's scores (times 100), NaN for a correlation that there is none of.

    Raises:
        ValueError: if the folder is not of sentence_prediction.
    """
    if folder.task.trainer != "sentence_prediction":
        raise ValueError(f"{folder.task.name} is a task of {folder.task.trainer}, and probes are of whole sentences")
    found = linear_probe(
        _features(checkpoint, folder, "train", cpu),
        folder.targets("train") or (),
        _features(checkpoint, folder, "valid", cpu),
        is_regression=folder.task.is_regression,
    )
    pairs: Iterable[Any] = zip(folder.targets("valid") or (), found, strict=True)
    scores = predictions.score(folder.task, [Prediction(n, target, answer) for n, (target, answer) in enumerate(pairs)])
    return {name: float("nan") if value is None else value for name, value in scores.items()}


def _features(checkpoint: Path, folder: Folder, split: str, cpu: bool) -> Tensor:
    rows, _ = predictions.outputs(checkpoint, folder.path, split, forward=_first_token, cpu=cpu)
    return rows


def _first_token(model: Any, sample: Any, cfg: Any) -> Tensor:
    features: Tensor = model(**sample["net_input"], features_only=True)[0]
    return features[:, 0]
