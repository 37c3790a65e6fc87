"""Predictions of a fine-tuned fairseq checkpoint on a prepared folder, which may be that of another task."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_sam.adapter.sentences import LabelledFolder, outputs
from fairseq_sam.analysis.scores import METRICS
from scripts.recipes import glue
from scripts.recipes.glue import GlueTask

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "fairseq_sam"


class Prediction(NamedTuple):
    """What is predicted for an instance.

    Attributes:
        id: number of the instance in its split, from 0.
        target: the right label or score; None where the split has none.
        prediction: a label, or the score of a regression in the unit of the data.
        scores: probability of each of the model's classes; of a regression, nothing.
    """

    id: int
    target: str | float | None
    prediction: str | float
    scores: tuple[float, ...] = ()


# -- the folder --------------------------------------------------------------------------------------------------------


class Folder(LabelledFolder):
    """A prepared folder of GLUE or SuperGLUE.

    Args:
        path: the folder.
        task_name: the task; default that in its ``glue.json``.

    Raises:
        ValueError: if it is not known which task it is.
    """

    def __init__(self, path: Path, task_name: str | None = None) -> None:
        name = task_name or glue.read_description(path)["task"]
        if name not in glue.TASKS:
            raise ValueError(f"--task must be one of {', '.join(glue.TASKS)}, got {name!r}")
        self.task: GlueTask = glue.TASKS[name]
        super().__init__(
            path, task=name, labels=self.task.labels, scale=self.task.scale, metrics=self.task.metrics,
            positive=self.task.positive, trainer=self.task.trainer,
        )  # fmt: skip


# -- the model ---------------------------------------------------------------------------------------------------------


def _sentence_prediction(model: Any, sample: Any, cfg: Any) -> Tensor:
    name = cfg.criterion.classification_head_name
    logits: Tensor = model(**sample["net_input"], features_only=True, classification_head_name=name)[0]
    return logits


def _span_prediction(model: Any, sample: Any, cfg: Any) -> Tensor:
    from fairseq_sam.criterions.span_prediction import span_logits

    return span_logits(model, sample, cfg.criterion.classification_head_name)


def _sentence_ranking(model: Any, sample: Any, cfg: Any) -> Tensor:
    name = getattr(cfg.criterion, "ranking_head_name", "sentence_classification_head")
    inputs = (sample[f"net_input{number}"] for number in range(1, cfg.task.num_classes + 1))
    return torch.cat([model(**each, classification_head_name=name)[0] for each in inputs], dim=1)


FORWARD: dict[str, Callable[[Any, Any, Any], Tensor]] = {
    "sentence_prediction": _sentence_prediction,
    "span_prediction": _span_prediction,
    "sentence_ranking": _sentence_ranking,
}


# -- predictions -------------------------------------------------------------------------------------------------------


def predict(
    checkpoint: Path,
    folder: Folder,
    split: str = "valid",
    labels: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    cpu: bool = False,
) -> list[Prediction]:
    """Predict the answers of a split.

    Args:
        checkpoint: fine-tuned checkpoint.
        folder: prepared folder, of the task of the checkpoint or of another one with the same dictionary.
        split: which split.
        labels: for each class of the model in its order, the label of the folder that it stands for; default the
            folder's own labels in their order. For a folder with scores (STS-B) and a model with classes, the score
            that each stands for: the prediction is the mean of the scores, weighted by the classes' probabilities.
        batch_size: instances that run together.
        cpu: stay on the CPU even if there is a GPU.

    Returns:
        In the order of the data.

    Raises:
        ValueError: if checkpoint, folder and labels do not fit.
    """
    (rows,), trainer = outputs(checkpoint, folder.path, [split], FORWARD, batch_size=batch_size, cpu=cpu)
    if trainer != folder.task.trainer:
        raise ValueError(f"{checkpoint} is of the task {trainer}, but {folder.task.name} needs {folder.task.trainer}")
    targets = folder.targets(split)
    if targets is not None and len(targets) != len(rows):
        raise ValueError(f"{folder.path} has {len(targets)} labels and {len(rows)} inputs of {split}")
    if rows.shape[1] == 1:
        if labels or not folder.task.is_regression:
            raise ValueError(f"{checkpoint} is a regression; it has no classes for {folder.task.name} or --labels")
        found: list[tuple[str | float, tuple[float, ...]]] = [(float(row[0]) * folder.task.scale, ()) for row in rows]
    else:
        names = _names_of_classes(folder, labels, rows.shape[1])
        found = [_of_classes(row.softmax(0), names, folder.task.is_regression) for row in rows]
    return [
        Prediction(number, targets[number] if targets is not None else None, answer, probabilities)
        for number, (answer, probabilities) in enumerate(found)
    ]


def _names_of_classes(folder: Folder, labels: Sequence[str] | None, number: int) -> list[str]:
    names = list(labels or folder.labels)
    if folder.task.is_regression:
        steps = (folder.task.scale * place / (number - 1) for place in range(number))
        example = f"--labels {','.join(f'{step:g}' for step in steps)}"
        if len(names) != number or not all(_is_number(name) for name in names):
            raise ValueError(
                f"{folder.task.name} has scores, and the model {number} classes; name the score that each stands for, "
                f"e.g. {example}"
            )
    elif len(names) != number or not set(names) <= set(folder.labels):
        raise ValueError(
            f"the model has {number} classes, and {folder.task.name} the labels {', '.join(folder.labels)}; say with "
            f"--labels which of them each class stands for, {number} names with commas; got {','.join(names)}"
        )
    return names


def _of_classes(probabilities: Tensor, names: list[str], wants_number: bool) -> tuple[str | float, tuple[float, ...]]:
    shares = tuple(probabilities.tolist())
    if wants_number:
        return sum(share * float(name) for share, name in zip(shares, names, strict=True)), shares
    return names[int(probabilities.argmax())], shares


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def score(task: GlueTask, predictions: Sequence[Prediction]) -> dict[str, float | None]:
    """Return the task's scores; None for a correlation that there is none of, nothing without targets."""
    if any(each.target is None for each in predictions):
        return {}
    found, wanted = [each.prediction for each in predictions], [each.target for each in predictions]
    values = {name: METRICS[name](found, wanted, task.positive) for name in task.metrics}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def write(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write ``predictions.tsv``: id, target, prediction, and the probability of each class of the model."""
    columns = ["id", "target", "prediction", *(f"class{number}" for number in range(len(predictions[0].scores)))]
    lines = ["\t".join(columns)]
    for each in predictions:
        shares = (f"{share:.6g}" for share in each.scores)
        lines.append("\t".join([str(each.id), _cell(each.target), _cell(each.prediction), *shares]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
