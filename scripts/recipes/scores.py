"""Scores of texts, in the unit of papers: times 100; those of classes and numbers are ``fairseq_sam.analysis.scores``.

BLEU and its significance by sacrebleu, ROUGE by rouge-score. GLEU and MaxMatch have no maintained package that runs
without a model: see ``corrections``.
"""

from collections.abc import Sequence
from typing import Any

from fairseq_sam.analysis.scores import check_lengths

Texts = Sequence[str]


def rouge(predictions: Texts, references: Texts, stemmed: bool = True) -> dict[str, float]:
    """Return the mean F of ROUGE over the texts, %.

    Args:
        predictions: summaries.
        references: one for each.
        stemmed: compare the stems of words, as papers do.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL``, and ``rougeLsum``: ROUGE-L by sentence, which stand on lines of their own;
        this is what the Perl script's ROUGE-L is on CNN/DailyMail.
    """
    from rouge_score.rouge_scorer import RougeScorer

    check_lengths(predictions=predictions, references=references)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=stemmed)
    found = [scorer.score(wanted, given) for given, wanted in zip(predictions, references, strict=True)]
    return {name: 100.0 * sum(each[name].fmeasure for each in found) / len(found) for name in names}


def bleu_significance(
    hypotheses: Texts, baseline: Texts, references: Sequence[Texts], samples: int = 1000, **options: Any
) -> dict[str, Any]:
    """Compare two systems by paired bootstrap (Koehn 2004), sacrebleu's own, with its seed 12345.

    Args:
        hypotheses: detokenised translations of the system.
        baseline: those of the baseline.
        references: lists of references, each as long as the hypotheses.
        samples: number of bootstrap samples, >= 1.
        options: of sacrebleu's ``BLEU``.

    Returns:
        ``bleu`` and ``baseline_bleu``; ``p``: how likely a difference of this size is by chance, 1 if all texts are the
        same; ``mean`` and ``interval``: mean and half width of the 95 % interval of the system's BLEU; ``signature``.
    """
    from sacrebleu import BLEU
    from sacrebleu.significance import PairedTest

    _check_references(hypotheses, references)
    check_lengths(hypotheses=hypotheses, baseline=baseline)
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    systems: list[Any] = [("baseline", list(baseline)), ("system", list(hypotheses))]
    wanted = [list(each) for each in references]
    test: Any = PairedTest(systems, {"BLEU": BLEU(**options)}, references=wanted, test_type="bs", n_samples=samples)
    signatures, results = test()
    first, second = results["BLEU"]
    # sacrebleu counts the samples that differ by more than the systems do, which here none can.
    p = 1.0 if list(hypotheses) == list(baseline) else float(second.p_value)
    return {
        "bleu": float(second.score), "baseline_bleu": float(first.score), "p": p,
        "mean": float(second.mean), "interval": float(second.ci), "signature": str(signatures["BLEU"]),
    }  # fmt: skip


def _check_references(hypotheses: Texts, references: Sequence[Texts]) -> None:
    if not references or isinstance(references[0], str):
        raise ValueError("references must be a list of lists, each as long as the hypotheses")
    check_lengths(hypotheses=hypotheses, **{f"references[{n}]": each for n, each in enumerate(references)})
