"""STS sets in their layouts, rank correlations, and encoders from checkpoints."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from fairseq.data import data_utils
from scipy import stats

pytest.importorskip("fairseq", reason="encoders are fairseq's models")

from fairseq_sam.adapter.encoders import convert_encoder
from fairseq_sam.adapter.errors import ConfigurationError
from scripts.recipes.jobs import Job, data_folder
from scripts.recipes.obtained import read_rows
from scripts.recipes.recipe import EXAMPLES, ROOT, column_names, read_recipe
from scripts.recipes.runner import preparation, run_table
from scripts.recipes.sts import (
    DEVELOPMENT,
    LAYOUTS,
    SETS,
    SentenceEncoder,
    evaluate,
    rank_correlation,
    read_pairs,
    training_sentences,
)
from scripts.recipes.text import CorpusError
from tests import in_process
from tests.adapter import pretrained, runs
from tests.recipes.sts_files import HEADS, pairs_of, write_sets


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    """A small converted encoder of a kind, with the model and the tokenizer that it was made of."""

    @cache
    def encoder(kind):
        root = tmp_path_factory.mktemp(kind)
        model, tokenizer = pretrained.write_original(root / "original", kind)
        convert_encoder(root / "original", root / "converted")
        return root / "converted", model, tokenizer

    return encoder


@pytest.fixture(scope="module", params=["bert", "roberta"])
def converted(request, encoder_of):
    return encoder_of(request.param)


def test_the_sets_are_the_tables(data):
    assert list(SETS) == ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"]
    for name, layout in LAYOUTS.items():
        first, second, scores = zip(*pairs_of(name), strict=True)
        found = read_pairs(data, layout)
        assert (tuple(found.first), tuple(found.second), tuple(found.scores)) == (first, second, scores)


def test_training_sentences_are_a_sample_of_both_sides(data):
    rows = pairs_of("STS-B train")
    everything = sorted(sentence for first, second, _ in rows for sentence in (first, second))
    assert sorted(training_sentences(data, 10_000, seed=1)) == everything
    sample = training_sentences(data, 10, seed=1)
    assert len(sample) == 10 and sample == training_sentences(data, 10, seed=1)
    assert sample != training_sentences(data, 10, seed=2)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"neither STS12\.tsv nor STS12\.tsv\.xz; --data must name"):
        read_pairs(tmp_path, SETS["STS12"])
    (tmp_path / "sts").mkdir()
    (tmp_path / "sts" / "STS12.tsv").write_text(f"{HEADS['sts']}\npart\t1.5\ta\tb\npart\thigh\ta\tb\n")
    with pytest.raises(CorpusError, match=r"sts/STS12\.tsv, line 3: expected a score and two sentences"):
        read_pairs(tmp_path, SETS["STS12"])


def test_rank_correlation_is_of_cosines():
    angles = torch.tensor([0.1, 0.5, 0.9, 1.3, 2.0])
    first = torch.stack([torch.ones(5), torch.zeros(5)], 1)
    second = torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, 6).view(5, 1)
    assert rank_correlation(first, second, [5, 4, 3, 2, 1]) == pytest.approx(100)
    assert rank_correlation(first, second, [1, 2, 3, 4, 5]) == pytest.approx(-100)
    assert rank_correlation(first, second, [5, 3, 4, 2, 1]) == pytest.approx(90)
    tied = [5, 3, 3, 2, 1]
    assert rank_correlation(first, second, tied) == pytest.approx(100 * stats.spearmanr(angles.cos(), tied)[0])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_embeddings_and_scores_are_those_of_the_original(converted, data, pooling):
    folder, model, tokenizer = converted
    encoder = SentenceEncoder(folder / "model.pt", pooling=pooling)
    texts = [text for text in pretrained.TEXTS if "[SEP]" not in text]  # BERT's segments are told by separators
    hidden, _, is_token = pretrained.hidden_states_and_logits(model, tokenizer, texts)
    mask = is_token.unsqueeze(-1)
    expected = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(encoder.embed(texts, batch_size=3), expected, rtol=0, atol=1e-5)
    scores = evaluate(encoder, data)
    pairs = read_pairs(data, SETS["SICK-R"])
    embeddings = [encoder.embed(side) for side in (pairs.first, pairs.second)]
    assert scores["SICK-R"] == pytest.approx(rank_correlation(*embeddings, pairs.scores), abs=0.5)
    assert list(scores) == [*SETS, "avg."]
    assert scores["avg."] == pytest.approx(sum(scores[name] for name in SETS) / 7)
    assert scores["avg."] > 20  # texts with more words in common are closer


def test_long_sentences_are_cut(converted):
    folder, *_ = converted
    encoder = SentenceEncoder(folder / "model.pt", max_length=6)
    long, same = encoder.embed(["a gimol near this tom " * 100, "a gimol near this tom " * 50])
    assert torch.allclose(long, same, atol=1e-6)
    assert SentenceEncoder(folder / "model.pt", max_length=10**6).embed(["a gimol " * 500]).isfinite().all()


def test_a_trained_encoder_is_scored_before_and_after(converted, data, tmp_path, request):
    """Training moves the scores; its checkpoint says how sentences are pooled and split."""
    folder, *_ = converted
    encode = SentenceEncoder(folder / "model.pt").bpe.encode
    pretrained.binarise(
        tmp_path / "data",
        [encode(sentence) for sentence in training_sentences(data, 60, seed=1)],
        "--srcdict",
        str(folder / "dict.txt"),
    )
    flags = (folder / "model_flags.txt").read_text().split()
    runs.train(
        tmp_path / "data", tmp_path / "run", *flags, "--task", "sentence_embedding", "--criterion", "mirror",
        "--pooling", "cls", "--restore-file", str(folder / "model.pt"), "--reset-optimizer", "--reset-dataloader",
        "--reset-meters", "--reset-lr-scheduler", "--batch-size", "8", "--max-update", "3", "--optimizer", "sam",
        "--perturb-one-view", "--bpe", "hugging_face", "--tokenizer-file", str(folder / "tokenizer.json"),
    )  # fmt: skip
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    trained = SentenceEncoder(checkpoint)
    assert trained.pooling == "cls" and trained.bpe is not None
    before = evaluate(SentenceEncoder(folder / "model.pt", pooling="cls"), data, [DEVELOPMENT])
    after = evaluate(trained, data, [DEVELOPMENT])
    assert list(after) == [DEVELOPMENT, "avg."] and after[DEVELOPMENT] != before[DEVELOPMENT]

    script = [sys.executable, str(ROOT / "scripts" / "evaluate_sts.py"), "--checkpoint", str(checkpoint), "--cpu"]
    words = ["--data", str(data), "--sets", DEVELOPMENT, "--json", str(tmp_path / "scores.json")]
    run = subprocess.run if request.node.callspec.params["converted"] == "bert" else in_process.run
    done = run([*script, *words], capture_output=True, text=True)  # one in a process of its own
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "scores.json").read_text())[DEVELOPMENT] == pytest.approx(after[DEVELOPMENT])
    assert done.stdout.splitlines()[-1] == " | ".join(f"{score:.2f}" for score in after.values())
    done = in_process.run([*script, *words, "--pooling", "max"])
    assert done.returncode == 1 and done.stderr.endswith("error: --pooling must be one of cls, mean, got 'max'\n")


def test_a_word_level_encoder_has_no_subwords(tmp_path):
    pretrained.binarise(tmp_path / "data", [source for source, _, _ in pairs_of("words", 60)])
    sizes = "--encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 2".split()
    runs.train(
        tmp_path / "data", tmp_path / "run", "--arch", "roberta", *sizes, "--task", "sentence_embedding", "--criterion",
        "mirror", "--batch-size", "8", "--max-update", "1", "--optimizer", "adam",
    )  # fmt: skip
    encoder = SentenceEncoder(tmp_path / "run" / "checkpoint_last.pt")
    assert encoder.bpe is None and encoder.max_length == 50
    words = pairs_of("words", 1)[0][0]
    number = encoder.dictionary.index(words.split()[1])
    assert number != encoder.dictionary.unk() and encoder._tokens(words)[2] == number


def test_what_is_missing_is_named(converted, data, tmp_path):
    folder, *_ = converted
    with pytest.raises(ConfigurationError, match=r"there is no checkpoint .*nothing\.pt \(--checkpoint\)"):
        SentenceEncoder(tmp_path / "nothing.pt")
    alone = tmp_path / "model.pt"
    state = torch.load(folder / "model.pt")
    state["cfg"]["task"]["data"] = state["cfg"]["bpe"]["tokenizer_file"] = str(tmp_path / "elsewhere")
    torch.save(state, alone)
    with pytest.raises(ConfigurationError, match=r"none of .*dict\.txt.* is there; name the dictionary"):
        SentenceEncoder(alone)
    with pytest.raises(ConfigurationError, match=r"there is no tokenizer file .*elsewhere, the checkpoint's"):
        SentenceEncoder(alone, dictionary=folder / "dict.txt")
    with pytest.raises(ConfigurationError, match=r"there is no tokenizer file .*nowhere\.json"):
        SentenceEncoder(alone, dictionary=folder / "dict.txt", tokenizer_file=tmp_path / "nowhere.json")
    assert SentenceEncoder(alone, dictionary=folder / "dict.txt", tokenizer_file=folder / "tokenizer.json")
    with pytest.raises(ConfigurationError, match=r"--sets must be among STS12, .*, got 'STS17'"):
        evaluate(SentenceEncoder(folder / "model.pt"), data, ["STS17"])
    other = {**state, "model": {"weight": torch.zeros(1)}}
    torch.save(other, alone)
    with pytest.raises(ConfigurationError, match="is of no RoBERTa or BERT encoder"):
        SentenceEncoder(alone)


# -- from raw sentences ------------------------------------------------------------------------------------------------


def test_sentences_are_binarised_as_they_will_be_read(converted, tmp_path):
    folder, *_ = converted
    (tmp_path / "sentences.txt").write_text("the nofak will prasul\n\n  a gimol near this tom\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "prepare_sentences.py"), "--encoder", str(folder)]
    command += ["--input", str(tmp_path / "sentences.txt"), "--out", str(tmp_path / "bin")]
    done = in_process.run(command)
    assert (done.returncode, done.stdout) == (0, "2 sentences\n"), done.stderr
    encoder = SentenceEncoder(folder / "model.pt", dictionary=tmp_path / "bin" / "dict.txt")
    written = data_utils.load_indexed_dataset(str(tmp_path / "bin" / "train"), encoder.dictionary)
    read = [encoder._tokens(sentence)[1:] for sentence in ("the nofak will prasul", "a gimol near this tom")]
    assert [row.tolist() for row in written] == [row.tolist() for row in read]
    done = in_process.run([*command, "--input", str(tmp_path / "none.txt")])
    assert done.returncode == 1 and "error: [Errno 2]" in done.stderr and "none.txt" in done.stderr


NARROW = "encoder-layers: 1, encoder-embed-dim: 24, encoder-ffn-embed-dim: 40, encoder-attention-heads: 4"


@pytest.fixture
def recipe_folder(encoder_of, tmp_path):
    """The recipe of Mirror-BERT with a small encoder, of two layers of which the first is kept."""
    folder, *_ = encoder_of("bert")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "recipe.yaml").write_text(
        f"extends: {EXAMPLES / 'delta_sam_table2_mirror_bert'}\n"
        "methods:\n  Mirror: {optimizer: adam}\n  R3F: {optimizer: adam, input-noise: 0.1}\n"
        f"sizes: {{mini: {{options: {{encoder: {folder.parent / 'original'}, layers: 1, num_sentences: 16}}, "
        f"flags: {{{NARROW}, max-positions: 300, batch-size: 8}}}}}}\n"
    )
    return tmp_path / "small"


def test_one_run_has_the_scores_of_all_columns(recipe_folder, data, tmp_path, in_this_process):
    columns = column_names(recipe_folder, "mini")
    recipes = [read_recipe(recipe_folder, "mini", column) for column in columns]
    run_table(recipes, data=data, out=tmp_path / "out", cpu=True, seeds=[1])
    rows = read_rows(tmp_path / "out" / "small" / "mini" / "obtained.tsv")
    assert [row["column"] for row in rows] == [column for column in [*SETS, "avg."] for _ in range(2)]
    job = Job(recipes[0], "Mirror", 1, tmp_path / "out", cpu=True)
    assert len(list(job.run.parents[1].iterdir())) == 2, "a run for each method"
    encoder = SentenceEncoder(
        job.run / "checkpoint_last.pt", tokenizer_file=job.data / "encoder" / "tokenizer.json", max_length=50
    )
    expected = evaluate(encoder, data)
    found = {row["column"]: float(row["value"]) for row in rows if row["method"] == "Mirror"}
    assert found == pytest.approx(expected, abs=1e-3)
    (valid,) = {float(row["valid"]) for row in rows if row["method"] == "Mirror"}
    assert valid == pytest.approx(evaluate(encoder, data, [DEVELOPMENT])[DEVELOPMENT], abs=1e-3)
    assert {row["updates"] for row in rows} == {"2"} and len(set(found.values())) == 8


def test_layers_that_are_kept(recipe_folder, data, tmp_path, in_this_process):
    """Those that are kept are the converted encoder's, and it can be scored."""
    recipe = read_recipe(recipe_folder, "mini")
    whole = read_recipe(recipe_folder, "mini", changed={"layers": 2})
    states = []
    for each in (recipe, whole):
        command = preparation(each, data, tmp_path / "out")
        assert in_process.run(command).stdout == "train: 16 sentences\n"
        prepared = data_folder(each, tmp_path / "out") / "encoder" / "model.pt"
        states.append(torch.load(prepared)["model"])
        assert SentenceEncoder(prepared).embed(["a gimol"]).isfinite().all()
    first, both = states
    assert {name for name in both if name not in first} == {name for name in both if ".layers.1." in name} != set()
    assert all(torch.equal(weight, both[name]) for name, weight in first.items() if not name.endswith("version"))
    for number in (0, 3):
        wrong = preparation(read_recipe(recipe_folder, "mini", changed={"layers": number}), data, tmp_path / "wrong")
        done = in_process.run(wrong)
        assert done.returncode == 1
        assert f"error: --layers must be an integer from 1 to the encoder's 2, got {number}" in done.stderr
    paper = preparation(read_recipe(recipe_folder, "paper"), data, tmp_path / "wrong")
    assert "error: this recipe needs an encoder: run_table.py … --set encoder=FOLDER" in in_process.run(paper).stderr
