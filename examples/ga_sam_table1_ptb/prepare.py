#!/usr/bin/env python3
"""Prepare the Penn TreeBank (Mikolov's 10,000 words) for language models.

Reads ``ptb/ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt`` (plain or .xz) in ``--data``.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes.text import CorpusError, binarise, read_lines, write_dictionary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora, with ptb in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write data-bin into")
    parser.add_argument("--num-lines", type=int, help="first lines of the training part; default all")
    args = parser.parse_args()
    files = {}
    try:
        for split in ("train", "valid", "test"):
            lines = read_lines(args.data / "ptb", f"ptb.{split}.txt")
            if split == "train":  # the dictionary is that of all lines, also where fewer are trained on
                write_dictionary(args.out / "dict.txt", map(str.split, lines), sys.maxsize)
            if split == "train" and args.num_lines is not None:
                if not 1 <= args.num_lines <= len(lines):
                    raise CorpusError(f"--num-lines must be from 1 to {len(lines)}, got {args.num_lines}")
                lines = lines[: args.num_lines]
            files[split] = args.out / "text" / split
            files[split].parent.mkdir(parents=True, exist_ok=True)
            files[split].write_text("".join(f"{line.strip()}\n" for line in lines), encoding="utf-8")
            print(f"{split}: {len(lines)} lines, {sum(len(line.split()) for line in lines)} words")
        binarise(files, args.out / "data-bin", args.out / "dict.txt")
    except CorpusError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
