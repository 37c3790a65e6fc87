"""Scores of classes and of numbers, in the unit of papers: times 100, by scikit-learn and scipy."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

Labels = Sequence[str] | Sequence[int]


def check_lengths(**given: Sequence[Any]) -> None:
    """Refuse lists that are empty or differ in length.

    Args:
        given: the lists by name.

    Raises:
        ValueError: with their lengths.
    """
    lengths = {name: len(values) for name, values in given.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        found = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"expected lists of one length that are not empty, got {found}")


# -- classification ----------------------------------------------------------------------------------------------------


def accuracy(predictions: Labels, references: Labels) -> float:
    """Return the share of right predictions, %."""
    check_lengths(predictions=predictions, references=references)
    right = sum(found == wanted for found, wanted in zip(predictions, references, strict=True))
    return 100.0 * right / len(references)


def matthews(predictions: Labels, references: Labels) -> float:
    """Return Matthews' correlation coefficient times 100; 0 where all predictions, or all references, are the same."""
    from sklearn.metrics import matthews_corrcoef

    check_lengths(predictions=predictions, references=references)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single label
        return 100.0 * float(matthews_corrcoef(list(references), list(predictions)))


def f1(predictions: Labels, references: Labels, positive: str | int = "1") -> float:
    """Return the F1 of one class, %; 0 where neither predictions nor references have it.

    Args:
        predictions: labels.
        references: labels.
        positive: the class that counts.
    """
    from sklearn.metrics import f1_score

    check_lengths(predictions=predictions, references=references)
    found, wanted = [each == positive for each in predictions], [each == positive for each in references]
    return 100.0 * float(f1_score(wanted, found, zero_division=0.0))


def macro_f1(predictions: Labels, references: Labels, labels: Labels | None = None) -> float:
    """Return the mean of the F1 of all classes, %, as SuperGLUE does for CB.

    Args:
        predictions: labels.
        references: labels.
        labels: all classes; default those that occur in either list.
    """
    from sklearn.metrics import f1_score

    check_lengths(predictions=predictions, references=references)
    chosen = None if labels is None else list(labels)
    score = f1_score(list(references), list(predictions), average="macro", labels=chosen, zero_division=0.0)
    return 100.0 * float(score)


def accuracy_and_f1(predictions: Labels, references: Labels, positive: str | int = "1") -> dict[str, float]:
    """Return ``accuracy``, ``f1`` and their mean ``accuracy_f1`` (MRPC, QQP), %."""
    found = {"accuracy": accuracy(predictions, references), "f1": f1(predictions, references, positive)}
    return {**found, "accuracy_f1": (found["accuracy"] + found["f1"]) / 2}


def accuracy_and_macro_f1(predictions: Labels, references: Labels, labels: Labels | None = None) -> dict[str, float]:
    """Return ``accuracy``, ``macro_f1`` and their mean ``accuracy_macro_f1`` (CB), %."""
    found = {"accuracy": accuracy(predictions, references), "macro_f1": macro_f1(predictions, references, labels)}
    return {**found, "accuracy_macro_f1": (found["accuracy"] + found["macro_f1"]) / 2}


# -- correlation -------------------------------------------------------------------------------------------------------


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return Pearson's correlation times 100; NaN where one of the lists is constant, which has none."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return Spearman's rank correlation times 100; NaN where one of the lists is constant, which has none."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def pearson_and_spearman(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Return ``pearson``, ``spearman`` and their mean ``pearson_spearman`` (STS-B), times 100."""
    found = {"pearson": pearson(predictions, references), "spearman": spearman(predictions, references)}
    return {**found, "pearson_spearman": (found["pearson"] + found["spearman"]) / 2}


def _correlation(function: Callable[..., Any], predictions: Sequence[float], references: Sequence[float]) -> float:
    check_lengths(predictions=predictions, references=references)
    found, wanted = [float(each) for each in predictions], [float(each) for each in references]
    if len(set(found)) == 1 or len(set(wanted)) == 1:
        return math.nan
    return 100.0 * float(function(found, wanted).statistic)


# -- by name -----------------------------------------------------------------------------------------------------------

# (predictions, references, positive class) -> score
METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any], str], float]] = {
    "accuracy": lambda found, wanted, positive: accuracy(found, wanted),
    "matthews": lambda found, wanted, positive: matthews(found, wanted),
    "f1": f1,
    "accuracy_f1": lambda found, wanted, positive: accuracy_and_f1(found, wanted, positive)["accuracy_f1"],
    "macro_f1": lambda found, wanted, positive: macro_f1(found, wanted),
    "accuracy_macro_f1": lambda found, wanted, positive: accuracy_and_macro_f1(found, wanted)["accuracy_macro_f1"],
    "pearson": lambda found, wanted, positive: pearson(found, wanted),
    "spearman": lambda found, wanted, positive: spearman(found, wanted),
    "pearson_spearman": lambda found, wanted, positive: pearson_and_spearman(found, wanted)["pearson_spearman"],
}
