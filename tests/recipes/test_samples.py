"""Samples of the training split: nested, one of each class at least, the same on every machine."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.recipes.samples import sample, sample_size

ANSWERS = ["a"] * 90 + ["b"] * 9 + ["c"]


@given(
    answers=st.lists(st.sampled_from("abc"), min_size=1, max_size=60),
    seed=st.integers(0, 100),
    has_classes=st.booleans(),
    data=st.data(),
)
def test_a_smaller_sample_is_within_a_larger_one(answers, seed, has_classes, data):
    least = len(set(answers)) if has_classes else 1
    sizes = data.draw(st.lists(st.integers(least, len(answers)), min_size=2, max_size=5))
    samples = [sample(answers, size, seed, has_classes) for size in sorted(sizes)]
    for smaller, larger in itertools.pairwise(samples):
        assert set(smaller) <= set(larger)
    for size, chosen in zip(sorted(sizes), samples, strict=True):
        assert len(set(chosen)) == len(chosen) == size and chosen == sorted(chosen)
        assert not has_classes or {answers[place] for place in chosen} == set(answers)
    assert sample(answers, len(answers), seed, has_classes) == list(range(len(answers)))


def test_the_sample_is_the_same_everywhere():
    """The order is that of `printf "1:$place" | sha256sum`: 72 30 71 90 39 49 29 …; 99 is the only one of its class."""
    assert sample(ANSWERS, 5, seed=1, has_classes=False) == [30, 39, 71, 72, 90]
    assert sample(ANSWERS, 8, seed=1) == [29, 30, 39, 49, 71, 72, 90, 99]
    assert sample(ANSWERS, 8, seed=2) == [17, 20, 70, 73, 78, 82, 95, 99]


def test_classes_keep_about_their_shares():
    chosen = sample(["a", "b"] * 5000, 1000, seed=7)
    assert 430 < sum(place % 2 for place in chosen) < 570
    assert chosen != sample(["a", "b"] * 5000, 1000, seed=8)


def test_sizes_of_rates():
    assert [sample_size(3668, rate, 2) for rate in (0.02, 0.05, 0.1, 0.9, 1.0)] == [73, 183, 367, 3301, 3668]
    assert sample_size(250, 0.02, 3) == 5 and sample_size(250, 0.001, 3) == 3
    assert sample_size(100, 0.29, 0) == 29, "0.29 * 100 is 28.999999999999996"
    assert sample_size(5, 0.01, 0) == 1 and sample_size(2, 0.5, 3) == 2


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, 5, float("nan")])
def test_rates_out_of_range(rate):
    with pytest.raises(ValueError, match=r"--rate must be in \(0, 1\], e.g. 0.05 for 5 %, got"):
        sample_size(100, rate, 2)


@pytest.mark.parametrize(("size", "words"), [(0, "0 cannot be taken"), (101, "from 100"), (2, "each of the 3 classes")])
def test_sizes_out_of_range(size, words):
    with pytest.raises(ValueError, match=words):
        sample(ANSWERS, size)
