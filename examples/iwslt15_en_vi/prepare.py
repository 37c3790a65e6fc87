#!/usr/bin/env python3
"""Prepare IWSLT'15 English-Vietnamese for fairseq: read or fetch the corpus, sample, binarise.

The corpus is the Stanford preparation (tokenised, cased, 133k pairs); tst2012 is the validation set and tst2013 the
test set. Words seen fewer than five times in the training part become ``<unk>``, which on the whole corpus gives the
17.2k English and 7.7k Vietnamese words of GA-SAM B.3. ``--bpe`` splits words into subwords instead (subword-nmt).
"""

import argparse
import lzma
import random
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

PUBLIC_ADDRESS = "https://nlp.stanford.edu/projects/nmt/data/iwslt15.en-vi/"
ROOT = Path(__file__).resolve().parents[2]
NEARBY = ROOT.parent / "shared" / "data" / "iwslt15_envi"
SPLITS = {"train": "train", "valid": "tst2012", "test": "tst2013"}
LANGUAGES = ("en", "vi")


def find_file(folder: Path | None, name: str, cache: Path) -> Path:
    """Return the corpus file `name` from `folder` (plain or .xz), or fetch it from the public address."""
    if folder is not None:
        for candidate in (folder / name, folder / f"{name}.xz"):
            if candidate.exists():
                return candidate
        raise SystemExit(f"error: {folder} has neither {name} nor {name}.xz; --data must hold the corpus files")
    target = cache / name
    if not target.exists():
        print(f"fetching {PUBLIC_ADDRESS}{name}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(target.suffix + ".part")
        try:
            urllib.request.urlretrieve(PUBLIC_ADDRESS + name, partial)
        except (urllib.error.URLError, OSError) as error:
            raise SystemExit(
                f"error: could not fetch {PUBLIC_ADDRESS}{name}: {error}\n"
                "fetch it by hand and name its folder with --data"
            ) from error
        partial.rename(target)
    return target


def read_lines(path: Path) -> list[str]:
    """Return the lines of a plain or .xz text file, with white space normalised."""
    text = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")
    with text as lines:
        return [" ".join(line.split()) for line in lines]


def read_pairs(folder: Path | None, split: str, cache: Path) -> list[tuple[str, str]]:
    """Return the sentence pairs of a split without those that have an empty side."""
    sides = [read_lines(find_file(folder, f"{SPLITS[split]}.{language}", cache)) for language in LANGUAGES]
    if len(sides[0]) != len(sides[1]):
        raise SystemExit(f"error: {split}: {len(sides[0])} English lines but {len(sides[1])} Vietnamese ones")
    return [(en, vi) for en, vi in zip(*sides, strict=True) if en and vi]


def write_pairs(pairs: Iterable[tuple[str, str]], prefix: Path) -> None:
    """Write pairs as ``prefix.en`` and ``prefix.vi``."""
    for language, side in zip(LANGUAGES, zip(*pairs, strict=True), strict=True):
        Path(f"{prefix}.{language}").write_text("\n".join(side) + "\n", encoding="utf-8")


def split_words(text: Path, num_merges: int) -> Path:
    """Learn byte-pair encoding on each side of the training text and apply it to all splits."""
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    out = text.parent / f"bpe{num_merges}"
    out.mkdir(exist_ok=True)
    for language in LANGUAGES:
        codes = out / f"codes.{language}"
        with (text / f"train.{language}").open(encoding="utf-8") as lines, codes.open("w", encoding="utf-8") as target:
            learn_bpe(lines, target, num_merges)
        with codes.open(encoding="utf-8") as source:
            encoder = BPE(source)
        for split in SPLITS:
            plain = (text / f"{split}.{language}").read_text(encoding="utf-8").splitlines()
            encoded = "\n".join(encoder.process_line(line) for line in plain)
            (out / f"{split}.{language}").write_text(encoded + "\n", encoding="utf-8")
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.*, tst2012.*, tst2013.* or with iwslt15_envi")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; data-bin below it is for fairseq")
    parser.add_argument("--num-train", type=int, default=0, help="size of a random sample of training pairs; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample (default 1)")
    parser.add_argument("--bpe", type=int, default=0, metavar="MERGES", help="subwords by BPE; 0: words, as the paper")
    parser.add_argument("--workers", type=int, default=2, help="processes for fairseq-preprocess (default 2)")
    args = parser.parse_args()
    folder = args.data or (NEARBY if NEARBY.is_dir() else None)
    if folder is not None and (folder / NEARBY.name).is_dir():
        folder = folder / NEARBY.name
    if folder is not None and not folder.is_dir():
        parser.error(f"--data {folder} is not a folder")
    print(f"corpus: {folder or PUBLIC_ADDRESS}", flush=True)
    text = args.out / "text"
    text.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        pairs = read_pairs(folder, split, args.out / "download")
        if split == "train" and args.num_train:
            if not 0 < args.num_train <= len(pairs):
                parser.error(f"--num-train must be in 0..{len(pairs)} (0: all), got {args.num_train}")
            pairs = random.Random(args.seed).sample(pairs, args.num_train)
        print(f"{split}: {len(pairs)} pairs", flush=True)
        write_pairs(pairs, text / split)
    if args.bpe < 0:
        parser.error(f"--bpe must be >= 0, got {args.bpe}")
    prepared, threshold = (split_words(text, args.bpe), "0") if args.bpe else (text, "5")
    command = [
        sys.executable, "-m", "fairseq_cli.preprocess", "--source-lang", "en", "--target-lang", "vi",
        "--trainpref", str(prepared / "train"), "--validpref", str(prepared / "valid"),
        "--testpref", str(prepared / "test"),
        "--thresholdsrc", threshold, "--thresholdtgt", threshold, "--destdir", str(args.out / "data-bin"),
        "--workers", str(args.workers),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    print(f"ready: {args.out / 'data-bin'}", flush=True)


if __name__ == "__main__":
    main()
