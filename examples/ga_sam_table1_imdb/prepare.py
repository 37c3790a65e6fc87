#!/usr/bin/env python3
"""Prepare the IMDB reviews: words, the most frequent of them, cut to a length, binarised for sentence prediction.

Reads ``imdb/train.tsv`` and ``imdb/test.tsv`` (plain or .xz) in ``--data``: label (1 positive, 0 negative), rating,
number and text, with tabs between. The public corpus has 25,000 + 25,000 labelled reviews and no validation part:
that is taken from the training part, half of it positive.
"""

import argparse
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes.text import CorpusError, binarise, read_lines, write_dictionary

Review = tuple[str, list[str]]  # label and words
WORD = re.compile(r"[a-z0-9']+|[^\sa-z0-9']")
SPLIT_SEED = 1


def read_reviews(folder: Path, name: str, length: int) -> list[Review]:
    """Labels and words in lower case, without line breaks of HTML; at most `length` words of each review."""
    rows = [line.split("\t", 3) for line in read_lines(folder, name)]
    if any(len(row) != 4 or row[0] not in ("0", "1") for row in rows):
        raise CorpusError(f"{folder}/{name} must have label (0 or 1), rating, number and text, with tabs between")
    return [(row[0], WORD.findall(row[3].replace("<br />", " ").lower())[:length]) for row in rows]


def balanced(reviews: Sequence[Review], number: int | None, skip: int = 0) -> list[Review]:
    """A sample with as many positive as negative reviews, in random order; those before `skip` are left out."""
    rng, chosen = random.Random(SPLIT_SEED), []
    for label in ("0", "1"):
        own = [review for review in reviews if review[0] == label]
        rng.shuffle(own)
        end = len(own) if number is None else (skip + number) // 2
        if end > len(own):
            raise CorpusError(f"expected at least {end} reviews with label {label}, got {len(own)}; ask for fewer")
        chosen += own[skip // 2 : end]
    rng.shuffle(chosen)
    return chosen


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora, with imdb in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write data-bin into")
    parser.add_argument("--num-words", type=int, default=30000, help="size of the vocabulary")
    parser.add_argument("--length", type=int, default=200, help="words of a review")
    parser.add_argument("--num-train", type=int, help="training reviews; default all that are not for validation")
    parser.add_argument("--num-valid", type=int, default=2500, help="validation reviews")
    parser.add_argument("--num-test", type=int, help="test reviews; default all")
    args = parser.parse_args()
    try:
        labelled = read_reviews(args.data / "imdb", "train.tsv", args.length)
        splits = {
            "train": balanced(labelled, args.num_train, skip=args.num_valid),
            "valid": balanced(labelled, args.num_valid),
            "test": balanced(read_reviews(args.data / "imdb", "test.tsv", args.length), args.num_test),
        }
        for kind in ("text", "label"):
            (args.out / kind).mkdir(parents=True, exist_ok=True)
        for split, reviews in splits.items():
            (args.out / "text" / split).write_text("".join(" ".join(words) + "\n" for _, words in reviews), "utf-8")
            (args.out / "label" / split).write_text("".join(f"{label}\n" for label, _ in reviews), "utf-8")
        write_dictionary(args.out / "dict.txt", (words for _, words in splits["train"]), args.num_words)
        for kind, name in (("text", "input0"), ("label", "label")):
            files = {split: args.out / kind / split for split in splits}
            binarise(files, args.out / "data-bin" / name, args.out / "dict.txt" if kind == "text" else None)
    except CorpusError as error:
        raise SystemExit(f"error: {error}") from None
    print(", ".join(f"{split}: {len(reviews)} reviews" for split, reviews in splits.items()))


if __name__ == "__main__":
    main()
