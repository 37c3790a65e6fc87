"""Generated corpora in the layout of the real ones."""

import random
from pathlib import Path

GOOD = "good great fine lovely superb".split()
BAD = "bad poor dull awful weak".split()
OTHER = "the a film plot actor scene was is it and but with of this that story music end".split()


def write_imdb(folder: Path, num_train: int = 80, num_test: int = 40) -> None:
    """Reviews with a good or a bad word among others."""
    (folder / "imdb").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name, number in (("train", num_train), ("test", num_test)):
        rows = []
        for place in range(number):
            label = int(place >= number // 2)  # sorted, as the corpus is
            words = [rng.choice(OTHER) for _ in range(rng.randint(5, 15))]
            words.insert(rng.randrange(len(words)), rng.choice(GOOD if label else BAD))
            rows.append(
                f'{label}\t{9 if label else 2}\t{place}\t{" ".join(words).capitalize()}.<br /><br />\x85 "yes"\n'
            )
        (folder / "imdb" / f"{name}.tsv").write_text("".join(rows), encoding="utf-8")


def write_ptb(folder: Path, num_lines: int = 60) -> None:
    """Lines of words in lower case."""
    (folder / "ptb").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name, number in (("train", num_lines), ("valid", 12), ("test", 12)):
        lines = [
            " " + " ".join(rng.choice([*OTHER, *GOOD, "<unk>", "N"]) for _ in range(rng.randint(3, 20))) + " \n"
            for _ in range(number)
        ]
        (folder / "ptb" / f"ptb.{name}.txt").write_text("".join(lines), encoding="utf-8")


def write_envi(folder: Path, num_train: int = 120) -> None:
    """Pairs of the demo's grammar under the names of IWSLT'15 En-Vi."""
    from grammar import sentence_pairs  # the demo's, on the path through tests.adapter.runs

    place = folder / "iwslt15_envi"
    place.mkdir(parents=True, exist_ok=True)
    pairs = sentence_pairs(num_train + 20, seed=3)
    splits = {
        "train": pairs[:num_train],
        "tst2012": pairs[num_train : num_train + 10],
        "tst2013": pairs[num_train + 10 :],
    }
    for name, part in splits.items():
        for language, lines in zip(("en", "vi"), zip(*part, strict=True), strict=True):
            (place / f"{name}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_deen(folder: Path, num_train: int = 120) -> None:
    """Pairs of the demo's grammar under the names of a partial IWSLT'14 De-En."""
    from grammar import sentence_pairs

    place = folder / "iwslt14_deen_partial"
    place.mkdir(parents=True, exist_ok=True)
    pairs = sentence_pairs(num_train + 20, seed=4)
    ends = {"train_sample": (0, num_train), "valid": (num_train, num_train + 10), "test": (num_train + 10, None)}
    for name, (start, end) in ends.items():
        for language, lines in zip(("en", "de"), zip(*pairs[start:end], strict=True), strict=True):
            (place / f"{name}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
