"""Every choice on an axis goes with every choice on another, or is refused with the reason."""

import itertools
import random

import numpy as np
import pytest
import torch

from fairseq_sam import PRESETS, Method, SharpnessAware
from fairseq_sam.core.axes import CHOICES
from fairseq_sam.core.contradictions import CONTRADICTIONS
from tests.core.models import batch, feed, flat, reader

# What a choice needs beside it, and numbers that are axes too.
ALSO = {"gradient": {"step_size": 0.1}, "fisher": {"fisher_samples": 3}, "reuse": {"interval": 2}}
AXES: dict[str, tuple] = {
    **CHOICES,
    "norm": ("l2", "linf", 3.0),
    "steps": (1, 2),
    "m": (1, 3),
    "ascent_fraction": (1.0, 0.5),
    "epsilon_min": (None, 0.05),
    "exclude": ("", "bias"),
}


def options_of(choices: dict) -> dict:
    options = {axis: choice for axis, choice in choices.items() if choice is not None}
    for choice in choices.values():
        options.update(ALSO.get(choice, {}) if isinstance(choice, str) else {})
    return {**options, "epsilon": 0.1}


def runs_or_is_refused(preset: str, choices: dict) -> bool:
    """Whether two steps ran; if not, the reason names flags and values."""
    options = options_of(choices)
    try:
        method = Method.from_preset(preset, **options)
    except ValueError as error:
        assert str(error).count("--sam-") >= 2, error
        return False
    model = reader()
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.05), model, method=preset, **options)
    before = flat(model.parameters())
    for number in range(2):
        sam.step(feed(method, model, batch(number)))
    after = flat(model.parameters())
    assert np.isfinite(after).all() and not np.array_equal(before, after) and sam.num_skipped == 0
    assert not model.embedding._forward_hooks, "no hook stays"
    return True


PAIRS = [
    (first, second)
    for first, second in itertools.combinations(AXES, 2)
    if not {first, second} <= {"granularity", "where"}  # a sentence is refused without the other: see below
]


@pytest.mark.parametrize("preset", PRESETS)
def test_pairs_of_choices(preset):
    """All pairs on this preset; most of them run."""
    outcomes = []
    for first, second in PAIRS:
        for one, other in itertools.product(AXES[first], AXES[second]):
            if preset != "sam" and random.Random(f"{preset}{first}{second}{one}{other}").random() > 0.08:
                continue  # all pairs on SAM, a twelfth of them on each other preset
            outcomes.append(runs_or_is_refused(preset, {first: one, second: other}))
    assert len(outcomes) > (800 if preset == "sam" else 50)
    assert sum(outcomes) > 0.3 * len(outcomes)


def test_choices_on_all_axes_at_once():
    """Far more combinations than anybody names; the refused ones say why."""
    rng, ran = random.Random(0), 0
    for _ in range(1500):
        choices = {axis: rng.choice(values) for axis, values in AXES.items()}
        if rng.random() < 0.8:  # mostly without what belongs to embeddings
            choices.update(where="weights", init="zero")
            choices["granularity"] = rng.choice(["element", "filter", "tensor", "layer", "model"])
        ran += runs_or_is_refused("sam", choices)
    assert ran > 60


def test_every_contradiction_names_two_choices_and_a_way_out():
    method = Method.from_preset("sam")
    for refused in CONTRADICTIONS:
        reason = refused.reason.format(m=method)
        assert reason.count("--sam-") >= 2, reason
        assert any(word in reason for word in ("use --sam", "needs", "must be", "give", "belongs to")), reason
