"""Generated corpora in the layout of the real ones."""

import json
import random
from collections.abc import Sequence
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
    for name, number in (("train", num_lines), ("valid", 120), ("test", 120)):
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


def text(rng: random.Random, least: int = 3, most: int = 12) -> str:
    return " ".join(rng.choice([*OTHER, *GOOD, *BAD]) for _ in range(rng.randint(least, most)))


def write_aeslc(folder: Path, num_train: int = 60) -> None:
    """E-mails whose subject is their first words; one has none."""
    place = folder / "aeslc"
    place.mkdir(parents=True, exist_ok=True)
    rng = random.Random(5)
    for name, number in (("train", num_train), ("dev", 20), ("test", 20)):
        bodies = [f"{text(rng, 5, 30).capitalize()}.\n{text(rng)}" for _ in range(number)]
        records = [{"id": str(n), "body": body, "subject": " ".join(body.split()[:3])} for n, body in enumerate(bodies)]
        records[0]["subject"] = " "
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in records), encoding="utf-8")


def write_jfleg(folder: Path) -> None:
    """Sentences with a word that is wrong, and four corrections."""
    place = folder / "jfleg"
    place.mkdir(parents=True, exist_ok=True)
    rng = random.Random(6)
    for name, number in (("dev", 40), ("test", 12)):
        rows = [[f"{sentence} plott . ", *(f"{sentence} {word} . " for word in OTHER[:4])] for sentence in
                (text(rng) for _ in range(number))]  # fmt: skip
        for ending, lines in zip(("src", "ref0", "ref1", "ref2", "ref3"), zip(*rows, strict=True), strict=True):
            (place / f"{name}.{ending}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_conll(folder: Path) -> None:
    """The same as parallel text, with annotated edits for the test set."""
    place = folder / "conll2014"
    place.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    for name, number in (("train", 40), ("valid", 12)):
        sentences = [text(rng) for _ in range(number)]
        for side, word in (("source", "plott"), ("target", "plot")):
            lines = "".join(f"{sentence} {word} .\n" for sentence in sentences)
            (place / f"{name}.{side}").write_text(lines, encoding="utf-8")
    blocks = []
    for sentence in (text(rng) for _ in range(12)):
        length = len(sentence.split())
        blocks.append(f"S {sentence} plott .\nA {length} {length + 1}|||Spelling|||plot|||REQUIRED|||-NONE-|||0\n")
    (place / "test.m2").write_text("\n".join(blocks), encoding="utf-8")


def write_summaries(folder: Path, name: str) -> None:
    """Texts and summaries as fairseq's preparations of CNN/DailyMail and XSum have them; one summary is empty."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    rng = random.Random(8)
    for split, number in (("train", 40), ("val", 12), ("test", 12)):
        sources = [f"{text(rng, 9, 30)} . {text(rng)} ." for _ in range(number)]
        targets = ["", *(source.split(" . ")[0] for source in sources[1:])]
        for side, lines in (("source", sources), ("target", targets)):
            (place / f"{split}.{side}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_wikitext(folder: Path) -> None:
    """Headings and paragraphs, some sentences with unknown words."""
    place = folder / "wikitext2_partial"
    place.mkdir(parents=True, exist_ok=True)
    rng = random.Random(9)
    for name in ("valid", "test"):
        lines = [
            " ",
            " = Plot = ",
            " ",
            *(f" {text(rng)} 0 @.@ 7 . The <unk> film . {text(rng)} . " for _ in range(15)),
        ]
        (place / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_pretrained(folder: Path, *flags: str, texts: Sequence[str] = ()) -> Path:
    """A folder as bart_small makes it: SentencePiece model, dictionary, and a BART that has learnt nothing."""
    from fairseq import tasks
    from fairseq.trainer import Trainer

    from scripts.recipes.sequences import train_sentencepiece
    from tests.adapter import runs

    rng = random.Random(10)
    train_sentencepiece(texts or [text(rng, 10, 30) for _ in range(60)], folder, 120)
    cfg = runs.configuration([str(folder), *runs.common_flags(), "--no-save-optimizer-state", *flags])
    task = tasks.setup_task(cfg.task)
    Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion)).save_checkpoint(
        str(folder / "model.pt"), {"train_iterator": {"epoch": 1}}
    )
    return folder
