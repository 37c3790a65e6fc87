"""Scores of texts against values worked out by hand, and at the edges."""

import pytest
from sacrebleu import corpus_bleu

from scripts.recipes import scores


def test_rouge():
    """Hypothesis of 4 words, reference of 5: 3 shared words, 2 shared pairs, the longest common run of 3."""
    found = scores.rouge(["the cat sat here"], ["the cat sat on mats"])
    assert found["rouge1"] == pytest.approx(100 * 2 * 3 / 9)
    assert found["rouge2"] == pytest.approx(100 * 2 * 2 / 7)
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(100 * 2 * 3 / 9)
    assert scores.rouge(["running"], ["run"])["rouge1"] == 100.0
    assert scores.rouge(["running"], ["run"], stemmed=False)["rouge1"] == 0.0


def test_rouge_is_the_mean_over_texts():
    found = scores.rouge(["a b", "c d"], ["a b", "e f"])
    assert found == {"rouge1": 50.0, "rouge2": 50.0, "rougeL": 50.0, "rougeLsum": 50.0}


def test_rouge_l_by_sentence():
    """The sentences are swapped: as one text half of the words are in order, by sentence all are found."""
    found = scores.rouge(["one two three\nfour five six"], ["four five six\none two three"])
    assert found["rougeL"] == pytest.approx(50.0) and found["rougeLsum"] == pytest.approx(100.0)


def test_significance():
    references = [f"the cat number {n} sat on the old mat today ." for n in range(40)]
    worse = [line.replace("old mat", "new hat") if n % 2 else line for n, line in enumerate(references)]
    found = scores.bleu_significance(references, worse, [references], samples=100)
    assert found["bleu"] == pytest.approx(100.0) and found["baseline_bleu"] < 90
    assert found["baseline_bleu"] == pytest.approx(corpus_bleu(worse, [references]).score)
    assert found["p"] < 0.05 and "bs:100" in found["signature"] and "seed:12345" in found["signature"]
    assert found == scores.bleu_significance(references, worse, [references], samples=100), "the seed is fixed"
    assert scores.bleu_significance(worse, worse, [references], samples=20)["p"] == 1.0
    slightly = [worse[0].replace("cat", "dog"), *worse[1:-1], worse[-1].replace("new hat", "old mat")]
    assert scores.bleu_significance(slightly, worse, [references], samples=100)["p"] > 0.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scores.rouge([], []), "0 predictions, 0 references"),
        (lambda: scores.rouge(["a"], ["a", "b"]), "1 predictions, 2 references"),
        (lambda: scores.bleu_significance(["a"], ["b"], [["a", "b"]]), r"1 hypotheses, 2 references\[0\]"),
        (lambda: scores.bleu_significance(["a"], ["b"], ["a"]), "references must be a list of lists"),
        (lambda: scores.bleu_significance(["a"], ["b"], []), "references must be a list of lists"),
        (lambda: scores.bleu_significance(["a"], ["a", "b"], [["a"]]), "1 hypotheses, 2 baseline"),
        (lambda: scores.bleu_significance(["a"], ["b"], [["a"]], samples=0), "samples must be >= 1, got 0"),
    ],
)
def test_lists_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()
