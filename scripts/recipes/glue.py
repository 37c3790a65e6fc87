"""GLUE and SuperGLUE for fairseq: reading the official files, samples of the training data, folders to train on."""

import json
import lzma
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.recipes.glue_tasks import TASKS, GlueTask, Instance, Record
from scripts.recipes.samples import sample, sample_size
from scripts.recipes.subwords import Tokenize, tokens_of_span
from scripts.recipes.text import write_indexed

__all__ = [
    "TASKS", "Contents", "GlueTask", "Prepared", "find_file", "find_files", "prepare", "read_description", "read_file",
    "training_flags",
]  # fmt: skip

DESCRIPTION = "glue.json"  # in a prepared folder: which task it is and how it was made
REQUIRED = ("train", "valid", "valid1")

# -- reading -----------------------------------------------------------------------------------------------------------


def find_file(task: GlueTask, folder: Path, split: str) -> Path | None:
    """Find the file of a split.

    Args:
        task: the task.
        folder: the task's folder, or one that has it.
        split: fairseq's name of the split.

    Returns:
        The file, plain or .xz; None if there is none.
    """
    for place in (folder / task.name, folder):
        for name in task.files.get(split, ()):
            for ending in (task.ending, f"{task.ending}.xz"):
                path = place / f"{name}.{ending}"
                if path.is_file():
                    return path
    return None


def find_files(
    task: GlueTask, folder: Path, splits: Sequence[str] = (), named: Mapping[str, Path] | None = None
) -> dict[str, Path]:
    """Find the files of a task.

    Args:
        task: the task.
        folder: the task's folder, or one that has it.
        splits: which are wanted; default all, of which a test set with answers may be absent.
        named: files that take the place of those in the folder, by split.

    Returns:
        Files by split.

    Raises:
        ValueError: if one is missing; says which files there are, and how to name another.
    """
    unknown = [split for split in (*splits, *(named or ())) if split not in task.files]
    if unknown:
        raise ValueError(f"{task.name} has the splits {', '.join(task.files)}, got {unknown[0]!r}")
    named, files = named or {}, {}
    for split in dict.fromkeys((*(splits or task.files), *named)):
        path = named.get(split) or find_file(task, folder, split)
        if path is not None:
            files[split] = path
        elif splits or split in REQUIRED:
            raise ValueError(_missing(task, folder, split))
    return files


def _missing(task: GlueTask, folder: Path, split: str) -> str:
    names = " or ".join(f"{name}.{task.ending}" for name in task.files[split])
    place = folder / task.name if (folder / task.name).is_dir() else folder
    there = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    content = f"it has {', '.join(there)}" if there else "it is empty or no folder"
    others = " ".join(name for name in task.files if name != split and find_file(task, folder, name))
    leave_out = f", or leave it out with --splits {others}" if others else ""
    return (
        f"{task.name}: {place} has no {names} (plain or .xz) and no folder {task.name} with it; {content}. "
        f"Name a file with --{split} FILE{leave_out}"
    )


class Contents(NamedTuple):
    """What a file has.

    Attributes:
        instances: in their order.
        num_broken: rows that were left out.
    """

    instances: list[Instance]
    num_broken: int = 0


def read_file(task: GlueTask, path: Path, split: str) -> Contents:
    """Read an official file.

    Args:
        task: the task.
        path: the file, plain or .xz.
        split: fairseq's name of the split.

    Raises:
        ValueError: names the file and the line that is not as it should be.
    """
    instances, num_broken = [], 0
    records = _json_records(path) if task.ending == "jsonl" else _table_records(task, path, split)
    for number, record in records:
        if record is None:
            num_broken += 1
            continue
        try:
            instances.append(task.instance(record))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not instances:
        raise ValueError(f"{path} has no instances")
    return Contents(instances, num_broken)


