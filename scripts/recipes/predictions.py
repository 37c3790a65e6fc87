"""Predictions of a fine-tuned fairseq checkpoint on a prepared folder, which may be that of another task."""

import contextlib
import importlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scripts.recipes import glue, scores
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


class Folder:
    """A prepared folder.

    Args:
        path: the folder.
        task_name: the task; default that in its ``glue.json``.

    Raises:
        ValueError: if it is not known which task it is.
    """

    def __init__(self, path: Path, task_name: str | None = None) -> None:
        self.path = path
        name = task_name or glue.read_description(path)["task"]
        if name not in glue.TASKS:
            raise ValueError(f"--task must be one of {', '.join(glue.TASKS)}, got {name!r}")
        self.task: GlueTask = glue.TASKS[name]

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in the order of the classes; a folder that fairseq-preprocess made has an order of its own."""
        found = self._label_dictionary()
        return tuple(found.symbols[found.nspecial :]) if found is not None else self.task.labels

    def targets(self, split: str) -> list[str] | list[float] | None:
        """Return the answers of a split; None if it has none."""
        from fairseq.data import data_utils

        prefix = self.path / "label" / split
        text = prefix.with_name(f"{split}.label")
        if text.is_file():
            lines = text.read_text(encoding="utf-8").split()
            if self.task.is_regression:
                return [float(line) * self.task.scale for line in lines]
            return [self.labels[int(line)] for line in lines]
        dictionary = self._label_dictionary()
        rows = data_utils.load_indexed_dataset(str(prefix), dictionary) if dictionary is not None else None
        return None if rows is None else [dictionary.symbols[int(row[0])] for row in rows]

    def _label_dictionary(self) -> Any:
        from fairseq.data import Dictionary

        path = self.path / "label" / "dict.txt"
        return Dictionary.load(str(path)) if path.is_file() else None


@contextlib.contextmanager
def _without_labels(folder: Path) -> Iterator[Path]:
    """A folder with the same inputs and no labels: a model of another task would not find its own among them."""
    with tempfile.TemporaryDirectory() as name:
        view = Path(name)
        for path in folder.iterdir():
            if path.name != "label":
                (view / path.name).symlink_to(path.resolve())
        (view / "label").mkdir()
        yield view


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


def outputs(
    checkpoint: Path,
    folder: Path,
    split: str,
    *,
    forward: Callable[[Any, Any, Any], Tensor] | None = None,
    batch_size: int = 32,
    cpu: bool = False,
) -> tuple[Tensor, str]:
    """Run a model on all instances of a split.

    Args:
        checkpoint: fine-tuned by the task sentence_prediction, span_prediction or sentence_ranking.
        folder: prepared folder; its labels are not read.
        split: ``train``, ``valid``, …
        forward: from the model, a batch and its configuration, a row for each instance; default the scores of the
            classes.
        batch_size: instances that run together; changes nothing but rounding.
        cpu: stay on the CPU even if there is a GPU.

    Returns:
        Outputs of the model in the order of the data, shape (N, classes) or (N, size of a row), on the CPU; and the
        name of fairseq's task.

    Raises:
        ValueError: if the checkpoint is of another task, or the folder lacks the split.
    """
    from fairseq import checkpoint_utils, utils

    _load_plugin()
    if batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {batch_size}")
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is no file")
    if not (folder / "input0" / f"{split}.idx").is_file():
        raise ValueError(f"{folder} has no split {split}: no input0/{split}.idx")
    with _without_labels(folder) as view:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint), {"data": str(view)})
        name = getattr(state["cfg"].task, "_name", None)
        if name not in FORWARD:
            raise ValueError(f"{checkpoint} is of the task {name}; predictions need one of {', '.join(FORWARD)}")
        classes = "".join(f"{number} 1\n" for number in range(state["cfg"].task.num_classes))
        (view / "label" / "dict.txt").write_text(classes, encoding="utf-8")
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], state=state)
        task.load_dataset(split)
        model = models[0].eval()
        use_cuda = torch.cuda.is_available() and not cpu
        model = model.cuda() if use_cuda else model
        batches = task.get_batch_iterator(
            task.dataset(split), max_sentences=batch_size, required_batch_size_multiple=1,
            max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        ).next_epoch_itr(shuffle=False)  # fmt: skip
        found: dict[int, Tensor] = {}
        with torch.inference_mode():
            for sample in batches:
                sample = utils.move_to_cuda(sample) if use_cuda else sample
                rows = (forward or FORWARD[name])(model, sample, cfg).float().cpu()
                found.update(zip(sample["id"].tolist(), rows, strict=True))
        if sorted(found) != list(range(len(task.dataset(split)))):
            raise ValueError(f"{len(found)} of the {len(task.dataset(split))} instances of {split} were predicted")
    return torch.stack([found[number] for number in sorted(found)]), name


def _load_plugin() -> None:
    """Register the plugin's tasks and models; fairseq does not where the package was imported before."""
    for package in ("tasks", "models"):
        for path in sorted((PLUGIN / package).glob("[!_]*.py")):
            importlib.import_module(f"{PLUGIN.name}.{package}.{path.stem}")


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
    rows, trainer = outputs(checkpoint, folder.path, split, batch_size=batch_size, cpu=cpu)
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
    values = {name: scores.METRICS[name](found, wanted, task.positive) for name in task.metrics}
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
