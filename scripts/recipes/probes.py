"""What a fine-tuned encoder knows of another task: a linear classifier, or regression, on its features.

The encoder stays as it is. Its feature is the last layer's first token, as a classification head sees it, scaled to
mean 0 and standard deviation 1 over the other task's training split.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from scripts.recipes import predictions
from scripts.recipes.predictions import Folder, Prediction

MOST_ITERATIONS = 2000


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
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if folder.task.trainer != "sentence_prediction":
        raise ValueError(f"{folder.task.name} is a task of {folder.task.trainer}, and probes are of whole sentences")
    linear = Ridge() if folder.task.is_regression else LogisticRegression(max_iter=MOST_ITERATIONS)
    model = make_pipeline(StandardScaler(), linear)
    model.fit(_features(checkpoint, folder, "train", cpu), folder.targets("train"))
    found = model.predict(_features(checkpoint, folder, "valid", cpu)).tolist()
    pairs: Iterable[Any] = zip(folder.targets("valid") or (), found, strict=True)
    scores = predictions.score(folder.task, [Prediction(n, target, answer) for n, (target, answer) in enumerate(pairs)])
    return {name: float("nan") if value is None else value for name, value in scores.items()}


def _features(checkpoint: Path, folder: Folder, split: str, cpu: bool) -> Any:
    rows, _ = predictions.outputs(checkpoint, folder.path, split, forward=_first_token, cpu=cpu)
    return rows.numpy()


def _first_token(model: Any, sample: Any, cfg: Any) -> Tensor:
    features: Tensor = model(**sample["net_input"], features_only=True)[0]
    return features[:, 0]
