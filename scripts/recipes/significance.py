"""Whether a method differs from the baseline by more than chance."""

import json
import math
from collections.abc import Sequence

from scipy import stats

from scripts.recipes.jobs import SETTINGS, Job
from scripts.recipes.scores import bleu_significance

HYPOTHESES, REFERENCES = "hypotheses.txt", "references.txt"


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of a paired t-test over seeds.

    Args:
        first: scores of a method, one for each seed.
        second: scores of the baseline with the same seeds.

    Returns:
        The p-value; NaN for fewer than two seeds, 1 where all are equal.
    """
    if len(first) != len(second):
        raise ValueError(f"expected as many scores as of the baseline, got {len(first)} and {len(second)}")
    if len(first) < 2:
        return math.nan
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(set(differences)) == 1:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_rel(first, second).pvalue)


def compare(job: Job, baseline: Job) -> float | None:
    """p-value of sacreBLEU's paired bootstrap between two runs' translations; None for other scores."""
    paths = [run / HYPOTHESES for run in (job.run, baseline.run)]
    if not all(path.exists() for path in paths):
        return None
    settings = json.loads((job.run / SETTINGS).read_text(encoding="utf-8"))
    references = (job.run / REFERENCES).read_text(encoding="utf-8").split("\n")[:-1]
    first, second = (path.read_text(encoding="utf-8").split("\n")[:-1] for path in paths)
    tokenize = settings["evaluation"].get("bleu_tokenize", "13a")
    return float(bleu_significance(first, second, [references], tokenize=tokenize)["p"])
