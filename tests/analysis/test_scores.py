"""Scores of classes and numbers against values worked out by hand, and at the edges."""

import json
import math

import pytest

from fairseq_sam.analysis import scores

# Of a, b, c: 3 right of 5.
FOUND = ["a", "a", "b", "c", "b"]
WANTED = ["a", "b", "b", "c", "c"]


def test_accuracy():
    assert scores.accuracy(FOUND, WANTED) == 60.0
    assert scores.accuracy([1, 0], [1, 0]) == 100.0 and scores.accuracy([1], [0]) == 0.0


def test_f1_of_one_class():
    """Class b: 1 right of 2 found, of 2 wanted; class a: 1 of 2, of 1."""
    assert scores.f1(FOUND, WANTED, "b") == pytest.approx(50.0)
    assert scores.f1(FOUND, WANTED, "a") == pytest.approx(100 * 2 / 3)
    assert scores.f1(["1", "1", "0"], ["1", "0", "0"]) == pytest.approx(100 * 2 / 3)


def test_f1_where_a_class_is_missing():
    assert scores.f1(["0", "0"], ["1", "0"]) == 0.0
    assert scores.f1(["1", "0"], ["0", "0"]) == 0.0
    assert scores.f1(["0", "0"], ["0", "0"]) == 0.0
    assert scores.f1(["1", "1"], ["1", "1"]) == 100.0


def test_macro_f1():
    """F1 of a 2/3, of b 1/2, of c 2/3 (1 of 1 found, of 2 wanted)."""
    assert scores.macro_f1(FOUND, WANTED) == pytest.approx(100 * (2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert scores.macro_f1(FOUND, WANTED, labels=["a", "b", "c", "d"]) == pytest.approx(
        100 * (2 / 3 + 1 / 2 + 2 / 3) / 4
    )
    assert scores.macro_f1(["a", "a"], ["a", "b"]) == pytest.approx(100 * (2 / 3) / 2), "b is never found"
    assert scores.macro_f1(["a", "a"], ["a", "a"]) == 100.0


def test_means():
    found = scores.accuracy_and_f1(["1", "1", "0"], ["1", "0", "0"])
    assert found == pytest.approx({"accuracy": 200 / 3, "f1": 200 / 3, "accuracy_f1": 200 / 3})
    assert scores.accuracy_and_f1(["1", "1"], ["1", "0"])["accuracy_f1"] == pytest.approx((50 + 200 / 3) / 2)
    assert scores.accuracy_and_macro_f1(FOUND, WANTED)["accuracy_macro_f1"] == pytest.approx((60 + 100 * 11 / 18) / 2)


def test_matthews():
    """tp 2, tn 1, fp 1, fn 1: (2 - 1) / sqrt(3 * 3 * 2 * 2)."""
    found, wanted = ["1", "1", "1", "0", "0"], ["1", "1", "0", "1", "0"]
    assert scores.matthews(found, wanted) == pytest.approx(100 / 6)
    assert scores.matthews(wanted, wanted) == pytest.approx(100.0)
    assert scores.matthews(["1", "0"], ["0", "1"]) == pytest.approx(-100.0)


def test_matthews_of_a_single_class():
    for found, wanted in ((["1", "1"], ["1", "0"]), (["1", "0"], ["1", "1"]), (["1", "1"], ["1", "1"])):
        assert scores.matthews(found, wanted) == 0.0


def test_correlations():
    """Ranks 1 2 3 4 and 1 2 4 3 have squared differences 2: 1 - 6 * 2 / (4 * 15)."""
    found, wanted = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 9.0, 8.0]
    covariance = sum((a - 2.5) * (b - 5) for a, b in zip(found, wanted, strict=True))
    expected = covariance / math.sqrt(5 * sum((b - 5) ** 2 for b in wanted))
    assert scores.pearson(found, wanted) == pytest.approx(100 * expected)
    assert scores.spearman(found, wanted) == pytest.approx(80.0)
    both = scores.pearson_and_spearman(found, wanted)
    assert both["pearson_spearman"] == pytest.approx((100 * expected + 80) / 2)
    assert scores.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(100 * math.sqrt(3) / 2), "ties have mean ranks"


def test_correlations_of_a_constant():
    assert math.isnan(scores.pearson([2.0, 2.0], [1.0, 3.0])) and math.isnan(scores.spearman([1.0, 3.0], [2.0, 2.0]))
    assert math.isnan(scores.pearson_and_spearman([0.5], [1.0])["pearson_spearman"])


@pytest.mark.parametrize("name", scores.METRICS)
def test_every_score_by_name(name):
    found, wanted = (
        ([1.0, 2.0, 4.0], [1.0, 3.0, 2.0]) if "earson" in name or "spear" in name else (["1", "0"], ["1", "1"])
    )
    value = scores.METRICS[name](found, wanted, "1")
    assert type(value) is float and json.dumps(value) and -100 <= value <= 100
    for one, other in (([], []), (found, wanted[:1]), (found[:1], wanted)):
        with pytest.raises(ValueError, match=rf"{len(one)} predictions, {len(other)} references"):
            scores.METRICS[name](one, other, "1")
