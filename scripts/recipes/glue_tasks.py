"""The tasks of GLUE and SuperGLUE: what their files have, how they are scored, what an instance is.

Sources: Wang et al. 2018 (GLUE), Wang et al. 2019 (SuperGLUE). The order of MNLI's and CB's classes is that of the MNLI
models that fairseq's authors have published, the scale of STS-B that of fairseq's recipe.
"""

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scripts.recipes.subwords import Range

FILES = {"train": ("train",), "valid": ("dev", "val"), "test": ("test_labelled",)}


class Span(NamedTuple):
    """Characters of one of an instance's texts, from the first to before the last."""

    text: int
    start: int
    end: int


class Instance(NamedTuple):
    """An instance of a task.

    Attributes:
        texts: one for each input.
        answer: a label, or the score of a regression as it is written.
        spans: what the task asks about.
    """

    texts: tuple[str, ...]
    answer: str
    spans: tuple[Span, ...] = ()


Record = Mapping[str, Any]


@dataclass(frozen=True)
class GlueTask:
    """A task.

    Attributes:
        name: its name in papers and of its folder.
        texts: columns (or fields) with the texts, in the order of fairseq's inputs.
        answer: column with the label or score.
        labels: labels in the order of the classes; empty for a regression.
        metrics: scores, that of most papers first; names in ``fairseq_sam.analysis.scores.METRICS``.
        ending: ``tsv`` or ``jsonl``.
        files: names that a split's file may have, without ending; the first that is there is read.
        columns: columns of the files without a header, by split; the file may have more of them.
        skips_broken_rows: rows with another number of columns are left out and counted, as in everyone's copy of QQP.
        positive: label that F1 counts.
        scale: what regression scores are divided by for training.
        trainer: fairseq's task and criterion.
        report: further flags for fairseq-train: what to report and which checkpoint is best.
        read: makes an instance of a record; None takes ``texts`` as they are.
    """

    name: str
    texts: tuple[str, ...]
    answer: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    ending: str = "tsv"
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FILES)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skips_broken_rows: bool = False
    positive: str = "1"
    scale: float = 1.0
    trainer: str = "sentence_prediction"
    report: tuple[str, ...] = ("--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric")
    read: Callable[["GlueTask", Record], Instance] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the answer is a number."""
        return not self.labels

    @property
    def num_sentences(self) -> int:
        """Number of inputs."""
        return len(self.texts)

    def instance(self, record: Record) -> Instance:
        """Make an instance of a record.

        Raises:
            ValueError: if the record is not one of the task.
        """
        for name in (*self.texts, self.answer):
            if name not in record:
                known = ", ".join(record)
                raise ValueError(f"has no {name}; it has {known}. Only files with answers can be prepared")
        answer = str(record[self.answer])
        if self.is_regression:
            if not re.fullmatch(r"-?\d+(\.\d+)?", answer):
                raise ValueError(f"{self.answer} must be a number, got {answer!r}")
        elif answer not in self.labels:
            raise ValueError(f"{self.answer} must be one of {', '.join(self.labels)}, got {answer!r}")
        made = self.read(self, record) if self.read else Instance(tuple(record[name] for name in self.texts), answer)
        return made._replace(answer=answer)


# -- instances that are more than their texts --------------------------------------------------------------------------


def _word_in_context(task: GlueTask, record: Record) -> Instance:
    spans = tuple(Span(n, int(record[f"start{n + 1}"]), int(record[f"end{n + 1}"])) for n in (0, 1))
    return Instance(tuple(record[name] for name in task.texts), "", spans)


def _coreference(task: GlueTask, record: Record) -> Instance:
    """Candidate and pronoun, which the file gives by their words and the number of the first one."""
    text, target = record["text"], record["target"]
    found = (find_words(text, target[f"span{n}_text"], int(target[f"span{n}_index"])) for n in (1, 2))
    return Instance((text,), "", tuple(Span(0, *place) for place in found))


def _choice(task: GlueTask, record: Record) -> Instance:
    question = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}[record["question"]]
    return Instance((f"{record['premise']} {question}", record["choice1"], record["choice2"]), "")


def find_words(text: str, words: str, index: int) -> Range:
    """Find words whose place is given by counting the spaces before them.

    WSC's own numbers may be one off, its words may be written with other capitals than in the text ("The table"), or
    with a punctuation mark of the text.

    Args:
        text: the text.
        words: what to find.
        index: number of spaces before the first word.

    Returns:
        The characters of the occurrence that is nearest to the place.

    Raises:
        ValueError: if the text does not have the words.
    """
    place = len(" ".join(text.split(" ")[:index])) + (index > 0)
    for wanted in (words.split(), words.strip(string.punctuation + string.whitespace).split()):
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, wanted)) + r"(?!\w)"
        found = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if wanted else []
        if found:
            return min(found, key=lambda span: abs(span[0] - place))
    raise ValueError(f"the text does not have {words!r}: {text!r}")


# -- the table ---------------------------------------------------------------------------------------------------------

_COLA = ("source", "label", "mark", "sentence")
_STS = ("genre", "filename", "year", "old_index", "score", "sentence1", "sentence2")
_INFERENCE = ("not_entailment", "entailment")
_BEST = "--best-checkpoint-metric"
_ACCURACY_F1 = ("--report-acc-and-f1", _BEST, "accuracy", "--maximize-best-checkpoint-metric")
_MCC = ("--report-mcc", _BEST, "mcc", "--maximize-best-checkpoint-metric")
_PEARSON = ("--report-pearson-and-spearman", _BEST, "pearson", "--maximize-best-checkpoint-metric")

_TASKS = (
    GlueTask("CoLA", ("sentence",), "label", ("0", "1"), ("matthews",), columns=dict.fromkeys(FILES, _COLA),
             report=_MCC),
    GlueTask("SST-2", ("sentence",), "label", ("0", "1")),
    GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("accuracy", "f1", "accuracy_f1"),
             report=_ACCURACY_F1),
    GlueTask("QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("accuracy", "f1", "accuracy_f1"),
             skips_broken_rows=True, report=_ACCURACY_F1),
    GlueTask("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman", "pearson_spearman"),
             columns={"test": _STS}, scale=5.0, report=_PEARSON),
    GlueTask("MNLI", ("sentence1", "sentence2"), "gold_label", ("contradiction", "neutral", "entailment"),
             files={"train": ("train",), "valid": ("dev_matched",), "valid1": ("dev_mismatched",)}),
    GlueTask("QNLI", ("question", "sentence"), "label", _INFERENCE),
    GlueTask("RTE", ("sentence1", "sentence2"), "label", _INFERENCE),
    # The question comes first, so that --shorten-method truncate cuts off the end of the passage.
    GlueTask("BoolQ", ("question", "passage"), "label", ("False", "True"), ending="jsonl"),
    GlueTask("CB", ("premise", "hypothesis"), "label", ("contradiction", "neutral", "entailment"),
             ("accuracy", "macro_f1", "accuracy_macro_f1"), ending="jsonl"),
    GlueTask("COPA", ("premise", "choice1", "choice2"), "label", ("0", "1"), ending="jsonl",
             trainer="sentence_ranking", read=_choice),
    GlueTask("WiC", ("sentence1", "sentence2"), "label", ("False", "True"), ending="jsonl",
             trainer="span_prediction", read=_word_in_context),
    GlueTask("WSC", ("text",), "label", ("False", "True"), ending="jsonl", trainer="span_prediction",
             read=_coreference),
)  # fmt: skip
TASKS: Mapping[str, GlueTask] = {task.name: task for task in _TASKS}
