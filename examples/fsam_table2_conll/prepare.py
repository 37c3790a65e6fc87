#!/usr/bin/env python3
"""Prepare sentences and their corrections for fairseq, with the subwords of a pretrained model.

Reads below ``--data`` one of (plain or .xz)

- ``conll2014``: ``train`` and ``valid`` with ``.source`` and ``.target``, a sentence and its correction on a line each,
  tokenised as the test set is, and ``test.m2``: the test set with its annotators' edits;
- ``jfleg``: ``dev.src`` and ``test.src`` with ``.ref0`` to ``.ref3``: 754 and 747 sentences with four corrections
  each. Those of dev are the training data, each with its four corrections; ``--num-valid`` of them are held out.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes.corrections import ANNOTATORS, M2, read_m2
from scripts.recipes.samples import sample
from scripts.recipes.sequences import Pairs, link_model, prepare_pairs, read_sides
from scripts.recipes.text import CorpusError, read_lines

ANNOTATED_BY = range(4)


def read_conll(folder: Path, out: Path) -> dict[str, Pairs]:
    """All splits; the file with the edits is copied for the evaluation."""
    splits: dict[str, Pairs] = {split: read_sides(folder, split) for split in ("train", "valid")}
    if not (folder / M2).is_file():
        raise CorpusError(f"{folder} has no {M2}; it is the test set of CoNLL-2014 with its annotators' edits")
    shutil.copyfile(folder / M2, out / M2)
    sources = [sentence.source for sentence in read_m2(folder / M2)]
    return {**splits, "test": [(source, source) for source in sources]}


def read_jfleg(folder: Path, out: Path, num_valid: int) -> dict[str, Pairs]:
    """All splits; the references of the test set are written for the evaluation."""
    parts = {}
    for name in ("dev", "test"):
        sides = [read_lines(folder, f"{name}.{side}") for side in ("src", *(f"ref{number}" for number in ANNOTATED_BY))]
        if len({len(lines) for lines in sides}) > 1:
            raise CorpusError(f"{folder}: {name} has files of {', '.join(str(len(lines)) for lines in sides)} lines")
        parts[name] = [[line.strip() for line in row] for row in zip(*sides, strict=True)]
    if not 0 < num_valid < len(parts["dev"]):
        raise CorpusError(f"--num-valid must be in 1..{len(parts['dev']) - 1}, got {num_valid}")
    held_out = set(sample([""] * len(parts["dev"]), num_valid, has_classes=False))
    rows = {
        "train": [row for place, row in enumerate(parts["dev"]) if place not in held_out],
        "valid": [row for place, row in enumerate(parts["dev"]) if place in held_out],
    }
    splits: dict[str, Pairs] = {
        split: [(row[0], target) for row in part for target in row[1:] if row[0] and target]
        for split, part in rows.items()
    }
    (out / ANNOTATORS).mkdir(parents=True, exist_ok=True)
    for number in ANNOTATED_BY:
        lines = "".join(f"{row[1 + number]}\n" for row in parts["test"])
        (out / ANNOTATORS / f"{number}").write_text(lines, encoding="utf-8")
    return {**splits, "test": [(row[0], row[1]) for row in parts["test"]]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder to write data-bin into")
    parser.add_argument("--corpus", required=True, choices=("conll2014", "jfleg"), help="name of the folder")
    parser.add_argument("--model", help="folder of the pretrained model")
    parser.add_argument("--variant", default="", help="name of the model's folder in it, where there are several")
    parser.add_argument("--num-valid", type=int, default=100, help="sentences of JFLEG's dev that are held out")
    parser.add_argument("--max-length", type=int, default=1024, help="subwords of a sentence; the rest is cut off")
    args = parser.parse_args()
    folder = args.data / args.corpus
    try:
        model = link_model(args.model, args.out, args.variant)
        splits = (
            read_jfleg(folder, args.out, args.num_valid) if args.corpus == "jfleg" else read_conll(folder, args.out)
        )
        prepare_pairs(splits, model, args.out, args.max_length, args.max_length)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(", ".join(f"{split}: {len(pairs)} pairs" for split, pairs in splits.items()))


if __name__ == "__main__":
    main()
