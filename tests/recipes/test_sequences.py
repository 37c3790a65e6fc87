"""Texts for sequence-to-sequence models, from pairs to generated lines."""

import shutil

import pytest

pytest.importorskip("fairseq", reason="sequences are binarised and generated with fairseq")

import torch

from scripts.recipes import evaluations
from scripts.recipes.sequences import (
    generate,
    link_model,
    prepare_pairs,
    read_sides,
    subwords_of,
    train_sentencepiece,
)
from scripts.recipes.text import CorpusError, binarise
from tests.adapter import runs

TRANSLATION = ["--task", "translation", "--source-lang", "source", "--target-lang", "target"]
BART = [
    "--arch", "bart_base", *runs.TINY, "--share-all-embeddings", "--optimizer", "adam",
    "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1",
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
    train_sentencepiece([line for pair in pairs for line in pair], folder, 121)
    return folder


def test_the_dictionary_has_the_subwords(model, pairs):
    from fairseq.data import Dictionary

    dictionary = Dictionary.load(str(model / "dict.txt"))
    words = [word for line in subwords_of(model)([" ".join(pair) for pair in pairs]) for word in line]
    assert len(dictionary) == 121 and dictionary.unk() not in {dictionary.index(word) for word in words}


def test_a_link_to_the_model(tmp_path, model):
    (model / "model.pt").touch()
    for named in (model, tmp_path / "models"):  # the folder itself, then one that has it
        (tmp_path / "models").mkdir(exist_ok=True)
        if not (tmp_path / "models" / "bart.large").exists():
            (tmp_path / "models" / "bart.large").symlink_to(model)
        link = link_model(str(named), tmp_path / "data", "bart.large")
        assert link == tmp_path / "data" / "model" and link.resolve() == model.resolve()
    with pytest.raises(CorpusError, match=r"needs a pretrained model: .* --set model=FOLDER"):
        link_model(None, tmp_path)
    with pytest.raises(CorpusError, match=r"models must hold model\.pt and dict\.txt; model\.pt is not there"):
        link_model(str(tmp_path / "models"), tmp_path / "data", "bart.base")


def test_two_files_side_by_side(tmp_path):
    for side, lines in (("source", ["a b", " ", "c"]), ("target", ["A", "B", "C"])):
        (tmp_path / f"val.{side}").write_text("\n".join(lines) + "\n")
    assert read_sides(tmp_path, "val") == [("a b", "A"), ("c", "C")]
    (tmp_path / "val.target").write_text("A\n")
    with pytest.raises(CorpusError, match=r"val has 3 lines in \.source and 1 in \.target"):
        read_sides(tmp_path, "val")


def test_from_pairs_to_generated_lines(tmp_path, model, pairs, in_this_process):
    splits = {"train": pairs[:60], "valid": pairs[60:70], "test": pairs[70:]}
    prepare_pairs(splits, model, tmp_path, max_source=30, max_target=4)
    pieces = (tmp_path / "subwords" / "train.target").read_text(encoding="utf-8").splitlines()
    assert len(pieces) == 60 and max(len(line.split()) for line in pieces) == 4
    assert max(len(line.split()) for line in (tmp_path / "subwords" / "test.target").read_text().splitlines()) > 4
    run = tmp_path / "run"
    runs.train(tmp_path / "data-bin", run, *TRANSLATION, *BART, "--optimizer", "sam", "--max-update", "2")
    flags = ["--beam", "2", "--max-len-b", "5", "--cpu"]
    found, targets, sources = generate(tmp_path, run / "checkpoint_last.pt", model, flags)
    assert targets == [target for _, target in pairs[70:]] and sources == [source for source, _ in pairs[70:]]
    assert len(found) == 10 and not any("▁" in line for line in found)


@pytest.mark.slow
def test_a_pretrained_model_is_fine_tuned(tmp_path, model, pairs):
    """What the evaluation of a pretraining leaves is what fairseq fine-tunes, without the row of the mask."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(model, data / "model")
    lines = [" ".join(words) for words in subwords_of(model)([source for source, _ in pairs])]
    files = {"train": data / "train", "valid": data / "valid", "test": data / "test"}
    for path, part in zip(files.values(), (lines[:60], lines[60:70], lines[70:]), strict=True):
        path.write_text("".join(f"{line}\n" for line in part), encoding="utf-8")
    binarise(files, data / "data-bin", model / "dict.txt")
    noise = "--task denoising --mask 0.3 --mask-length span-poisson --replace-length 1 --rotate 0".split()
    runs.train(data / "data-bin", run, *BART, "--sample-break-mode", "eos", *noise, "--max-update", "2")
    (run / "checkpoint_last.pt").rename(run / "checkpoint_best.pt")
    scores = evaluations.denoising(run, {"data": str(data), "flags": {"max-tokens": 300}}, ["--cpu"])
    assert set(scores) == {"loss", "valid_loss"} and all(4 < value < 9 for value in scores.values())
    state = runs.load(run / "model" / "model.pt")
    assert state["last_optimizer_state"] is None and (run / "model" / "sentencepiece.model").exists()
    prepare_pairs({"train": pairs[:60], "valid": pairs[60:]}, run / "model", tmp_path, 30, 30)
    own = ["--finetune-from-model", str(run / "model" / "model.pt"), "--lr", "0", "--max-update", "1"]
    tuned = runs.train(tmp_path / "data-bin", tmp_path / "tuned", *TRANSLATION, *BART, *own)["model"]
    whole = state["model"]
    assert len(whole["decoder.embed_tokens.weight"]) == len(tuned["decoder.embed_tokens.weight"]) + 1
    assert all(torch.equal(weight[: len(tuned[name])], tuned[name]) for name, weight in whole.items())


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
