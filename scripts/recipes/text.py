"""Reading corpora, counting words, binarising for fairseq."""

import json
import lzma
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.recipes.recipe import ROOT

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # what every dictionary of fairseq begins with


class CorpusError(ValueError):
    """A corpus is not where it should be, or not what it should be."""


def find_file(folder: Path, name: str) -> Path:
    """Find a file of a corpus, plain or ``.xz``.

    Raises:
        CorpusError: names the folder and the file, if there is none.
    """
    for path in (folder / name, folder / f"{name}.xz"):
        if path.exists():
            return path
    raise CorpusError(f"{folder} has neither {name} nor {name}.xz; --data must name the folder of the corpora")


def read_lines(folder: Path, name: str) -> list[str]:
    """Lines of a file, plain or ``.xz``, in UTF-8; only line feeds end a line.

    Raises:
        CorpusError: if there is none.
    """
    path = find_file(folder, name)
    opened = lzma.open(path, "rt", encoding="utf-8", newline="\n") if path.suffix == ".xz" else None
    with opened or path.open(encoding="utf-8", newline="\n") as file:
        return file.read().removesuffix("\n").split("\n")


def read_objects(folder: Path, name: str, keys: Sequence[str]) -> list[dict[str, str]]:
    """Objects of a file with a JSON object on each line, plain or ``.xz``.

    Args:
        folder: of the corpus.
        name: the file.
        keys: what each object must have, as text.

    Raises:
        CorpusError: if there is no such file, or a line is not such an object.
    """
    found = []
    for number, line in enumerate(read_lines(folder, name), 1):
        try:
            record = json.loads(line)
            fits = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys)
        except json.JSONDecodeError:
            fits = False
        if not fits:
            raise CorpusError(
                f"{find_file(folder, name)}, line {number}: expected an object with texts named {' and '.join(keys)}, "
                f"got {line[:60]!r}"
            )
        found.append(record)
    return found


def write_dictionary(path: Path, sentences: Iterable[Sequence[str]], num_words: int) -> None:
    """Write fairseq's dictionary of the most frequent words.

    Args:
        path: ``dict.txt``.
        sentences: words of the training part.
        num_words: size of the vocabulary, fairseq's four special symbols included.
    """
    counts = Counter(word for sentence in sentences for word in sentence if word not in SPECIAL)
    kept = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[: num_words - len(SPECIAL)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{word} {count}\n" for word, count in kept), encoding="utf-8")


def binarise(texts: dict[str, Path], out: Path, dictionary: Path | None = None) -> None:
    """Run fairseq-preprocess on one side: ``out/train.bin`` and so on.

    Args:
        texts: file of words by split (``train``, ``valid``, ``test``).
        out: folder for the binarised splits and ``dict.txt``.
        dictionary: the dictionary; default one of all words of ``train``.
    """
    words = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--destdir", str(out)]
    for split, path in texts.items():
        words += [f"--{split}pref", str(path)]
    words += ["--srcdict", str(dictionary)] if dictionary else []
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise CorpusError("fairseq-preprocess failed:\n" + "\n".join(done.stderr.strip().splitlines()[-10:]))


def write_indexed(prefix: Path, rows: Iterable[Any], num_symbols: int) -> None:
    """Write sentences of numbers as fairseq reads them.

    Args:
        prefix: the files' path without ``.bin`` and ``.idx``.
        rows: integer tensors, each with the end symbol at its end.
        num_symbols: size of the dictionary.
    """
    from fairseq.data import indexed_dataset

    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=num_symbols)
    for row in rows:
        builder.add_item(row)
    builder.finalize(f"{prefix}.idx")
