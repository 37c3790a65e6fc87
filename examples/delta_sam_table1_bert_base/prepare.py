#!/usr/bin/env python3
"""Prepare a task of GLUE or SuperGLUE for a converted encoder of Hugging Face.

Reads the task's official files in ``glue`` or ``superglue`` below ``--data``, converts the encoder into ``encoder``
(``model.pt``, ``dict.txt``, ``tokenizer.json``) and writes ``data-bin``.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes import glue
from scripts.recipes.subwords import TokenizerFile


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora, with glue or superglue in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write encoder and data-bin into")
    parser.add_argument("--task", required=True, choices=glue.TASKS, help="name of the task")
    parser.add_argument("--encoder", help="folder of Hugging Face's encoder, or package:NAME of an installed package")
    parser.add_argument("--rate", type=float, help="share of the training split to keep, in (0, 1]")
    parser.add_argument("--max-train", type=int, help="number of training instances to keep")
    parser.add_argument("--sample-seed", type=int, default=1, help="seed of the sample")
    args = parser.parse_args()
    if not args.encoder:
        raise SystemExit("error: this recipe needs an encoder: run_table.py … --set encoder=FOLDER")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from fairseq_sam.adapter.encoders import convert_encoder
    from fairseq_sam.adapter.errors import UserError

    task, encoder = glue.TASKS[args.task], args.out / "encoder"
    try:
        convert_encoder(args.encoder, encoder)
        folders = [args.data / name for name in ("glue", "superglue")]
        folder = next((folder for folder in folders if (folder / task.name).is_dir()), None)
        if folder is None:
            raise ValueError(f"neither glue nor superglue in --data {args.data} has a folder {task.name}")
        tokenizer = TokenizerFile(encoder / "tokenizer.json")
        written = glue.prepare(
            task, glue.find_files(task, folder), args.out / "data-bin", encoder / "dict.txt", tokenizer,
            rate=args.rate, max_train=args.max_train, seed=args.sample_seed,
        )  # fmt: skip
    except (ValueError, OSError, UserError) as error:
        raise SystemExit(f"error: {error}") from None
    print(", ".join(f"{split}: {part.num_instances} instances" for split, part in written.items()))


if __name__ == "__main__":
    main()
