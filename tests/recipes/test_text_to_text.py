"""GLUE and SuperGLUE as lines of text."""

import pytest

from scripts.recipes import glue
from scripts.recipes.glue_tasks import Instance, Span
from scripts.recipes.text_to_text import Part, answers_of, score_parts, source_line, target_line


@pytest.mark.parametrize(
    ("name", "instance", "expected"),
    [
        ("CoLA", Instance(("The cat  sat.",), "1"), "cola sentence: The cat sat."),
        ("MRPC", Instance(("A b", "C d"), "1"), "mrpc 1: A b 2: C d"),
        ("RTE", Instance(("A b", "C d"), "entailment"), "rte sentence1: A b sentence2: C d"),
        (
            "WiC",
            Instance(("He ran a mile", "a run of luck"), "True", (Span(0, 3, 6), Span(1, 2, 5))),
            "wic sentence1: He * ran * a mile sentence2: a * run * of luck",
        ),
        (
            "WSC",
            Instance(("Ann saw Bo , so she left",), "True", (Span(0, 0, 3), Span(0, 16, 19))),
            "wsc text: * Ann * saw Bo , so * she * left",
        ),
    ],
)
def test_lines(name, instance, expected):
    assert source_line(glue.TASKS[name], instance) == expected


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_answer_comes_back(name):
    task = glue.TASKS[name]
    answers = ["0", "1.93", "5.000"] if task.is_regression else list(task.labels)
    lines = [target_line(task, answer) for answer in answers]
    assert len(set(lines)) == len(lines) and all(line == line.strip() and line for line in lines)
    expected = [0.0, 2.0, 5.0] if task.is_regression else answers
    assert answers_of(task, [f" {line}  " for line in lines]) == expected


def test_what_is_no_answer_is_wrong():
    assert answers_of(glue.TASKS["MRPC"], ["equivalent equivalent", ""]) == ["(equivalent equivalent)", "()"]
    assert answers_of(glue.TASKS["STS-B"], ["many", "3.4"]) == [0.0, 3.4]


def test_scores_of_a_mixture():
    parts = [
        Part("boolq", "BoolQ", ["True", "False", "True", "True"]),
        Part("cb", "CB", ["entailment", "neutral"]),
        Part("sts-b", "STS-B", ["1.000", "2.500", "4.000"]),
    ]
    lines = ["true", "true", "maybe", "true", "entailment", "entailment", "2.0", "2.0", "2.0"]
    scores = score_parts(parts, lines)
    assert scores["boolq_accuracy"] == scores["cb_accuracy"] == 50.0
    # F1 of entailment 2/3, of neutral 0; contradiction, which does not occur, has none.
    assert scores["cb_macro_f1"] == pytest.approx(100 / 3) and scores["sts-b_pearson"] != scores["sts-b_pearson"]
    assert scores["average"] == pytest.approx((50 + (50 + 100 / 3) / 2 + 0) / 3)
    with pytest.raises(ValueError, match="expected 9 lines, got 8"):
        score_parts(parts, lines[1:])
