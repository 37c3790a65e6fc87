#!/usr/bin/env python3
"""Binarise sentences without labels for --task sentence_embedding, as subwords of a converted encoder.

Example:
    prepare_sentences.py --input sentences.txt --encoder bert --out sentences-bin
The encoder's folder is one that convert_encoder.py has written.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="text in UTF-8, one sentence a line")
    parser.add_argument("--encoder", required=True, type=Path, help="folder with dict.txt and tokenizer.json")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    args = parser.parse_args()

    warnings.simplefilter("ignore")  # fairseq's and hydra's are about themselves
    logging.disable(logging.INFO)
    from scripts.recipes.sts import binarise_sentences

    try:
        lines = args.input.read_text(encoding="utf-8").split("\n")
        sentences = [line.strip() for line in lines if line.strip()]
        binarise_sentences(sentences, args.encoder, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(sentences)} sentences")


if __name__ == "__main__":
    main()
