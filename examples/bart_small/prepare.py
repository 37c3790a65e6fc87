#!/usr/bin/env python3
"""Prepare public English text for pretraining: subwords of a SentencePiece model that is trained here, binarised.

Reads below ``--data``, where they are: ``aeslc/train.jsonl`` (bodies of e-mails, without their subjects),
``imdb/train.tsv`` (reviews, without their labels) and ``wikitext2_partial/valid.txt`` and ``test.txt`` (sentences
without unknown words), plain or .xz. Documents are cut into pieces of at most ``--length`` subwords.
"""

import argparse
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes.sequences import MODEL, subwords_of, train_sentencepiece
from scripts.recipes.text import CorpusError, binarise, read_lines, read_objects

SPLIT_SEED = 1
JOINED = re.compile(r" @([-.,])@ ")  # how WikiText writes what stands inside of a word or number


def emails(folder: Path) -> list[str]:
    """Bodies of the training part."""
    return [each["body"] for each in read_objects(folder, "train.jsonl", ("body",))]


def reviews(folder: Path) -> list[str]:
    """Texts of the training part."""
    return [line.split("\t", 3)[3].replace("<br />", " ") for line in read_lines(folder, "train.tsv")]


def articles(folder: Path) -> list[str]:
    """Paragraphs, without headings and without sentences that have unknown words."""
    lines = [line for name in ("valid.txt", "test.txt") for line in read_lines(folder, name)]
    paragraphs = (re.split(r"(?<= \.) ", line) for line in lines if line.strip() and not line.startswith(" ="))
    kept = (" ".join(part for part in parts if "<unk>" not in part) for parts in paragraphs)
    return [JOINED.sub(r"\1", text) for text in kept]


CORPORA: dict[str, Callable[[Path], list[str]]] = {
    "aeslc": emails, "imdb": reviews, "wikitext2_partial": articles,
}  # fmt: skip


def read_documents(data: Path) -> list[str]:
    """Documents of all corpora that are there, in random order, each on one line."""
    found = [name for name in CORPORA if (data / name).is_dir()]
    if not found:
        raise CorpusError(f"--data {data} has none of the folders {', '.join(CORPORA)}")
    texts = [" ".join(text.split()) for name in found for text in CORPORA[name](data / name)]
    documents = [text for text in texts if text]
    random.Random(SPLIT_SEED).shuffle(documents)
    return documents


def cut(documents: Iterable[list[str]], length: int) -> Iterator[list[str]]:
    """Pieces of at most `length` subwords."""
    for words in documents:
        yield from (words[start : start + length] for start in range(0, len(words), length))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder to write model and data-bin into")
    parser.add_argument("--num-subwords", type=int, default=8000, help="size of the vocabulary")
    parser.add_argument("--num-train", type=int, help="training documents; default all")
    parser.add_argument(
        "--num-held-out", type=int, default=300, help="documents for validation, and as many for a test"
    )
    parser.add_argument("--length", type=int, default=189, help="subwords of a piece of a document")
    args = parser.parse_args()
    try:
        documents, number = read_documents(args.data), args.num_held_out
        if len(documents) <= 2 * number:
            raise CorpusError(f"{2 * number} documents are held out (--num-held-out), and there are {len(documents)}")
        splits = {"valid": documents[:number], "test": documents[number : 2 * number]}
        splits["train"] = documents[2 * number :][: args.num_train]
        if len(splits["train"]) < (args.num_train or 0):
            there = ", ".join(name for name in CORPORA if (args.data / name).is_dir())
            raise CorpusError(
                f"--num-train wants {args.num_train} documents, but {there} in --data {args.data} have only "
                f"{len(splits['train'])}; add {' and '.join(name for name in CORPORA if name not in there)}, or "
                f"train on those with run_table.py … --set num_train={len(splits['train'])}"
            )
        train_sentencepiece(splits["train"], args.out / MODEL, args.num_subwords)
        split_words = subwords_of(args.out / MODEL)
        files = {}
        for split, texts in splits.items():
            files[split] = args.out / "subwords" / split
            files[split].parent.mkdir(parents=True, exist_ok=True)
            pieces = list(cut(split_words(texts), args.length))
            files[split].write_text("".join(f"{' '.join(words)}\n" for words in pieces), encoding="utf-8")
            print(f"{split}: {len(texts)} documents, {sum(map(len, pieces))} subwords", flush=True)
        binarise(files, args.out / "data-bin", args.out / MODEL / "dict.txt")
    except CorpusError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
