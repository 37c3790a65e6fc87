"""Texts for sequence-to-sequence models, from pairs to generated lines."""

import pytest

pytest.importorskip("fairseq", reason="sequences are binarised and generated with fairseq")

import sentencepiece

from scripts.recipes.sequences import generate, prepare_pairs, subwords_of
from scripts.recipes.text import CorpusError
from tests.adapter import runs

BART = [
    "--task", "translation", "--source-lang", "source", "--target-lang", "target", "--arch", "bart_base", *runs.TINY,
    "--share-all-embeddings", "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1",
    "--max-source-positions", "64", "--max-target-positions", "64", "--dropout", "0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    from grammar import sentence_pairs

    return [(source, "Ünd: " + source.split()[1]) for source, _ in sentence_pairs(80, seed=6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory, pairs):
    """SentencePiece and fairseq's dictionary of it."""
    folder = tmp_path_factory.mktemp("model")
    text = folder / "text"
    text.write_text("\n".join(line for pair in pairs for line in pair))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sentencepiece"), vocab_size=120, minloglevel=2
    )
    rows = (folder / "sentencepiece.vocab").read_text(encoding="utf-8").splitlines()[3:]
    (folder / "dict.txt").write_text("".join(row.split("\t")[0] + " 1\n" for row in rows), encoding="utf-8")
    return folder


def test_from_pairs_to_generated_lines(tmp_path, model, pairs, in_this_process):
    splits = {"train": pairs[:60], "valid": pairs[60:70], "test": pairs[70:]}
    prepare_pairs(splits, model, tmp_path, max_source=30, max_target=4)
    pieces = (tmp_path / "subwords" / "train.target").read_text(encoding="utf-8").splitlines()
    assert len(pieces) == 60 and max(len(line.split()) for line in pieces) == 4
    assert max(len(line.split()) for line in (tmp_path / "subwords" / "test.target").read_text().splitlines()) > 4
    run = tmp_path / "run"
    runs.train(tmp_path / "data-bin", run, *BART, "--optimizer", "sam", "--max-update", "2")
    flags = ["--beam", "2", "--max-len-b", "5", "--cpu"]
    found, targets, sources = generate(tmp_path, run / "checkpoint_last.pt", model, flags)
    assert targets == [target for _, target in pairs[70:]] and sources == [source for source, _ in pairs[70:]]
    assert len(found) == 10 and not any("▁" in line for line in found)


def test_the_subwords_of_a_folder(tmp_path, model):
    assert "".join(subwords_of(model)(["the Ünd"])[0]) == "▁the▁Ünd"
    with pytest.raises(CorpusError, match=r"must hold sentencepiece\.model, or encoder\.json and vocab\.bpe"):
        subwords_of(tmp_path)


@pytest.mark.parametrize(
    ("splits", "message"),
    [({"train": [("a", " ")]}, "none of them with an empty side"), ({"train": []}, "train must have pairs")],
)
def test_what_cannot_be_prepared(tmp_path, model, splits, message):
    with pytest.raises(CorpusError, match=message):
        prepare_pairs(splits, model, tmp_path, 10, 10)
    with pytest.raises(CorpusError, match=r"must hold dict\.txt"):
        prepare_pairs(splits, tmp_path, tmp_path / "out", 10, 10)
