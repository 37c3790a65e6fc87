"""Corruptions, robustness and sharpness against the closed forms of quadratics and of linear losses."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import brentq

from fairseq_sam import PRESETS
from fairseq_sam.analysis.corruption import ball, corrupted
from fairseq_sam.analysis.objective import Objective
from fairseq_sam.analysis.robustness import RADII, robustness
from fairseq_sam.analysis.sharpness import adversarial_risk, ascent_sharpness, average_sharpness, worst_sharpness
from tests.analysis.models import (
    Logistic,
    Network,
    Quadratic,
    classes_data,
    classes_loss,
    cut,
    logistic_data,
    logistic_loss,
    quadratic_loss,
    random_quadratic,
)


def worst_of_quadratic(model, radius):
    """max of (w + a)' A (w + a) / 2 over |a| <= radius: (mu - A) a = A w with mu above A's largest eigenvalue."""
    values, vectors = torch.linalg.eigh(model.A)
    w = vectors.T @ model.w.detach()

    def length(mu):
        return float(torch.linalg.vector_norm(values * w / (mu - values)))

    top = float(values[-1])
    mu = brentq(lambda mu: length(mu) - radius, top * (1 + 1e-12), top * 1e6, xtol=1e-14)
    moved = w + values * w / (mu - values)
    return float(0.5 * (values * moved * moved).sum())


def test_worst_direction_of_a_quadratic():
    model = random_quadratic()
    found = worst_sharpness(model, [2.0, 1.0], quadratic_loss, epsilon=0.5, steps=200)
    worst = worst_of_quadratic(model, 0.5)
    assert worst * (1 - 1e-3) < found.perturbed_loss < worst * (1 + 1e-12)
    ascent = ascent_sharpness(model, [2.0, 1.0], quadratic_loss, epsilon=0.5)
    average = average_sharpness(model, [2.0, 1.0], quadratic_loss, epsilon=0.5)
    assert average.sharpness < ascent.sharpness < found.sharpness


def test_worst_direction_in_a_box():
    """A separable convex loss is largest in the corner that the gradient points to."""
    model = Quadratic(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)), torch.tensor([1.0, -2.0]).double())
    found = worst_sharpness(model, [1.0], quadratic_loss, epsilon=0.25, norm="linf", steps=4)
    assert found.perturbed_loss == pytest.approx(0.5 * 1.25**2 + 2 * 2.25**2, rel=1e-14)


def test_average_direction_of_a_quadratic():
    """E of the rise at a minimum is trace(A) eps^2 / (2 n)."""
    A = torch.diag(torch.tensor([1.0, 2.0, 6.0, 0.5], dtype=torch.float64))
    model = Quadratic(A, torch.zeros(4, dtype=torch.float64))
    found = average_sharpness(model, [1.0], quadratic_loss, epsilon=0.3, directions=2000)
    assert abs(found.sharpness - 9.5 * 0.09 / 8) < 4 * found.error and found.error < 0.0015
    assert math.isnan(average_sharpness(model, [1.0], quadratic_loss, epsilon=0.3, directions=1).error)
    same = [average_sharpness(model, [1.0], quadratic_loss, epsilon=0.3, seed=s).perturbed_loss for s in (1, 1, 100)]
    assert same[0] == same[1] != same[2]


def test_risk_of_each_instance():
    """A linear loss rises by eps times the norm of the instance's own gradient."""
    x, _ = logistic_data(6, 5)
    model = Logistic(torch.ones(5, dtype=torch.float64))

    def linear(model, batch):
        return (batch[0] @ model.w).sum(), float(len(batch[0]))

    found = adversarial_risk(model, cut((x,), *[1] * 6), linear, epsilon=0.1)
    assert found.loss == pytest.approx(float((x @ model.w.detach()).mean()), rel=1e-12)
    assert found.sharpness == pytest.approx(0.1 * float(x.norm(dim=1).mean()), rel=1e-12)
    scaled = adversarial_risk(model, cut((x,), *[1] * 6), linear, epsilon=0.1, method=PRESETS["asam"])
    assert scaled.sharpness == pytest.approx(0.1 * float((x * model.w.detach()).norm(dim=1).mean()), rel=1e-12)
    together = ascent_sharpness(model, [(x,)], linear, epsilon=0.1)
    assert together.sharpness == pytest.approx(0.1 * float(x.mean(0).norm()), rel=1e-12)


def test_risk_is_above_that_of_the_batch():
    model, data = Network(), classes_data()
    alone = adversarial_risk(model, cut(data, *[1] * 12), classes_loss, epsilon=0.05, steps=5)
    assert alone.sharpness > worst_sharpness(model, [data], classes_loss, epsilon=0.05, steps=5).sharpness
    assert alone.loss == pytest.approx(Objective(model, [data], classes_loss).loss())


@pytest.mark.parametrize("norm", ["l2", "linf", 3.0])
def test_a_corruption_stays_in_the_ball(norm):
    objective = Objective(Network(), cut(classes_data(), 5, 7), classes_loss)
    before = [parameter.detach().clone() for parameter in objective.parameters]
    with corrupted(objective, ball(0.2, norm, 7)) as found:
        moved = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(objective.parameters, before, strict=True)])
    order = {"l2": 2.0, "linf": math.inf}.get(norm, norm)
    assert float(torch.linalg.vector_norm(moved, order)) == pytest.approx(found.norm, rel=1e-12)
    assert 0.199 < found.norm <= 0.2 * (1 + 1e-12) and len(found.losses) == 7
    assert sorted(found.losses)[0] == found.losses[0]
    assert all(torch.equal(p, b) for p, b in zip(objective.parameters, before, strict=True))


