#!/usr/bin/env python3
"""Prepare a task of GLUE or SuperGLUE for fine-tuning with fairseq.

The official files are read from the folder (or its subfolder of the task's name), plain or .xz. Prints the number of
instances of each class, the share of unknown tokens, and the flags that fairseq-train needs.

Examples:
    prepare_glue.py --task MRPC --data glue --out mrpc --dictionary dict.txt \
        --bpe gpt2 --gpt2-encoder-json encoder.json --gpt2-vocab-bpe vocab.bpe
    prepare_glue.py --task WiC --data superglue --out wic --dictionary dict.txt --tokenizer-file tokenizer.json
    prepare_glue.py --task RTE … --rate 0.05 --seed 1      # 5 % of the training split
    prepare_glue.py --task QNLI … --train qnli-train.tsv   # a file from elsewhere
    prepare_glue.py --task QNLI … --splits valid           # only to predict
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.recipes import glue  # noqa: E402
from scripts.recipes.subwords import Gpt2, TokenizerFile  # noqa: E402

SPLITS = ("train", "valid", "valid1", "test")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=glue.TASKS, help="name of the task")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with the official files (default: here)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dictionary", type=Path, required=True, help="dict.txt of the model")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--bpe", choices=("gpt2",), help="RoBERTa's byte-level BPE; needs the two files below")
    how.add_argument("--tokenizer-file", type=Path, help="tokenizer.json of the package tokenizers, e.g. BERT's")
    parser.add_argument("--gpt2-encoder-json", type=Path, help="encoder.json for --bpe gpt2")
    parser.add_argument("--gpt2-vocab-bpe", type=Path, help="vocab.bpe for --bpe gpt2")
    parser.add_argument("--rate", type=float, help="share of the training split to keep, in (0, 1]")
    parser.add_argument("--max-train", type=int, help="number of training instances to keep")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample (default 1)")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=(), help="prepare these only")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=Path, metavar="FILE", help=f"file of the split {split}")
    return parser


def tokenizer(args: argparse.Namespace) -> Gpt2 | TokenizerFile:
    """Return the tokenizer that the arguments name."""
    if args.tokenizer_file is not None:
        return TokenizerFile(args.tokenizer_file)
    for name in ("gpt2_encoder_json", "gpt2_vocab_bpe"):
        if getattr(args, name) is None:
            raise ValueError(f"--bpe gpt2 needs --{name.replace('_', '-')} FILE")
    return Gpt2(args.gpt2_encoder_json, args.gpt2_vocab_bpe)


def show(split: str, part: glue.Prepared) -> None:
    """Print what was written of a split."""
    counts = ", ".join(f"{label}: {count}" for label, count in part.counts.items())
    unknown = 100.0 * part.num_unknown / max(part.num_tokens, 1)
    broken = f"; {part.num_broken} broken rows left out" if part.num_broken else ""
    print(
        f"{split}: {part.num_instances} instances{f' ({counts})' if counts else ''}, {part.num_tokens} tokens, "
        f"{unknown:.2f} % unknown{broken}"
    )


def main() -> None:
    """Command line."""
    args = parser().parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    task = glue.TASKS[args.task]
    named = {split: path for split in SPLITS if (path := getattr(args, split)) is not None}
    try:
        files = glue.find_files(task, args.data, args.splits, named)
        written = glue.prepare(
            task, files, args.out, args.dictionary, tokenizer(args),
            rate=args.rate, max_train=args.max_train, seed=args.seed,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    for split, part in written.items():
        show(split, part)
    flags = glue.training_flags(task, separator=2 if args.bpe or _is_roberta(args.tokenizer_file) else None)
    print(f"ready: fairseq-train {args.out} --user-dir {ROOT / 'fairseq_sam'} {' '.join(flags)}")


def _is_roberta(tokenizer_file: str | None) -> bool:
    """Whether a tokenizer has RoBERTa's special tokens, of which it puts two between texts."""
    if tokenizer_file is None:
        return False
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_file)).token_to_id("</s>") is not None


if __name__ == "__main__":
    main()
