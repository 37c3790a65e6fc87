#!/usr/bin/env python3
"""Score a sentence encoder on STS12 to STS16, STS-B and SICK-R: Spearman's correlation, times 100.

Examples:
    evaluate_sts.py --checkpoint bert/model.pt --data CORPORA --pooling mean
    evaluate_sts.py --checkpoint run/checkpoint_best.pt --data CORPORA --tokenizer-file bert/tokenizer.json --json FILE
    evaluate_sts.py --checkpoint run/checkpoint_best.pt --data CORPORA --sets 'STS-B dev'
The folder CORPORA has sts/ and glue/STS-B/; scripts/recipes/sts.py says which files.
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="of a RoBERTa or BERT, trained or converted")
    parser.add_argument("--data", required=True, type=Path, help="folder of the corpora")
    parser.add_argument("--pooling", help="cls or mean (default: the checkpoint's, otherwise mean)")
    parser.add_argument("--dictionary", type=Path, help="dict.txt (default: beside the checkpoint, or of its data)")
    parser.add_argument(
        "--tokenizer-file", type=Path, help="tokenizer.json (default: beside the checkpoint, or its own)"
    )
    parser.add_argument(
        "--max-length", type=int, help="cut longer sentences, in tokens (default: the model's positions)"
    )
    parser.add_argument("--sets", nargs="+", help="which sets (default: all seven of the table)")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    args = parser.parse_args()

    warnings.simplefilter("ignore")  # fairseq's and hydra's are about themselves
    logging.disable(logging.INFO)
    import torch

    import fairseq_sam  # noqa: F401  registers the models, allows the checkpoints' classes
    from scripts.recipes.sts import SETS, SentenceEncoder, evaluate

    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    try:
        encoder = SentenceEncoder(
            args.checkpoint,
            dictionary=args.dictionary,
            tokenizer_file=args.tokenizer_file,
            pooling=args.pooling,
            max_length=args.max_length,
            device=device,
        )
        scores = evaluate(encoder, args.data, args.sets or tuple(SETS))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(" | ".join(scores))
    print(" | ".join(f"{score:.2f}" for score in scores.values()))
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
