"""Official files: every layout, its pitfalls, and what is said when one is wrong."""

import json
import lzma
from pathlib import Path

import pytest

from scripts.recipes import glue
from scripts.recipes.glue_tasks import find_words
from tests.recipes import glue_files


def read(task, path, split="train"):
    return glue.read_file(glue.TASKS[task], path, split)


def written(folder, name, text, task="MRPC"):
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return glue.TASKS[task], path


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_layout(tmp_path, name):
    task = glue.TASKS[name]
    glue_files.write_task(tmp_path, name)
    files = glue.find_files(task, tmp_path)
    assert files == glue.find_files(task, tmp_path / name)
    assert list(files) == ["train", "valid", *(["valid1"] if name == "MNLI" else [])]
    found = read(name, files["train"])
    assert len(found.instances) == 24 and found.num_broken == 0
    assert all(len(each.texts) == task.num_sentences and all(each.texts) for each in found.instances)
    answers = {each.answer for each in found.instances}
    assert answers <= set(task.labels) if task.labels else all(0 <= float(answer) <= 5 for answer in answers)
    assert len(answers) > 1
    assert all(len(each.spans) == (2 if task.trainer == "span_prediction" else 0) for each in found.instances)


def test_the_table():
    assert len(glue.TASKS) == 13
    assert glue.TASKS["MNLI"].labels == glue.TASKS["CB"].labels == ("contradiction", "neutral", "entailment")
    assert glue.TASKS["RTE"].labels == glue.TASKS["QNLI"].labels == ("not_entailment", "entailment")
    assert [task.name for task in glue.TASKS.values() if task.is_regression] == ["STS-B"]
    from fairseq_sam.analysis.scores import METRICS

    for task in glue.TASKS.values():
        assert task.metrics and set(task.metrics) <= set(METRICS)
        assert not task.labels or "f1" not in task.metrics or task.positive in task.labels


# -- tables ------------------------------------------------------------------------------------------------------------

HEADER = glue_files.HEADERS["MRPC"]


