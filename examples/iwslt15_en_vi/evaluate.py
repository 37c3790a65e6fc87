#!/usr/bin/env python3
"""Evaluate a run: average its kept checkpoints, translate tst2013 with beam 5, score.

Prints one row: tokenised BLEU (the preparation's own tokens, as the papers report), BLEU of the detokenised text with
sacreBLEU's signature, the test loss, and its rise when the weights move 0.5 (L2) along the gradient of the test loss.
Writes the row to SAVE_DIR/result.json.
"""

import argparse
import html
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import sacrebleu
from sacremoses import MosesDetokenizer

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "fairseq_sam")
sys.path.insert(0, str(ROOT))
SHARPNESS_RADIUS = 0.5  # L2
# fairseq drops a last batch whose size is no multiple of this, which is 8 by default: up to 7 sentences of a test set.
ALL_SENTENCES = ("--required-batch-size-multiple", "1")


def run(*command: str) -> str:
    """Run a Python module or script, return its output; stop with its last lines if it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command[:2])} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return done.stdout + done.stderr


def average(save_dir: Path, count: int) -> Path:
    """Average the last checkpoints of the run."""
    output = save_dir / f"averaged{count}.pt"
    script = str(ROOT / "scripts" / "average_checkpoints.py")
    run(script, "--inputs", str(save_dir), "--num-epoch-checkpoints", str(count), "--output", str(output))
    return output


def translate(data_bin: Path, checkpoint: Path, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return hypotheses and references, both tokenised, in the order of the test set."""
    output = run(
        "-m", "fairseq_cli.generate", str(data_bin), "--user-dir", PLUGIN, "--path", str(checkpoint), "--beam", "5",
        "--max-tokens", "6000", "--remove-bpe", *ALL_SENTENCES, *flags,
    )  # fmt: skip
    hypotheses = {int(n): text for n, text in re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", output, re.M)}
    # The references come from the text: in generate's own output, words outside the dictionary are <<unk>>.
    references = (data_bin.parent / "text" / "test.vi").read_text(encoding="utf-8").splitlines()
    if sorted(hypotheses) != list(range(len(references))):
        raise SystemExit(f"error: expected {len(references)} translations, got {len(hypotheses)}")
    return [hypotheses[n] for n in range(len(references))], references


def detokenise(lines: Sequence[str]) -> list[str]:
    """Undo the preparation's tokenisation and HTML escapes."""
    detokenizer = MosesDetokenizer(lang="en")
    return [detokenizer.detokenize(html.unescape(line).split()) for line in lines]


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
    checkpoint = average(args.save_dir, args.average)
    hypotheses, references = translate(args.data_bin, checkpoint, flags)
    (args.save_dir / "hypotheses.vi").write_text("\n".join(hypotheses) + "\n", encoding="utf-8")
    detokenised = sacrebleu.BLEU()
    loss, sharpness = measure(args.data_bin, checkpoint, args.cpu)
    result = {
        "bleu_tokenised": sacrebleu.BLEU(tokenize="none", force=True).corpus_score(hypotheses, [references]).score,
        "bleu": detokenised.corpus_score(detokenise(hypotheses), [detokenise(references)]).score,
        "test_loss": loss,
        "sharpness": sharpness,
        "signature": str(detokenised.get_signature()),
    }
    (args.save_dir / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"BLEU {result['bleu']:.2f} (tokenised {result['bleu_tokenised']:.2f}), "
        f"test loss {loss:.3f} bits per token, sharpness {sharpness:.3f}, {result['signature']}"
    )


if __name__ == "__main__":
    main()
