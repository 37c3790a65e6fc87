#!/usr/bin/env python3
"""Evaluate a run: average its kept checkpoints, translate tst2013 with beam 5, score.

Prints one row: tokenised BLEU (the preparation's own tokens, as the papers report), BLEU of the detokenised text with
sacreBLEU's signature, the test loss, and its rise when the weights move 0.5 (L2) along the gradient of the test loss.
Writes the row to SAVE_DIR/result.json.
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes.commands import CommandError
from scripts.recipes.translation import average, bleu, translate

SHARPNESS_RADIUS = 0.5  # L2


def measure(data_bin: Path, checkpoint: Path, cpu: bool) -> tuple[float, float]:
    """Test loss in bits per token, without label smoothing, and its rise when the weights move uphill."""
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    from fairseq_sam.adapter.measure import checkpoint_sharpness

    found = checkpoint_sharpness(checkpoint, data_bin, epsilon=SHARPNESS_RADIUS, cpu=cpu)
    return found.loss, found.sharpness


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_bin", type=Path, help="the data-bin folder that prepare.py wrote")
    parser.add_argument("save_dir", type=Path, help="the run's folder")
    parser.add_argument("--average", type=int, default=5, help="checkpoints to average (mini 5, paper 10)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    args = parser.parse_args()
    flags = ["--cpu"] if args.cpu else []
    try:
        checkpoint = average(args.save_dir, args.average)
        hypotheses, references = translate(args.data_bin, checkpoint, flags, target="vi")
    except CommandError as error:
        raise SystemExit(f"error: {error}") from None
    (args.save_dir / "hypotheses.vi").write_text("\n".join(hypotheses) + "\n", encoding="utf-8")
    scores = bleu(hypotheses, references)
    loss, sharpness = measure(args.data_bin, checkpoint, args.cpu)
    result = {
        "bleu_tokenised": scores.tokenised,
        "bleu": scores.detokenised,
        "test_loss": loss,
        "sharpness": sharpness,
        "signature": scores.signature,
    }
    (args.save_dir / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"BLEU {result['bleu']:.2f} (tokenised {result['bleu_tokenised']:.2f}), "
        f"test loss {loss:.3f} bits per token, sharpness {sharpness:.3f}, {result['signature']}"
    )


if __name__ == "__main__":
    main()
