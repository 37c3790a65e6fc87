"""The examples' scripts on generated text: the demo's pieces, and En-Vi from preparation to BLEU."""

import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="the examples train with fairseq")
from tests.adapter import runs

EN_VI = runs.ROOT / "examples" / "iwslt15_en_vi"


def script(path, *arguments, **kwargs):
    return subprocess.run([sys.executable, str(path), *map(str, arguments)], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus with the real one's file names and layout: one file plain, the others compressed, a pair half empty."""
    from grammar import sentence_pairs

    folder, pairs = tmp_path_factory.mktemp("corpus"), sentence_pairs(460, seed=2)
    for name, part in (("train", [*pairs[:400], ("", "x")]), ("tst2012", pairs[400:430]), ("tst2013", pairs[430:])):
        for language, lines in zip(("en", "vi"), zip(*part, strict=True), strict=True):
            text = "\n".join(lines) + "\n"
            if (name, language) == ("train", "en"):
                (folder / "train.en").write_text(text)
            else:
                with lzma.open(folder / f"{name}.{language}.xz", "wt") as file:
                    file.write(text)
    return folder


@pytest.mark.parametrize("flags", [(), ("--bpe", "100")], ids=["words", "bpe"])
def test_prepare(corpus, tmp_path, flags):
    done = script(EN_VI / "prepare.py", "--data", corpus, "--out", tmp_path, "--num-train", 300, *flags)
    assert done.returncode == 0, done.stderr
    assert "train: 300 pairs" in done.stdout and "test: 30 pairs" in done.stdout
    counts = [len((tmp_path / "text" / f"{split}.en").read_text().splitlines()) for split in ("train", "valid", "test")]
    assert counts == [300, 30, 30]
    assert (tmp_path / "data-bin" / "train.en-vi.en.bin").stat().st_size > 0
    dictionary = (tmp_path / "data-bin" / "dict.vi.txt").read_text()
    assert ("@@ " in dictionary) == bool(flags)


def test_prepare_takes_all_pairs_but_the_half_empty_ones_and_samples_by_seed(corpus, tmp_path):
    done = script(EN_VI / "prepare.py", "--data", corpus, "--out", tmp_path / "all")
    assert "train: 400 pairs" in done.stdout
    texts = []
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        script(EN_VI / "prepare.py", "--data", corpus, "--out", tmp_path / run, "--num-train", 50, "--seed", seed)
        texts.append((tmp_path / run / "text" / "train.vi").read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-train", "401"), "--num-train must be in 0..400 (0: all), got 401"),
        (("--num-train", "-1"), "--num-train must be in 0..400 (0: all), got -1"),
        (("--bpe", "-5"), "--bpe must be >= 0, got -5"),
        (("--data", "/nowhere"), "--data /nowhere is not a folder"),
    ],
)
def test_prepare_refuses(corpus, tmp_path, arguments, message):
    done = script(EN_VI / "prepare.py", "--data", corpus, "--out", tmp_path, *arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_prepare_names_a_missing_file(tmp_path):
    done = script(EN_VI / "prepare.py", "--data", tmp_path, "--out", tmp_path / "out")
    assert done.returncode != 0 and "has neither train.en nor train.en.xz" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adam", "ga_sam"])
def test_train_and_evaluate(corpus, tmp_path, method):
    script(EN_VI / "prepare.py", "--data", corpus, "--out", tmp_path, "--bpe", 100)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    more = ["--cpu", "--max-epoch", "2", "--num-workers", "0"]
    more += ["--sam-start-epoch", "2"] if method == "ga_sam" else []
    command = ["bash", EN_VI / "train.sh", tmp_path / "data-bin", tmp_path / "run", method, "mini", "1", *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("sam_passes 3" in done.stderr + done.stdout) == (method == "ga_sam")
    done = script(EN_VI / "evaluate.py", tmp_path / "data-bin", tmp_path / "run", "--average", 2, "--cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (
        result["test_loss"] > 0
        and result["sharpness"] > 0
        and 0 <= result["bleu"] <= 100
        and "tok:13a" in result["signature"]
    )
    assert len((tmp_path / "run" / "hypotheses.vi").read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "train.sh DATA_BIN"), (("d", "s", "adamw"), "method must be adam or ga_sam, got adamw"),
     (("d", "s", "adam", "huge"), "size must be mini or paper, got huge")],
)  # fmt: skip
def test_train_refuses(arguments, message):
    done = subprocess.run(["bash", str(EN_VI / "train.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_the_demo_s_grammar():
    """Deterministic; no source sentence twice; adjectives and verbs agree in the target."""
    from grammar import ADJECTIVE_ENDINGS, VERB_ENDINGS, build_grammar, sentence_pairs

    pairs = sentence_pairs(500)
    assert pairs == sentence_pairs(500) and pairs != sentence_pairs(500, seed=2)
    assert len({source for source, _ in pairs}) == 500
    grammar = build_grammar(1)
    nouns = {noun.source: noun for noun in grammar.nouns}
    simple = [(s, t) for s, t in pairs if re.fullmatch(r"the \w+ \w+ will \w+\.", s)]
    assert simple, "the sample holds the simplest sentences"
    for source, target in simple:
        adjective_source, noun_source = source.split()[1:3]
        if adjective_source not in {word.source for word in grammar.adjectives}:
            continue
        plural = noun_source not in nouns
        noun = nouns[noun_source.removesuffix("s") if plural else noun_source]
        words = target.rstrip(".").split()
        adjective = next(word for word in grammar.adjectives if word.source == adjective_source)
        assert adjective.target + ADJECTIVE_ENDINGS[noun.noun_class][plural] in words
        assert words[-1].endswith(VERB_ENDINGS[noun.noun_class][plural])


@pytest.mark.slow
def test_the_demo_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not delete")
    done = script(runs.ROOT / "examples" / "demo" / "run.py", "--out", tmp_path, "--restart")
    assert done.returncode != 0 and "is not empty and not a demo folder" in done.stderr
    assert (tmp_path / "thesis.tex").exists()