def _lines(path: Path) -> list[str]:
    """Lines that end with a line feed: other separators that Python knows are characters of a text."""
    content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    lines = [line.rstrip("\r") for line in content.decode("utf-8-sig").split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _json_records(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error


def _table_records(task: GlueTask, path: Path, split: str) -> Iterator[tuple[int, Record | None]]:
    """Rows by column; quotes are characters like others. None for a row that is broken and may be."""
    lines, columns = _lines(path), task.columns.get(split)
    head = list(columns) if columns else (lines[0].split("\t") if lines else [])
    missing = [name for name in (*task.texts, task.answer) if name not in head]
    if missing:
        raise ValueError(
            f"{path}, line 1: {task.name} has a header with {', '.join((*task.texts, task.answer))}, "
            f"but {missing[0]!r} is not among {head}"
        )
    for number, line in enumerate(lines, start=1):
        if number == 1 and not columns:
            continue
        cells = line.split("\t")
        if len(cells) == len(head) or (columns and len(cells) > len(head)):
            yield number, dict(zip(head, cells, strict=False))
        elif task.skips_broken_rows:
            yield number, None
        else:
            raise ValueError(f"{path}, line {number}: expected {len(head)} columns, got {len(cells)}: {line[:80]!r}")


# -- folders for fairseq -----------------------------------------------------------------------------------------------


def sampled(task: GlueTask, found: list[Instance], rate: float | None, most: int | None, seed: int) -> list[Instance]:
    """Choose instances: a share of them, or at most a number; all, if neither is given.

    Raises:
        ValueError: if both are given.
    """
    if rate is not None and most is not None:
        raise ValueError("--rate and --max-train both choose the size of the training split; give one of them")
    answers = [instance.answer for instance in found]
    if rate is not None:
        size = sample_size(len(found), rate, 0 if task.is_regression else len(set(answers)))
    elif most is not None:
        size = min(most, len(found))
    else:
        return found
    return [found[place] for place in sample(answers, size, seed, has_classes=not task.is_regression)]


class Prepared(NamedTuple):
    """What was written of a split.

    Attributes:
        num_instances: instances.
        counts: of each label; of a regression, nothing.
        num_tokens: tokens, ends of sentences not counted.
        num_unknown: those that the dictionary does not have.
        num_broken: rows that were left out.
    """

    num_instances: int
    counts: dict[str, int]
    num_tokens: int
    num_unknown: int
    num_broken: int


def prepare(
    task: GlueTask,
    files: Mapping[str, Path],
    out: Path,
    dictionary: Path,
    tokenize: Tokenize,
    *,
    rate: float | None = None,
    max_train: int | None = None,
    seed: int = 1,
) -> dict[str, Prepared]:
    """Write a task's folder for fairseq.

    Args:
        task: the task.
        files: official files by split.
        out: folder to write: ``input0``, ``input1``, … and ``label`` as fairseq's tasks want them, ``span0`` and
            ``span1`` for span_prediction, ``glue.json`` with what it is.
        dictionary: fairseq's ``dict.txt`` of the model; copied.
        tokenize: from lines, the tokens of each, as they are in the dictionary. Tasks with spans need its method
            ``offsets`` (see ``TokenizerFile`` and ``Gpt2``).
        rate: share of the training split that is kept, in (0, 1]; at least one instance of each class.
        max_train: number of training instances that are kept; not with `rate`.
        seed: seed of the sample.

    Returns:
        What was written, by split.

    Raises:
        ValueError: if a file or an argument is wrong, or the folder already holds a prepared task.
    """
    if task.trainer == "span_prediction" and not hasattr(tokenize, "offsets"):
        raise ValueError(f"{task.name} asks about spans, so its tokenizer needs a method offsets (see Tokenize)")
    if (out / DESCRIPTION).exists():
        raise ValueError(f"--out {out} already holds a prepared task; remove it or name another folder")
    contents = {split: read_file(task, path, split) for split, path in files.items()}
    if "train" in contents:
        kept = sampled(task, contents["train"].instances, rate, max_train, seed)
        contents["train"] = contents["train"]._replace(instances=kept)
    writer = _Writer(task, out, dictionary, tokenize)
    written = {split: writer.write(split, found) for split, found in contents.items()}
    for split, part in written.items():
        if part.num_unknown > part.num_tokens / 2:
            raise ValueError(
                f"--dictionary {dictionary} does not have {part.num_unknown} of the {part.num_tokens} tokens of "
                f"{split}; it must be that of the model whose tokenizer is given"
            )
    description = {
        "task": task.name, "labels": task.labels, "scale": task.scale, "trainer": task.trainer, "metrics": task.metrics,
        "positive": task.positive,
        "splits": {split: part.num_instances for split, part in written.items()},
        "sample": {"rate": rate, "max_train": max_train, "seed": seed},
    }  # fmt: skip
    (out / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return written


class _Writer:
    """Writes splits of a task."""

    def __init__(self, task: GlueTask, out: Path, dictionary: Path, tokenize: Any) -> None:
        from fairseq.data import Dictionary

        if not dictionary.is_file():
            raise ValueError(f"--dictionary {dictionary} is no file; it is the dict.txt of the model")
        self._task, self._out, self._tokenize = task, out, tokenize
        self._dictionary = Dictionary.load(str(dictionary))
        for number in range(task.num_sentences):
            folder = self._folder(f"input{number}")
            shutil.copyfile(dictionary, folder / "dict.txt")
        self._folder("label")
        if task.labels:
            lines = "".join(f"{label} 1\n" for label in task.labels)
            (out / "label" / "dict.txt").write_text(lines, encoding="utf-8")
            self._labels = Dictionary.load(str(out / "label" / "dict.txt"))

    def write(self, split: str, found: Contents) -> Prepared:
        """Write a split."""
        instances = found.instances
        num_tokens = num_unknown = 0
        for number in range(self._task.num_sentences):
            lines = self._tokenize([instance.texts[number] for instance in instances])
            rows = [self._numbers(tokens) for tokens in lines]
            num_tokens += sum(len(row) - 1 for row in rows)
            num_unknown += sum(int(row.eq(self._dictionary.unk()).sum()) for row in rows)
            write_indexed(self._out / f"input{number}" / split, rows, len(self._dictionary))
        for number in range(len(instances[0].spans)):
            self._write_spans(number, split, instances)
        self._write_answers(split, [instance.answer for instance in instances])
        counts = Counter(instance.answer for instance in instances) if self._task.labels else {}
        ordered = {label: counts[label] for label in self._task.labels}
        return Prepared(len(instances), ordered, num_tokens, num_unknown, found.num_broken)

    def _folder(self, name: str) -> Path:
        folder = self._out / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _numbers(self, tokens: list[str]) -> Any:
        return self._dictionary.encode_line(tokens, line_tokenizer=list, add_if_not_exist=False)

    def _write_spans(self, number: int, split: str, instances: Sequence[Instance]) -> None:
        spans = [instance.spans[number] for instance in instances]
        texts = [instance.texts[span.text] for instance, span in zip(instances, spans, strict=True)]
        offsets = self._tokenize.offsets(texts)
        places = (
            tokens_of_span(found, text, span.start, span.end)
            for found, text, span in zip(offsets, texts, spans, strict=True)
        )
        lines = "".join(f"{first} {last}\n" for first, last in places)
        (self._folder(f"span{number}") / f"{split}.span").write_text(lines, encoding="utf-8")

    def _write_answers(self, split: str, answers: Sequence[str]) -> None:
        """Classes in a dictionary; plain text for a regression, and for a ranking the number of the choice."""
        prefix, task = self._out / "label" / split, self._task
        if task.is_regression or task.trainer == "sentence_ranking":
            lines = (f"{float(a) / task.scale!r}" if task.is_regression else f"{task.labels.index(a)}" for a in answers)
            prefix.with_name(f"{split}.label").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        else:
            rows = (self._labels.encode_line([a], line_tokenizer=list, add_if_not_exist=False) for a in answers)
            write_indexed(prefix, rows, len(self._labels))


def read_description(folder: Path) -> dict[str, Any]:
    """Read what a prepared folder holds.

    Raises:
        ValueError: if it was not prepared here.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder} has no {DESCRIPTION}; prepare it with scripts/prepare_glue.py")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def training_flags(task: GlueTask, separator: int | None = None) -> list[str]:
    """Return the flags of fairseq-train that the task needs.

    Args:
        task: the task.
        separator: number of the token between two inputs, beside the end that each of them has. RoBERTa has one
            (``</s>``, 2), BERT none.
    """
    flags = ["--task", task.trainer, "--criterion", task.trainer, "--num-classes", str(max(len(task.labels), 1))]
    # fairseq validates without a last batch whose size is no multiple of this, which is 8 by default.
    flags += ["--init-token", "0", "--required-batch-size-multiple", "1"]
    if separator is not None and task.num_sentences > 1:
        flags += ["--separator-token", str(separator)]
    if task.is_regression:
        flags += ["--regression-target"]
    if "valid1" in task.files:
        flags += ["--valid-subset", "valid,valid1"]
    return [*flags, *task.report]
