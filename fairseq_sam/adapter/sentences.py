"""Folders of labelled sentences, and what fine-tuned models make of them: those of other tasks, too."""

import contextlib
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary, data_utils
from torch import Tensor

from fairseq_sam.analysis.corruption import Progress, unseen

PLUGIN = Path(__file__).resolve().parents[1]
DESCRIPTION = "glue.json"  # of a folder that scripts/prepare_glue.py has made
# From a model, a batch and its configuration, a row for each instance.
Forward = Callable[[Any, Any, Any], Tensor]


class LabelledFolder:
    """A folder of sentences and their labels, as fairseq's task sentence_prediction reads them.

    Attributes:
        path: the folder.
        name: of its task.
        labels: in the order of the classes; empty for a regression.
        scale: by which the numbers of a regression were divided.
        metrics: the scores that its task is measured by, that of most papers first; empty if that is not known.
        positive: the label whose F1 counts.
        trainer: fairseq's task that trains on it.

    Args:
        path: the folder, with ``input0``, and ``label`` if it has labels.
        description: what is known of it; default what its ``glue.json`` says, if it has one.

    Raises:
        ValueError: if it is no such folder.
    """

    def __init__(self, path: Path, **description: Any) -> None:
        if not (path / "input0").is_dir():
            raise ValueError(f"expected a folder with input0 and label, as sentence_prediction reads it, got {path}")
        known = description or _description(path)
        dictionary = self._dictionary_of(path)
        self.path, self._dictionary = path, dictionary
        self.name = str(known.get("task") or path.name)
        found = dictionary.symbols[dictionary.nspecial :] if dictionary is not None else known.get("labels", ())
        # fairseq-preprocess fills dictionaries up with words that are none.
        self.labels: tuple[str, ...] = tuple(label for label in found if not label.startswith("madeupword"))
        self.scale = float(known.get("scale", 1.0))
        self.metrics: tuple[str, ...] = tuple(known.get("metrics", ()))
        self.trainer = str(known.get("trainer", "sentence_prediction"))
        self.positive = str(known.get("positive") or (self.labels[-1] if self.labels else ""))

    @property
    def is_regression(self) -> bool:
        """Whether the answers are numbers."""
        return not self.labels

    def targets(self, split: str) -> list[str] | list[float] | None:
        """Return the answers of a split; None if it has none.

        Raises:
            ValueError: if one is no number.
        """
        prefix = self.path / "label" / split
        text = prefix.with_name(f"{split}.label")
        if text.is_file():
            lines = text.read_text(encoding="utf-8").split()
            try:
                if self.is_regression:
                    return [float(line) * self.scale for line in lines]
                return [self.labels[int(line)] for line in lines]
            except (ValueError, IndexError):
                raise ValueError(f"{text} must have a number in each line") from None
        rows = None if self._dictionary is None else data_utils.load_indexed_dataset(str(prefix), self._dictionary)
        return None if rows is None else [self._dictionary.symbols[int(row[0])] for row in rows]

    @staticmethod
    def _dictionary_of(path: Path) -> Any:
        file = path / "label" / "dict.txt"
        return Dictionary.load(str(file)) if file.is_file() else None


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged; prepare the folder again with scripts/prepare_glue.py") from None


def outputs(
    checkpoint: Path,
    folder: Path,
    splits: Sequence[str],
    forwards: Mapping[str, Forward],
    *,
    batch_size: int = 32,
    cpu: bool = False,
    progress: Progress = unseen,
) -> tuple[list[Tensor], str]:
    """Run a fine-tuned model on all instances of some splits, which may be those of another task.

    Args:
        checkpoint: the model.
        folder: of sentences, with the model's dictionary; its labels are not read.
        splits: ``train``, ``valid``, …
        forwards: what is run, by the name of the task that the checkpoint is of.
        batch_size: instances that run together; changes nothing but rounding.
        cpu: stay on the CPU even if there is a GPU.
        progress: called after each batch, with the instances that are done, of all splits.

    Returns:
        Outputs of the model for each split in the order of the data, shape (N, size of a row), on the CPU; and the name
        of the task.

    Raises:
        ValueError: if the checkpoint is of a task that is not among `forwards`, or the folder lacks a split or has
            another dictionary than the model.
    """
    _load_plugin()
    if batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {batch_size}")
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is no file")
    for split in splits:
        if not (folder / "input0" / f"{split}.idx").is_file():
            raise ValueError(f"{folder} has no split {split}: no input0/{split}.idx")
    with _without_labels(folder) as view:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
        own = state["cfg"].task
        name = str(getattr(own, "_name", None))
        if name not in forwards:
            raise ValueError(f"{checkpoint} is of the task {name}; predictions need one of {', '.join(forwards)}")
        _check_dictionary(checkpoint, Path(own.data), folder)
        own.data = str(view)
        classes = "".join(f"{number} 1\n" for number in range(own.num_classes))
        (view / "label" / "dict.txt").write_text(classes, encoding="utf-8")
        try:
            models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], state=state)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"{checkpoint} and {folder} do not fit together: the data must be made with the model's dictionary"
            ) from error
        model = models[0].eval()
        use_cuda = torch.cuda.is_available() and not cpu
        model = model.cuda() if use_cuda else model
        for split in splits:
            task.load_dataset(split)
        total, done, rows = sum(len(task.dataset(split)) for split in splits), 0, []
        for split in splits:
            batches = task.get_batch_iterator(
                task.dataset(split), max_sentences=batch_size, required_batch_size_multiple=1,
                max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
            ).next_epoch_itr(shuffle=False)  # fmt: skip
            found: dict[int, Tensor] = {}
            with torch.inference_mode():
                for sample in batches:
                    sample = utils.move_to_cuda(sample) if use_cuda else sample
                    found.update(
                        zip(sample["id"].tolist(), forwards[name](model, sample, cfg).float().cpu(), strict=True)
                    )
                    progress(done + len(found), total)
            if sorted(found) != list(range(len(task.dataset(split)))):
                raise ValueError(f"{len(found)} of the {len(task.dataset(split))} instances of {split} were predicted")
            done += len(found)
            rows.append(torch.stack([found[number] for number in sorted(found)]))
    return rows, name


def _check_dictionary(checkpoint: Path, data: Path, folder: Path) -> None:
    """Refuse data whose words are numbered otherwise than the model's, as far as its own data are still there."""
    files = [each / "input0" / "dict.txt" for each in (data, folder)]
    if all(file.is_file() for file in files):
        words = [[line.rpartition(" ")[0] for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
        if words[0] != words[1]:
            raise ValueError(
                f"{checkpoint} and {folder} do not fit together: the data must be made with the model's dictionary, "
                f"{files[0]}"
            )


def first_token(model: Any, sample: Any, cfg: Any) -> Tensor:
    """Return the last layer's first token, as a classification head sees it: shape (N, size of the model)."""
    features: Tensor = model(**sample["net_input"], features_only=True)[0]
    if features.dim() != 3:
        raise ValueError("expected an encoder with an output for each token, got one for each sentence")
    return features[:, 0]


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


def _load_plugin() -> None:
    """Register the plugin's tasks and models; fairseq does not where the package was imported before."""
    for package in ("tasks", "models"):
        for path in sorted((PLUGIN / package).glob("[!_]*.py")):
            importlib.import_module(f"{PLUGIN.name}.{package}.{path.stem}")
