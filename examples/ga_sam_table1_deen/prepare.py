#!/usr/bin/env python3
"""Prepare IWSLT'14 German-English for fairseq: subwords by 10,000 joint merges, binarised.

Reads ``iwslt14_deen`` in ``--data``, else ``iwslt14_deen_partial``: ``train``, ``valid`` and ``test`` (``.de`` and
``.en``, tokenised and in lower case as by fairseq's own script; plain or .xz) and, if there is one, ``bpe10k.codes``.
Without it the merges are learned. A partial corpus has ``train_sample`` in place of ``train``.
"""

import argparse
import io
import subprocess
import sys
from pathlib import Path

from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes.recipe import ROOT
from scripts.recipes.text import CorpusError, read_lines

LANGUAGES = ("de", "en")
WHOLE, PARTIAL = "iwslt14_deen", "iwslt14_deen_partial"


def find_folder(data: Path, may_be_partial: bool) -> Path:
    """The corpus in a folder of corpora: the whole one, else a partial one where that will do."""
    if (data / WHOLE).is_dir():
        return data / WHOLE
    if not (data / PARTIAL).is_dir():
        raise CorpusError(f"{data} has neither {WHOLE} nor {PARTIAL}; --data must name the folder of the corpora")
    if not may_be_partial:
        raise CorpusError(
            f"{data / PARTIAL} has a part of the training pairs only; this size needs the whole corpus in "
            f"{data / WHOLE}: train.de, train.en, and valid and test likewise"
        )
    return data / PARTIAL


def read_pairs(folder: Path, split: str, number: int | None = None) -> list[tuple[str, str]]:
    """The first sentence pairs of a split, default all; those with an empty side are left out of the training part."""
    sides = [read_lines(folder, f"{split}.{language}") for language in LANGUAGES]
    if len(sides[0]) != len(sides[1]):
        raise CorpusError(f"{folder}: {split} has {len(sides[0])} German and {len(sides[1])} English lines")
    pairs = [(german.strip(), english.strip()) for german, english in zip(*sides, strict=True)]
    return ([pair for pair in pairs if all(pair)] if split.startswith("train") else pairs)[:number]


def merges(folder: Path, pairs: list[tuple[str, str]], number: int) -> list[str]:
    """The corpus's own merges, else those learned on both sides of the training part."""
    if any((folder / f"bpe10k.codes{ending}").exists() for ending in ("", ".xz")):
        return read_lines(folder, "bpe10k.codes")
    learned = io.StringIO()
    learn_bpe(io.StringIO("".join(f"{side}\n" for pair in pairs for side in pair)), learned, number)
    return learned.getvalue().splitlines()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder to write data-bin into")
    parser.add_argument("--num-merges", type=int, default=10000, help="joint merges, where the corpus has none")
    parser.add_argument("--max-words", type=int, default=175, help="longest side of a training pair, in subwords")
    parser.add_argument("--partial", action="store_true", help="take a part of the corpus where the whole is not there")
    parser.add_argument("--num-valid", type=int, help="validation pairs, the first; default all")
    parser.add_argument("--num-test", type=int, help="test pairs, the first; default all")
    args = parser.parse_args()
    try:
        folder = find_folder(args.data, args.partial)
        is_whole = any((folder / f"train.de{ending}").exists() for ending in ("", ".xz"))
        pairs = {"train": read_pairs(folder, "train" if is_whole else "train_sample")}
        pairs |= {
            "valid": read_pairs(folder, "valid", args.num_valid),
            "test": read_pairs(folder, "test", args.num_test),
        }
        encoder = BPE(io.StringIO("\n".join(merges(folder, pairs["train"], args.num_merges)) + "\n"))
        for split, lines in pairs.items():
            write_split(args.out, split, lines, encoder, args.max_words if split == "train" else sys.maxsize)
            print(f"{split}: {len(lines)} pairs", flush=True)
        binarise_pairs(args.out)
    except CorpusError as error:
        raise SystemExit(f"error: {error}") from None


def write_split(out: Path, split: str, pairs: list[tuple[str, str]], encoder: BPE, max_words: int) -> None:
    """Write the text and its subwords; pairs of which one side is longer than `max_words` are left out."""
    encoded = [[encoder.process_line(side) for side in pair] for pair in pairs]
    kept = [place for place, pair in enumerate(encoded) if all(len(side.split()) <= max_words for side in pair)]
    for kind, sides in (("text", pairs), ("subwords", encoded)):
        (out / kind).mkdir(parents=True, exist_ok=True)
        for number, language in enumerate(LANGUAGES):
            lines = "".join(f"{sides[place][number]}\n" for place in kept)
            (out / kind / f"{split}.{language}").write_text(lines, encoding="utf-8")


def binarise_pairs(out: Path) -> None:
    """Run fairseq-preprocess on both sides, with a dictionary each."""
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--destdir", str(out / "data-bin"), "--workers", "2"]
    command += ["--source-lang", LANGUAGES[0], "--target-lang", LANGUAGES[1]]
    for split in ("train", "valid", "test"):
        command += [f"--{split}pref", str(out / "subwords" / split)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise CorpusError("fairseq-preprocess failed:\n" + "\n".join(done.stderr.strip().splitlines()[-10:]))


if __name__ == "__main__":
    main()
