#!/usr/bin/env python3
"""Prepare sentences without labels, from the training pairs of STS-B, for a converted encoder of Hugging Face.

Reads ``glue/STS-B`` and ``sts`` below ``--data`` (scripts/recipes/sts.py says which files), converts the encoder into
``encoder``, writes a sample of the sentences into ``data-bin``, and the sets to be scored into ``corpora``.
"""

import argparse
import logging
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LAYER = re.compile(r"encoder\.sentence_encoder\.layers\.(\d+)\.")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora, with glue/STS-B and sts in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write encoder, data-bin and corpora into")
    parser.add_argument("--encoder", help="folder of Hugging Face's encoder, or package:NAME of an installed package")
    parser.add_argument("--layers", type=int, help="keep the encoder's first layers only; default all")
    parser.add_argument("--num-sentences", type=int, default=10000, help="number of training sentences")
    parser.add_argument("--sample-seed", type=int, default=1, help="seed of the sample")
    args = parser.parse_args()
    if not args.encoder:
        raise SystemExit("error: this recipe needs an encoder: run_table.py … --set encoder=FOLDER")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from fairseq_sam.adapter.encoders import convert_encoder
    from fairseq_sam.adapter.errors import UserError
    from scripts.recipes.sts import binarise_sentences, copy_sets, training_sentences

    encoder = args.out / "encoder"
    try:
        sentences = training_sentences(args.data, args.num_sentences, args.sample_seed)
        convert_encoder(args.encoder, encoder)
        if args.layers is not None:
            keep_layers(encoder / "model.pt", args.layers)
        copy_sets(args.data, args.out / "corpora")
        binarise_sentences(sentences, encoder, args.out / "data-bin")
    except (ValueError, OSError, UserError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"train: {len(sentences)} sentences")


def keep_layers(checkpoint: Path, number: int) -> None:
    """Take the last layers off a converted encoder.

    Args:
        checkpoint: its ``model.pt``, which is written anew.
        number: of layers that stay.

    Raises:
        ValueError: if it has fewer.
    """
    import torch

    state = torch.load(checkpoint)
    layers = {int(found[1]) for found in map(LAYER.match, state["model"]) if found}
    if not 1 <= number <= len(layers):
        raise ValueError(f"--layers must be an integer from 1 to the encoder's {len(layers)}, got {number}")
    gone = [name for name in state["model"] if (found := LAYER.match(name)) and int(found[1]) >= number]
    for name in gone:
        del state["model"][name]
    state["cfg"]["model"]["encoder_layers"] = number
    torch.save(state, checkpoint)


if __name__ == "__main__":
    main()
