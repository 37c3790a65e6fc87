#!/usr/bin/env python3
"""Prepare a corpus of summaries for fairseq, with the subwords of a pretrained model.

Reads below ``--data`` one of (plain or .xz)

- ``cnn_dm`` and ``xsum``: ``train``, ``val`` and ``test`` with ``.source`` and ``.target``, a text and its summary on a
  line each, not tokenised, as fairseq's own preparation for BART has them;
- ``aeslc``: ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``: e-mails (``body``) and their subjects (``subject``).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes.samples import sample
from scripts.recipes.sequences import Pairs, link_model, prepare_pairs, read_sides
from scripts.recipes.text import read_objects

FILES = {"train": "train", "valid": "val", "test": "test"}
EMAILS = {"train": "train.jsonl", "valid": "dev.jsonl", "test": "test.jsonl"}


def read_emails(folder: Path, name: str) -> list[tuple[str, str]]:
    """Bodies and subject lines; e-mails that lack one of them are left out."""
    pairs = ((each["body"], each["subject"]) for each in read_objects(folder, name, ("body", "subject")))
    return [pair for pair in pairs if all(side.strip() for side in pair)]


def sampled(pairs: Pairs, number: int | None) -> Pairs:
    """A sample that is the same on every machine."""
    places = range(len(pairs)) if number is None else sample([""] * len(pairs), number, has_classes=False)
    return [pairs[place] for place in places]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder to write data-bin into")
    parser.add_argument("--corpus", required=True, choices=("cnn_dm", "xsum", "aeslc"), help="name of the folder")
    parser.add_argument("--model", help="folder of the pretrained model")
    parser.add_argument("--variant", default="", help="name of the model's folder in it, where there are several")
    parser.add_argument("--num-train", type=int, help="training pairs; default all")
    parser.add_argument("--num-valid", type=int, help="validation pairs; default all")
    parser.add_argument("--num-test", type=int, help="test pairs; default all")
    parser.add_argument("--max-source", type=int, default=1024, help="subwords of a text; the rest is cut off")
    parser.add_argument("--max-target", type=int, default=1024, help="subwords of a summary in the training part")
    args = parser.parse_args()
    folder = args.data / args.corpus
    numbers = {"train": args.num_train, "valid": args.num_valid, "test": args.num_test}
    try:
        model = link_model(args.model, args.out, args.variant)
        if args.corpus == "aeslc":
            splits = {split: read_emails(folder, name) for split, name in EMAILS.items()}
        else:
            splits = {split: read_sides(folder, name) for split, name in FILES.items()}
        chosen = {split: sampled(pairs, numbers[split]) for split, pairs in splits.items()}
        prepare_pairs(chosen, model, args.out, args.max_source, args.max_target)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(", ".join(f"{split}: {len(pairs)} pairs" for split, pairs in chosen.items()))


if __name__ == "__main__":
    main()