def test_adaptive_sharpness_does_not_see_the_scale_of_relu_layers():
    """T = |w| makes the sharpness equal for equal functions: rows of a ReLU layer times c, next columns over c."""
    model, data = Network(), [classes_data()]
    model.norm = torch.nn.Identity()
    model.forward = lambda x: model.last(torch.relu(model.first(x)))
    factors = torch.tensor([0.1, 3.0, 1.0, 20.0, 0.5, 2.0], dtype=torch.float64)

    def measure(preset):
        return ascent_sharpness(model, data, classes_loss, epsilon=0.05, method=PRESETS[preset]).sharpness

    before = {preset: measure(preset) for preset in ("sam", "asam")}
    with torch.no_grad():
        model.first.weight.mul_(factors[:, None])
        model.first.bias.mul_(factors)
        model.last.weight.div_(factors)
    assert measure("asam") == pytest.approx(before["asam"], rel=1e-10)
    assert measure("sam") != pytest.approx(before["sam"], rel=0.05)


def test_robustness_rows():
    model, seen = random_quadratic(), []
    objective = Objective(model, [1.0], quadratic_loss)
    start, progress = model.w.detach().clone(), []

    def score():
        seen.append(model.w.detach().clone())
        return {"first": float(model.w[0].detach())}

    rows = []
    for row in robustness(
        objective,
        radii={"l2": [0.1, 0.4], "linf": [0.2]},
        steps=3,
        score=score,
        progress=lambda *n: progress.append(n),
    ):
        assert torch.equal(model.w, start), "between two rows as well"
        rows.append(row)
    assert [(row.norm, row.radius) for row in rows] == [("", 0.0), ("l2", 0.1), ("l2", 0.4), ("linf", 0.2)]
    assert torch.equal(seen[0], start) and torch.equal(model.w, start)
    for row, w in zip(rows, seen, strict=True):
        assert row.loss == pytest.approx(float(0.5 * w @ model.A @ w), rel=1e-12)
        assert row.scores == {"first": float(w[0])}
        order = math.inf if row.norm == "linf" else 2.0
        assert row.reached == pytest.approx(float(torch.linalg.vector_norm(w - start, order)), abs=1e-12)
    assert rows[0].loss < rows[1].loss < rows[2].loss
    assert progress == [(i, 13) for i in range(1, 14)]


def test_the_default_radii_are_those_of_the_paper():
    assert RADII == {"l2": (0.05, 0.1, 0.2), "linf": (0.0001, 0.0002, 0.0005)}


def test_weights_come_back_when_scoring_fails():
    model, calls = random_quadratic(), []
    start = model.w.detach().clone()

    def score():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("boom")
        return {}

    with pytest.raises(RuntimeError, match="boom"):
        list(robustness(Objective(model, [1.0], quadratic_loss), score=score))
    assert torch.equal(model.w, start)


def test_a_minimum_has_no_direction():
    model = Quadratic(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    found = worst_sharpness(model, [1.0], quadratic_loss, epsilon=0.1, steps=3)
    assert (found.loss, found.sharpness) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ball(0.0), "epsilon must be a finite number > 0, got 0.0"),
        (lambda: ball(math.nan), "epsilon must be a finite number > 0, got nan"),
        (lambda: ball("auto"), "epsilon must be a finite number > 0, got 'auto'"),
        (lambda: ball(0.1, "l1"), "must be l2, linf or a number > 1, got 'l1'"),
        (lambda: ball(0.1, "l2", 0), "must be an integer >= 1, got 0"),
        (lambda: ball(0.1, base=PRESETS["freelb"]), "must move all weights .* got freelb"),
        (lambda: ball(0.1, base=PRESETS["random_sam"]), "must move all weights .* got random_sam"),
        (lambda: ball(0.1, base=replace(PRESETS["sam"], mask="fisher")), "must move all weights .* got sam"),
        (
            lambda: average_sharpness(random_quadratic(), [1.0], quadratic_loss, epsilon=0.1, directions=0),
            "directions must be an integer >= 1, got 0",
        ),
        (
            lambda: adversarial_risk(random_quadratic(), [], quadratic_loss, epsilon=0.1),
            "at least one instance with a positive weight",
        ),
        (
            lambda: adversarial_risk(Logistic(torch.ones(2)), [], logistic_loss, epsilon=-1),
            "epsilon must be a finite number > 0, got -1",
        ),
    ],
)
def test_bad_values(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_way_that_is_lost_is_not_the_unmoved_model():
    """A gradient that is not finite ends it: the loss is infinite then, and not that of the model as it is."""
    model = random_quadratic()

    def loss_sum(model, batch):
        loss, weight = quadratic_loss(model, batch)
        return (loss * math.nan if float((model.w - start).norm()) > 5.0 else loss), weight

    start = model.w.detach().clone()
    clean, near, far = robustness(Objective(model, [1.0], loss_sum), radii={"l2": [0.1, 50.0]}, steps=3)
    assert clean.loss < near.loss < math.inf and near.reached == pytest.approx(0.1)
    assert math.isnan(far.reached) and far.loss == math.inf and torch.equal(model.w, start)
    for steps in (1, 3):
        found = worst_sharpness(model, [1.0], loss_sum, epsilon=50.0, steps=steps)
        assert found.sharpness == math.inf and found.loss == pytest.approx(clean.loss)
