"""Prepared folders, as fairseq's own tasks read them."""

import json
import logging
import sys

import pytest
from fairseq.data import Dictionary, data_utils

from scripts import prepare_glue
from scripts.recipes import glue
from scripts.recipes.subwords import Gpt2, TokenizerFile
from tests.adapter import runs
from tests.recipes import glue_files


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    return glue_files.write_wordpiece(tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return glue_files.write_gpt2(tmp_path_factory.mktemp("gpt2"))


def prepare(name, data, out, tokens, **options):
    files = glue.find_files(glue.TASKS[name], data)
    tokenize = options.pop("tokenize", None) or TokenizerFile(tokens / "tokenizer.json")
    return glue.prepare(glue.TASKS[name], files, out, tokens / "dict.txt", tokenize, **options)


def rows(folder, dictionary, split="train"):
    """Sentences of an input, as tokens."""
    found = data_utils.load_indexed_dataset(str(folder / split), dictionary)
    return [[dictionary[number] for number in row.tolist()] for row in found]


@pytest.mark.parametrize("name", glue.TASKS)
def test_files_of_every_task(tmp_path, wordpiece, name):
    task, data = glue.TASKS[name], glue_files.write_task(tmp_path, name)
    written = prepare(name, data, tmp_path / "out", wordpiece)
    splits = ["train", "valid", *(["valid1"] if name == "MNLI" else [])]
    expected = ["glue.json", *(f"input{n}/dict.txt" for n in range(task.num_sentences))]
    expected += [
        f"input{n}/{split}.{end}" for n in range(task.num_sentences) for split in splits for end in ("bin", "idx")
    ]
    if name in ("STS-B", "COPA"):
        expected += [f"label/{split}.label" for split in splits]
    else:
        expected += [f"label/{split}.{end}" for split in splits for end in ("bin", "idx")]
    expected += ["label/dict.txt"] if task.labels else []
    if task.trainer == "span_prediction":
        expected += [f"span{n}/{split}.span" for n in (0, 1) for split in splits]
    assert glue_files.paths_below(tmp_path / "out") == sorted(expected)
    assert {split: part.num_instances for split, part in written.items()} == {
        "train": 24,
        **dict.fromkeys(splits[1:], 13),
    }
    assert all(sum(part.counts.values()) == part.num_instances for part in written.values() if task.labels)
    assert all(list(part.counts) == list(task.labels) for part in written.values())
    for number in range(task.num_sentences):
        copy = tmp_path / "out" / f"input{number}" / "dict.txt"
        assert copy.read_bytes() == (wordpiece / "dict.txt").read_bytes()


def test_tokens_and_labels_are_those_of_the_file(tmp_path, wordpiece):
    data = glue_files.write_task(tmp_path, "RTE")
    written = prepare("RTE", data, tmp_path / "out", wordpiece)
    instances = glue.read_file(glue.TASKS["RTE"], data / "RTE" / "train.tsv", "train").instances
    dictionary = Dictionary.load(str(wordpiece / "dict.txt"))
    tokenize = TokenizerFile(wordpiece / "tokenizer.json")
    tokens = tokenize([each.texts[1] for each in instances])
    assert rows(tmp_path / "out" / "input1", dictionary) == [
        [t if t in dictionary else "<unk>" for t in line] + ["</s>"] for line in tokens
    ]
    labels = Dictionary.load(str(tmp_path / "out" / "label" / "dict.txt"))
    assert rows(tmp_path / "out" / "label", labels) == [[each.answer, "</s>"] for each in instances]
    assert labels.symbols[labels.nspecial :] == ["not_entailment", "entailment"]
    part = written["train"]
    all_tokens = [t for each in instances for text in each.texts for t in tokenize([text])[0]]
    assert part.num_tokens == len(all_tokens)
    assert part.num_unknown == sum(t == "[UNK]" for t in all_tokens) == 0


def test_the_same_classes_in_fairseq(tmp_path, wordpiece):
    """fairseq's sentence prediction counts the classes in the order of the table."""
    out = glue_files.prepared(tmp_path, "CB", wordpiece)
    _, batches = runs.build_trainer(out, *glue_files.flags_of("CB"), "--optimizer", "adam")
    answers = [each.answer for each in glue.read_file(glue.TASKS["CB"], tmp_path / "CB/train.jsonl", "train").instances]
    labels = glue.TASKS["CB"].labels
    found = {int(i): labels[int(t)] for batch in batches for i, t in zip(batch["id"], batch["target"], strict=True)}
    assert [found[number] for number in range(24)] == answers
    first = batches[0]["net_input"]["src_tokens"][0].tolist()
    assert first[0] == 0 and 2 in first and first[first.index(2) + 1] == 2, "<s> premise </s> </s> hypothesis </s>"


def test_scores_of_a_regression_are_divided(tmp_path, wordpiece):
    data = glue_files.write_task(tmp_path, "STS-B")
    prepare("STS-B", data, tmp_path / "out", wordpiece)
    answers = [each.answer for each in glue.read_file(glue.TASKS["STS-B"], data / "STS-B/dev.tsv", "valid").instances]
    lines = (tmp_path / "out" / "label" / "valid.label").read_text().splitlines()
    assert [5 * float(line) for line in lines] == pytest.approx([float(answer) for answer in answers], abs=1e-12)


def test_choices_are_numbers(tmp_path, wordpiece):
    data = glue_files.write_task(tmp_path, "COPA")
    prepare("COPA", data, tmp_path / "out", wordpiece)
    answers = [json.loads(line)["label"] for line in (data / "COPA/train.jsonl").read_text().splitlines()]
    assert [int(line) for line in (tmp_path / "out/label/train.label").read_text().splitlines()] == answers


@pytest.mark.parametrize("name", ["WiC", "WSC"])
@pytest.mark.parametrize("kind", ["wordpiece", "gpt2"])
def test_spans_are_tokens_of_the_words(tmp_path, wordpiece, gpt2, name, kind):
    """What the tokens of a span stand for, read back from the written files."""
    data = glue_files.write_task(tmp_path, name)
    if kind == "gpt2":
        bpe = Gpt2(gpt2 / "encoder.json", gpt2 / "vocab.bpe")
        prepare(name, data, tmp_path / "out", gpt2, tokenize=bpe)
        dictionary = Dictionary.load(str(gpt2 / "dict.txt"))
    else:
        prepare(name, data, tmp_path / "out", wordpiece)
        dictionary = Dictionary.load(str(wordpiece / "dict.txt"))
    instances = glue.read_file(glue.TASKS[name], data / name / "train.jsonl", "train").instances
    for number in (0, 1):
        spans = (tmp_path / "out" / f"span{number}" / "train.span").read_text().splitlines()
        own = instances[0].spans[number].text
        for line, row, each in zip(spans, rows(tmp_path / f"out/input{own}", dictionary), instances, strict=True):
            start, end = map(int, line.split())
            tokens = row[start:end]
            if kind == "gpt2":
                text = bpe._bpe.decode([int(token) for token in tokens]).strip()
            else:
                text = " ".join(tokens).replace(" ##", "")
            span = each.spans[number]
            assert text == (each.texts[own][span.start : span.end].lower() if kind == "wordpiece" else
                            each.texts[own][span.start : span.end])  # fmt: skip


def test_samples_of_the_training_split(tmp_path, wordpiece):
    data = glue_files.write_task(tmp_path, "CB", num_train=200)
    sizes = {}
    for number, options in enumerate([{"rate": 0.1}, {"rate": 0.5, "seed": 1}, {"max_train": 7}, {"max_train": 999}]):
        written = prepare("CB", data, tmp_path / f"out{number}", wordpiece, **options)
        sizes[number] = written["train"].num_instances
        assert written["valid"].num_instances == 13 and all(written["train"].counts.values())
    assert list(sizes.values()) == [20, 100, 7, 200]
    dictionary = Dictionary.load(str(wordpiece / "dict.txt"))
    small, large = (["".join(row) for row in rows(tmp_path / f"out{n}/input0", dictionary)] for n in (0, 1))
    assert set(small) <= set(large)
    described = json.loads((tmp_path / "out0" / "glue.json").read_text())
    assert described["sample"] == {"rate": 0.1, "max_train": None, "seed": 1}
    assert described["splits"] == {"train": 20, "valid": 13} and described["labels"] == list(glue.TASKS["CB"].labels)


def test_what_is_refused(tmp_path, wordpiece, gpt2):
    data = glue_files.write_task(tmp_path, "WiC")
    prepare("WiC", data, tmp_path / "out", wordpiece)
    with pytest.raises(ValueError, match=r"--out .*out already holds a prepared task; remove it"):
        prepare("WiC", data, tmp_path / "out", wordpiece)
    with pytest.raises(ValueError, match="--rate and --max-train"):
        prepare("WiC", data, tmp_path / "two", wordpiece, rate=0.5, max_train=3)
    with pytest.raises(ValueError, match="WiC asks about spans, so its tokenizer needs a method offsets"):
        prepare("WiC", data, tmp_path / "two", wordpiece, tokenize=lambda lines: [line.split() for line in lines])
    with pytest.raises(ValueError, match=r"does not have \d+ of the \d+ tokens of train; it must be that of the model"):
        prepare("WiC", data, tmp_path / "two", gpt2, tokenize=TokenizerFile(wordpiece / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"--dictionary .* is no file"):
        prepare("WiC", data, tmp_path / "two", tmp_path, tokenize=TokenizerFile(wordpiece / "tokenizer.json"))
    with pytest.raises(ValueError, match="a sample of 1 cannot have one instance of each of the 2 classes"):
        prepare("WiC", data, tmp_path / "two", wordpiece, max_train=1)
    with pytest.raises(ValueError, match=r"has no glue.json; prepare it with scripts/prepare_glue.py"):
        glue.read_description(tmp_path / "two")


def test_a_tokenizer_may_be_any_function(tmp_path, wordpiece):
    data = glue_files.write_task(tmp_path, "RTE")
    written = prepare("RTE", data, tmp_path / "out", wordpiece, tokenize=lambda lines: [line.split() for line in lines])
    assert 0 < written["train"].num_unknown < written["train"].num_tokens / 2, "unhappily is not in the dictionary"


# -- command line ------------------------------------------------------------------------------------------------------


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prepare_glue.py", *map(str, words)])
    try:
        prepare_glue.main()
    finally:
        logging.disable(logging.NOTSET)


def test_the_command(tmp_path, wordpiece, gpt2, monkeypatch, capsys):
    data = glue_files.write_task(tmp_path, "MNLI")
    model = ["--dictionary", wordpiece / "dict.txt", "--tokenizer-file", wordpiece / "tokenizer.json"]
    command(monkeypatch, "--task", "MNLI", "--data", data, "--out", tmp_path / "out", "--rate", "0.5", *model)
    output = capsys.readouterr().out
    assert "train: 12 instances (contradiction: " in output and "valid1: 13 instances" in output
    assert "0.00 % unknown" in output and "--num-classes 3 --init-token 0" in output
    assert "--valid-subset valid,valid1" in output and "--separator-token" not in output
    model = ["--dictionary", gpt2 / "dict.txt", "--bpe", "gpt2", "--gpt2-encoder-json", gpt2 / "encoder.json"]
    with pytest.raises(SystemExit, match="error: --bpe gpt2 needs --gpt2-vocab-bpe FILE"):
        command(monkeypatch, "--task", "MNLI", "--data", data, "--out", tmp_path / "bpe", *model)
    model += ["--gpt2-vocab-bpe", gpt2 / "vocab.bpe", "--splits", "valid"]
    command(monkeypatch, "--task", "MNLI", "--data", data, "--out", tmp_path / "bpe", *model)
    output = capsys.readouterr().out
    assert output.startswith("valid: 13 instances") and "--separator-token 2" in output
    with pytest.raises(SystemExit, match=r"error: .*already holds a prepared task"):
        command(monkeypatch, "--task", "MNLI", "--data", data, "--out", tmp_path / "bpe", *model)
    with pytest.raises(SystemExit, match=r"error: .*No such file or directory.*elsewhere.tsv"):
        command(monkeypatch, "--task", "MNLI", "--out", tmp_path / "x", *model, "--valid", "elsewhere.tsv")
