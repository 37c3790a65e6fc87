#!/usr/bin/env python3
"""Prepare a task of GLUE or SuperGLUE for a pretrained encoder.

Reads the task's official files in ``glue`` or ``superglue`` below ``--data``, puts the encoder into ``encoder``
(``model.pt``, ``dict.txt`` and the files of its subwords; one of Hugging Face is converted) and writes ``data-bin``,
and ``transfer/TASK`` for each other task that the fine-tuned model is probed with.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes import glue
from scripts.recipes.encoders import DICTIONARY, prepare_encoder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora, with glue or superglue in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write encoder and data-bin into")
    parser.add_argument("--task", required=True, choices=glue.TASKS, help="name of the task")
    parser.add_argument(
        "--encoder", help="full path of a folder of Hugging Face or of fairseq's RoBERTa, or package:NAME"
    )
    parser.add_argument("--rate", type=float, help="share of the training split to keep, in (0, 1]")
    parser.add_argument("--max-train", type=int, help="number of training instances to keep")
    parser.add_argument("--sample-seed", type=int, default=1, help="seed of the sample")
    parser.add_argument("--transfer", nargs="+", default=[], choices=glue.TASKS, help="other tasks to prepare")
    args = parser.parse_args()
    if not args.encoder:
        raise SystemExit("error: this recipe needs an encoder: run_table.py … --set encoder=FOLDER")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from fairseq_sam.adapter.errors import UserError

    encoder = args.out / "encoder"
    try:
        tokenize = prepare_encoder(args.encoder, encoder)
        sample = {"rate": args.rate, "max_train": args.max_train, "seed": args.sample_seed}
        for name, out in ((args.task, "data-bin"), *((name, f"transfer/{name}") for name in args.transfer)):
            task = glue.TASKS[name]
            files = glue.find_files(task, folder_of(args.data, name))
            own = sample if name == args.task else {}
            written = glue.prepare(task, files, args.out / out, encoder / DICTIONARY, tokenize, **own)
            print(f"{name}:", ", ".join(f"{split}: {part.num_instances} instances" for split, part in written.items()))
    except (ValueError, OSError, UserError) as error:
        raise SystemExit(f"error: {error}") from None


def folder_of(data: Path, task: str) -> Path:
    """Return the folder of glue or superglue that has the task.

    Raises:
        ValueError: if neither has it.
    """
    for folder in (data / "glue", data / "superglue"):
        if (folder / task).is_dir():
            return folder
    raise ValueError(f"neither glue nor superglue in --data {data} has a folder {task}")


if __name__ == "__main__":
    main()
