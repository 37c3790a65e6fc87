"""Whether a method differs from the baseline by more than chance."""

import math
from collections.abc import Sequence

from scipy import stats

from scripts.recipes.jobs import Job
from scripts.recipes.scores import bleu_significance

HYPOTHESES, REFERENCES = "hypotheses.txt", "references.txt"


def hypotheses_name(metric: str) -> str:
    """The file of a run's translations that a metric scores: of the model as it is, or as a measure has changed it."""
    return HYPOTHESES if metric in ("bleu", "bleu_tokenised") else f"hypotheses {metric}.txt"


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of a paired t-test over seeds.

    Args:
        first: scores of a method, one for each seed.
        second: scores of the baseline with the same seeds.

    Returns:
        The p-value, 1 where all are equal; NaN for fewer than two seeds, or where all differ by the same amount, from
        which no spread can be told.
    """
    if len(first) != len(second):
        raise ValueError(f"expected as many scores as of the baseline, got {len(first)} and {len(second)}")
    if len(first) < 2:
        return math.nan
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not all(map(math.isfinite, differences)):
        return math.nan
    if not any(differences):
        return 1.0
    if max(differences) - min(differences) <= 1e-9 * max(map(abs, differences)):
        return math.nan
    return float(stats.ttest_rel(first, second).pvalue)


def compare(job: Job, baseline: Job) -> float | None:
    """p-value of sacreBLEU's paired bootstrap between two runs' translations; None for other scores."""
    paths = [run / hypotheses_name(job.recipe.metric.name) for run in (job.run, baseline.run)]
    if not all(path.exists() for path in paths):
        return None
    references = (job.run / REFERENCES).read_text(encoding="utf-8").split("\n")[:-1]
    first, second = (path.read_text(encoding="utf-8").split("\n")[:-1] for path in paths)
    return float(bleu_significance(first, second, [references])["p"])
