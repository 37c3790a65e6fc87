#!/usr/bin/env python3
"""Predict with a checkpoint that was fine-tuned on a task of GLUE or SuperGLUE, and score.

The folder may be that of another task with the same dictionary. --labels then says which of the folder's labels each
class of the model stands for, in the order of the classes. Prints the scores (times 100) as JSON.

Examples:
    predict.py run/checkpoint_best.pt mrpc
    predict.py mnli/checkpoint_best.pt rte --labels not_entailment,not_entailment,entailment
    predict.py qnli/checkpoint_best.pt mrpc --labels 0,1   # entailment: a paraphrase
    predict.py qnli/checkpoint_best.pt stsb --labels 0,5   # the score is 5 times the probability of entailment
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="fine-tuned checkpoint")
    parser.add_argument("folder", type=Path, help="folder that prepare_glue.py wrote")
    parser.add_argument("--split", default="valid", help="train, valid, valid1 or test (default valid)")
    parser.add_argument("--out", type=Path, default=Path("predictions.tsv"), help="default predictions.tsv, here")
    parser.add_argument("--labels", metavar="A,B,…", help="label, or score, that each class of the model stands for")
    parser.add_argument("--task", help="name of the task, for a folder without glue.json")
    parser.add_argument("--batch-size", type=int, default=32, help="instances that run together (default 32)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    return parser


def main() -> None:
    """Command line."""
    args = parser().parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from fairseq_sam.adapter.errors import UserError
    from scripts.recipes import predictions

    try:
        folder = predictions.Folder(args.folder, args.task)
        labels = [name.strip() for name in args.labels.split(",")] if args.labels else None
        found = predictions.predict(
            args.checkpoint, folder, args.split, labels, batch_size=args.batch_size, cpu=args.cpu
        )
        predictions.write(args.out, found)
    except (ValueError, OSError, UserError) as error:
        raise SystemExit(f"error: {error}") from None
    scores = predictions.score(folder.task, found)
    print(json.dumps({"task": folder.task.name, "split": args.split, "instances": len(found), **scores}))


if __name__ == "__main__":
    main()