def test_quotes_are_characters(tmp_path):
    text = f'{HEADER}\n1\t1\t2\t"He said\tno "quote" ends .\n0\t3\t4\tThe 5" disk\t\'tis "\n'
    _, path = written(tmp_path, "train.tsv", text)
    assert [each.texts for each in read("MRPC", path).instances] == [
        ('"He said', 'no "quote" ends .'), ('The 5" disk', "'tis \""),
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n"])
def test_ends_of_files_and_lines(tmp_path, end):
    separator = "\r\n" if end == "\r\n" else "\n"
    text = "\ufeff" + separator.join([HEADER, "1\t1\t2\ta b\tc d", "0\t1\t2\te\tf"]) + end
    _, path = written(tmp_path, "train.tsv", text)
    assert [(each.texts, each.answer) for each in read("MRPC", path).instances] == [
        (("a b", "c d"), "1"),
        (("e", "f"), "0"),
    ]


def test_separators_of_lines_that_are_none(tmp_path):
    """Python would split there; the corpora have such characters within sentences."""
    _, path = written(tmp_path, "train.tsv", f"{HEADER}\n1\t1\t2\tone\u2028two\x85three\x0bfour\tfive\rsix\n")
    assert read("MRPC", path).instances[0].texts == ("one\u2028two\x85three\x0bfour", "five\rsix")


def test_compressed_files_and_their_names(tmp_path):
    text = "\n".join(glue_files.lines("RTE", 3))
    (tmp_path / "train.tsv.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "val.tsv").write_text(text)
    files = glue.find_files(glue.TASKS["RTE"], tmp_path)
    assert [path.name for path in files.values()] == ["train.tsv.xz", "val.tsv"]
    assert read("RTE", files["train"]) == read("RTE", files["valid"])
    (tmp_path / "dev.tsv").write_text(text)
    (tmp_path / "test_labelled.tsv").write_text(text)
    files = glue.find_files(glue.TASKS["RTE"], tmp_path)
    assert {split: path.name for split, path in files.items()} == {
        "train": "train.tsv.xz", "valid": "dev.tsv", "test": "test_labelled.tsv",
    }  # fmt: skip


def test_cola_has_no_header(tmp_path):
    _, path = written(tmp_path, "train.tsv", "gj04\t1\t\tShe sleeps .\ngj04\t0\t*\tSleeps she the .")
    found = read("CoLA", path).instances
    assert [(each.texts[0], each.answer) for each in found] == [("She sleeps .", "1"), ("Sleeps she the .", "0")]
    _, path = written(tmp_path, "other.tsv", "source\tlabel\tmark\tsentence\ngj04\t1\t\tShe sleeps .\n")
    with pytest.raises(ValueError, match=r"other.tsv, line 1: label must be one of 0, 1, got 'label'"):
        read("CoLA", path)


def test_sts_b_test_has_no_header_and_more_columns(tmp_path):
    row = "main-captions\tMSRvid\t2012test\t0024\t2.500\tA girl .\tThe girl ."
    _, path = written(tmp_path, "test_labelled.tsv", f"{row}\n{row}\thttp://source\tnone\n")
    found = read("STS-B", path, "test").instances
    assert [(each.texts, each.answer) for each in found] == 2 * [(("A girl .", "The girl ."), "2.500")]
    _, path = written(tmp_path, "short.tsv", "main-captions\tMSRvid\t2012test\t0024\t2.500\tA girl .\n")
    with pytest.raises(ValueError, match="line 1: expected 7 columns, got 6"):
        read("STS-B", path, "test")


def test_broken_rows(tmp_path):
    rows = [*glue_files.lines("QQP", 2), "6\t1\t2\tonly a question ?", "x"]
    _, path = written(tmp_path, "train.tsv", "\n".join(rows))
    found = read("QQP", path)
    assert len(found.instances) == 2 and found.num_broken == 2
    _, path = written(tmp_path, "mrpc.tsv", f"{HEADER}\n1\t1\t2\ta\tb\n1\t1\t2\ta\n")
    with pytest.raises(ValueError, match=r"mrpc.tsv, line 3: expected 5 columns, got 4: '1\\t1\\t2\\ta'"):
        read("MRPC", path)


@pytest.mark.parametrize(
    ("task", "text", "words"),
    [
        ("MRPC", "1\t1\t2\ta\tb\n", "line 1: MRPC has a header with #1 String, #2 String, Quality"),
        ("MRPC", f"{HEADER}\n2\t1\t2\ta\tb\n", "line 2: Quality must be one of 0, 1, got '2'"),
        ("MRPC", "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\ta\tb\n", "'Quality' is not among"),
        ("MRPC", HEADER, "has no instances"),
        ("MRPC", "", "'#1 String' is not among"),
        (
            "STS-B",
            glue_files.HEADERS["STS-B"] + "\n0\ta\tb\tc\td\te\tf\tg\th\tlow\n",
            "score must be a number, got 'low'",
        ),
        ("CB", '{"premise": "a", "hypothesis": "b"}\n', "line 1: has no label; it has premise, hypothesis"),
        ("CB", '{"premise": "a"\n', "line 1: not JSON"),
        ("WiC", '{"sentence1": "a", "sentence2": "b", "label": true}', "line 1: 'start1'"),
        ("COPA", '{"premise": "a", "choice1": "b", "choice2": "c", "label": 1, "question": "why"}', "'why'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, task, text, words):
    _, path = written(tmp_path, "train.txt", text)
    with pytest.raises(ValueError) as caught:
        read(task, path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_missing_files(tmp_path):
    for name, ending in (("QNLI", "tsv"), ("BoolQ", "jsonl")):
        glue_files.write_task(tmp_path, name)
        (tmp_path / name / f"train.{ending}").rename(tmp_path / f"full-{name}.{ending}")
        task = glue.TASKS[name]
        with pytest.raises(ValueError) as caught:
            glue.find_files(task, tmp_path)
        for words in (f"{name} has no train.{ending}", "it has ", "--train FILE", "--splits valid"):
            assert words in str(caught.value)
        assert list(glue.find_files(task, tmp_path, splits=["valid"])) == ["valid"]
        named = {"train": tmp_path / f"full-{name}.{ending}"}
        assert glue.find_files(task, tmp_path, named=named)["train"] == named["train"]
        assert set(glue.find_files(task, tmp_path, splits=["valid"], named=named)) == {"train", "valid"}
    with pytest.raises(
        ValueError, match=r"nowhere has no train.tsv .* it is empty or no folder. Name a file with --train FILE$"
    ):
        glue.find_files(glue.TASKS["RTE"], Path("nowhere"))
    with pytest.raises(ValueError, match="RTE has the splits train, valid, test, got 'valid1'"):
        glue.find_files(glue.TASKS["RTE"], tmp_path, splits=["valid1"])


# -- SuperGLUE ---------------------------------------------------------------------------------------------------------


def instance(name, **record):
    return glue.TASKS[name].instance(record)


def test_booleans_and_numbers_become_labels():
    assert instance("BoolQ", question="q", passage="p", label=True).answer == "True"
    assert instance("BoolQ", question="q", passage="p", label=False).texts == ("q", "p")
    copa = instance("COPA", premise="It rained .", choice1="a", choice2="b", question="effect", label=0)
    assert copa.texts == ("It rained . What happened as a result?", "a", "b") and copa.answer == "0"
    assert "cause" in instance("COPA", premise="x", choice1="a", choice2="b", question="cause", label=1).texts[0]


def test_word_in_context():
    found = instance(
        "WiC", sentence1="the bank", sentence2="banks run", start1=4, end1=8, start2=0, end2=5, label=False
    )
    assert [found.texts[span.text][span.start : span.end] for span in found.spans] == ["bank", "banks"]
    assert [span.text for span in found.spans] == [0, 1]


@pytest.mark.parametrize(
    ("text", "words", "index", "start"),
    [
        ("Mary saw Mary .", "Mary", 0, 0),
        ("Mary saw Mary .", "Mary", 2, 9),  # the second one
        ("Mary saw Mary .", "Mary", 3, 9),  # one off
        ("It broke the table because", "The table", 2, 9),  # other capitals
        ("He saw Joe 's uncle , Joe .", "Joe", 5, 22),
        ("Joe Joe's uncle beat him.", "Joe's uncle", 1, 4),
        ("Joe Joe's uncle beat him.", "him", 4, 21),  # a full stop behind
        ("Joe Joe's uncle beat him.", "him.", 4, 21),
        ("He met them , them .", "the", 1, None),  # only within a word
        ("two  spaces here", "spaces", 2, 5),
        ("the two\tlong words", "two long", 1, 4),
    ],
)
def test_words_are_found_near_their_place(text, words, index, start):
    if start is None:
        with pytest.raises(ValueError, match="the text does not have 'the'"):
            find_words(text, words, index)
        return
    begin, end = find_words(text, words, index)
    assert begin == start
    assert text[begin:end].lower().split() == words.lower().split() or text[begin:end] == words.rstrip(".")


def test_coreference(tmp_path):
    line = json.dumps(glue_files.record("WSC", "True", glue_files.random.Random(3)))
    _, path = written(tmp_path, "train.jsonl", line)
    found = read("WSC", path).instances[0]
    assert [found.texts[0][span.start : span.end] for span in found.spans] == ["Mary Ann", "she"]
    assert [span.text for span in found.spans] == [0, 0] and found.answer == "True"
