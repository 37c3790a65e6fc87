"""GLUE and SuperGLUE as translation: an instance as a line of text, its answer as another.

After Raffel et al. 2020 (T5), whose form SAM for language models (Bahri et al. 2022) fine-tunes: the line begins with
the task's name, each text has a name before it, words that a task asks about stand between asterisks, the answer is
the label's words. Scores of a regression are rounded to a fifth, so that they are 21 classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fairseq_sam.analysis.scores import METRICS
from scripts.recipes.glue_tasks import TASKS, GlueTask, Instance

STEP = 0.2  # of scores
PARTS = "parts.json"  # beside prepared data: the parts of its validation split
ASTERISK = "*"

# What the labels that are numbers, or true and false, are called; other labels are words already.
WORDS: dict[str, dict[str, str]] = {
    "CoLA": {"0": "unacceptable", "1": "acceptable"},
    "SST-2": {"0": "negative", "1": "positive"},
    "MRPC": {"0": "not_equivalent", "1": "equivalent"},
    "QQP": {"0": "not_duplicate", "1": "duplicate"},
    "BoolQ": {"False": "false", "True": "true"},
    "WiC": {"False": "false", "True": "true"},
    "WSC": {"False": "false", "True": "true"},
    "COPA": {"0": "first", "1": "second"},
}


def source_line(task: GlueTask, instance: Instance) -> str:
    """Write an instance as one line.

    Args:
        task: its task.
        instance: texts, and spans to be marked.
    """
    parts = [task.name.lower()]
    for number, (name, text) in enumerate(zip(task.texts, instance.texts, strict=True)):
        # From the last span to the first, so that the places of those before stay right.
        for span in sorted((s for s in instance.spans if s.text == number), key=lambda s: s.start, reverse=True):
            marked = f"{ASTERISK} {text[span.start : span.end]} {ASTERISK}"
            text = f"{text[: span.start]}{marked}{text[span.end :]}"
        parts.append(f"{_plain(name)}: {text}")
    return " ".join(" ".join(parts).split())


def target_line(task: GlueTask, answer: str) -> str:
    """Write an answer in words.

    Args:
        task: the task.
        answer: a label, or a score.
    """
    if task.is_regression:
        return f"{round(float(answer) / STEP) * STEP:.1f}"
    return WORDS.get(task.name, {}).get(answer, answer)


def answers_of(task: GlueTask, lines: Sequence[str]) -> list[str] | list[float]:
    """Read answers from generated lines.

    Args:
        task: the task.
        lines: what a model has written.

    Returns:
        Labels, or scores. A line that is no label becomes one that is always wrong, its own words; one that is no
        number becomes a score of 0.
    """
    texts = [" ".join(line.split()) for line in lines]
    if task.is_regression:
        return [_number(text) for text in texts]
    labels = {target_line(task, label): label for label in task.labels}
    return [labels.get(text, f"({text})") for text in texts]


class Part(NamedTuple):
    """Instances of a task that follow each other in the validation split of a mixture of tasks.

    Attributes:
        name: what its scores begin with.
        task: name of the task.
        answers: right labels or scores.
    """

    name: str
    task: str
    answers: list[str]


def score_parts(parts: Sequence[Part], lines: Sequence[str]) -> dict[str, float]:
    """Score the lines generated for a mixture.

    Args:
        parts: in the order of the lines.
        lines: what a model has written, a line for each answer.

    Returns:
        For each part its task's metrics, such as ``cb_accuracy`` and ``cb_macro_f1``, and ``average``: the mean over
        parts, of several metrics their mean. A correlation that there is none of counts as 0 in it.

    Raises:
        ValueError: if there are not as many lines as answers.
    """
    wanted = sum(len(part.answers) for part in parts)
    if len(lines) != wanted:
        raise ValueError(f"expected {wanted} lines, got {len(lines)}")
    scores: dict[str, float] = {}
    means, start = [], 0
    for part in parts:
        task, end = TASKS[part.task], start + len(part.answers)
        found, start = answers_of(task, lines[start:end]), end
        right = [float(answer) for answer in part.answers] if task.is_regression else part.answers
        own = {name: METRICS[name](found, right, task.positive) for name in task.metrics}
        scores |= {f"{part.name}_{name}": value for name, value in own.items()}
        mean = own[task.metrics[-1]]  # of a task with two metrics the third is their mean
        means.append(0.0 if math.isnan(mean) else mean)
    return {**scores, "average": sum(means) / len(means)}


def _plain(name: str) -> str:
    """A column's name in lower case, without what files put before it."""
    return name.lower().lstrip("#").replace(" string", "").strip() or "text"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
