"""The radius of a wanted rise: closed forms, every preset, and nothing left behind."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fairseq_sam import PRESETS, InstanceBatch, Method
from fairseq_sam.analysis.epsilon import Suggestion, method_probe, suggest_epsilon, with_epsilon
from fairseq_sam.core.batch import ClosureBatch
from tests.core.models import batch as data_batch
from tests.core.models import model_for


class Linear(nn.Module):
    """``b + w' x``."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def closure(self, x, offset=5.0, size=1.0):
        def run():
            loss = offset + self.w @ x
            (loss * size).backward()
            return loss

        return ClosureBatch(run, size)


def test_linear_loss_in_closed_form():
    model, x = Linear(), torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    loss = 5.0 + float(model.w.detach() @ x)
    for norm, slope in (("l2", 3.0), ("linf", 5.0)):
        probe = method_probe(model, [model.closure(x)], Method.from_preset("sam", norm=norm))
        assert probe(0.25) == pytest.approx((loss, loss + 0.25 * slope), rel=1e-12)
        found = suggest_epsilon(probe, fraction=0.2)
        assert found.epsilon == pytest.approx(0.2 * loss / slope, rel=1e-10)


def test_quadratic_rise():
    """Decades while the rise is negligible, then the finer grid, then the radius itself."""
    found = suggest_epsilon(lambda epsilon: (2.0, 2.0 + 3.0 * epsilon**2), fraction=0.15)
    assert found.epsilon == pytest.approx(math.sqrt(0.1), rel=1e-10)
    assert isinstance(found, Suggestion) and found.fraction == 0.15 and found.found in found.curve
    epsilons = [rise.epsilon for rise in found.curve]
    assert epsilons == sorted(epsilons) and epsilons[:6] == pytest.approx([10.0**k for k in range(-7, -1)])
    assert all(b / a < 10**0.25 * (1 + 1e-9) for a, b in pairwise(epsilons[5:])) and epsilons[-1] < 0.6


@pytest.mark.parametrize("slope", [0.07, 0.9, 5.0, 12.0])
@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 1.0])
def test_what_is_suggested_was_measured(slope, power, fraction):
    """Within 5 % of the wanted rise, on a curve that no power of epsilon describes."""
    found = suggest_epsilon(
        lambda e: (1.0, 1.0 + slope * e**power * (1 + 0.5 * math.sin(3 * math.log(e)))), fraction=fraction
    )
    assert found.found.relative == pytest.approx(fraction, rel=0.055)
    assert found.found.perturbed_loss == 1.0 + slope * found.epsilon**power * (
        1 + 0.5 * math.sin(3 * math.log(found.epsilon))
    )


def test_a_rise_that_falls_again():
    """The first place counts, also where the curve is below the wanted rise at the ends of the decade."""

    def loss(epsilon):
        return 1.0 + 0.2 * math.exp(-((math.log10(epsilon / 3e-3) * 4) ** 2)) + 0.02 * epsilon

    found = suggest_epsilon(lambda epsilon: (1.0, loss(epsilon)), fraction=0.1)
    assert loss(1e-3) < 1.1 and loss(1e-2) < 1.1
    assert found.found.relative == pytest.approx(0.1, rel=0.055) and 1e-3 < found.epsilon < 3e-3


def test_each_batch_has_its_own_perturbation_and_weight():
    """Along the mean gradient the loss would rise by less than along each batch's own."""
    model = Linear()
    x, y = torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([0.0, 2.0, 0.0]).double()
    probe = method_probe(model, [model.closure(x, 1.0, 1.0), model.closure(y, 2.0, 3.0)], PRESETS["sam"])
    clean = (1.0 + 0.3 + 3 * (2.0 - 0.4)) / 4
    assert probe(0.1) == pytest.approx((clean, clean + 0.1 * (1 + 3 * 2) / 4), rel=1e-12)


def test_the_scale_of_ga_sam_sees_the_gradients_unit():
    """T = 1 / |g| sees sums with --sam-gradient sum: larger gradients, smaller steps for the same epsilon."""
    model, x = Linear(), torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    rises = {}
    for gradient in ("mean", "sum"):
        method = Method.from_preset("ga_sam", gradient=gradient, steps=1)
        clean, moved = method_probe(model, [model.closure(x, size=8.0)], method)(0.1)
        rises[gradient] = moved - clean
    assert rises["mean"] == pytest.approx(8.0 * rises["sum"], rel=1e-10)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset):
    torch.manual_seed(0)
    model = model_for(preset).train()
    model.register_buffer("count", torch.zeros(1))
    x, y = data_batch(1)

    def losses(x, y):
        model.count += 1
        return (nn.functional.dropout(model(x), 0.1) - y).square().mean(1)

    batches = [InstanceBatch(losses, x, y), InstanceBatch(losses, *data_batch(2))]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    probe = method_probe(model, batches, Method.from_preset(preset))
    small, large = probe(1e-6), probe(0.3)
    assert probe(0.3) == large and small[0] == large[0]
    assert 0 < small[0] and abs(small[1] - small[0]) < 1e-3 < abs(large[1] - large[0])
    assert torch.equal(torch.get_rng_state(), state) and model.training and not model.count
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and torch.equal(parameter.grad, torch.ones_like(parameter))


def test_the_method_keeps_its_other_settings():
    method = with_epsilon(Method.from_preset("gsam", epsilon=0.3, epsilon_min=0.1, lr_max=1.0), 0.02)
    assert (method.epsilon, method.epsilon_min, method.descent, method.at(0.5).epsilon) == (0.02, None, "gsam", 0.02)
    esam = with_epsilon(PRESETS["esam"], 0.02)
    assert (esam.descent, esam.mask, esam.sparsity) == ("last", "random", 0.5)
    assert with_epsilon(PRESETS["model_perturbation"], 0.1).step_size == PRESETS["model_perturbation"].step_size


@pytest.mark.parametrize(
    ("rise", "low", "high"),
    [
        (lambda e: 1.0 + 1e-9 * e, None, None),  # never reached
        (lambda e: 3.0, None, None),  # more than that at once
        (lambda e: math.inf if e > 0.01 else 1.0 + e, 0.005, 0.01),  # the last finite one
        (lambda e: math.nan if e > 0.01 else 1.0 - e, None, None),  # no finite one rises
        (lambda e: 1.0 + (e > 0.02), 0.02, 0.04),
    ],
)
def test_unusual_curves(rise, low, high):
    found = suggest_epsilon(lambda epsilon: (1.0, rise(epsilon)))
    assert (found.epsilon is None) if low is None else low <= found.epsilon <= high


def test_progress_ends_at_its_total():
    seen = []
    suggest_epsilon(lambda epsilon: (1.0, 1.0 + epsilon), progress=lambda *n: seen.append(n))
    assert seen[-1][0] == seen[-1][1] < 20 and [n for n, _ in seen] == sorted(n for n, _ in seen)
    assert all(done < total for done, total in seen[:-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fraction": 0.0}, "fraction must be a finite number > 0, got 0.0"),
        ({"least": -1.0}, "least must be a finite number > 0, got -1.0"),
        ({"most": math.inf}, "most must be a finite number > 0, got inf"),
        ({"least": 1.0, "most": 0.1}, "most must be at least least = 1.0, got 0.1"),
        ({"per_decade": 0}, "per_decade must be an integer >= 1, got 0"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        suggest_epsilon(lambda epsilon: (1.0, 1.0), **options)


def test_bad_losses_and_batches():
    with pytest.raises(ValueError, match="the loss must be a finite number > 0, got nan"):
        suggest_epsilon(lambda epsilon: (math.nan, 1.0))
    with pytest.raises(ValueError, match="at least one batch, got none"):
        method_probe(Linear(), [], PRESETS["sam"])
    model = Linear()
    with pytest.raises(TypeError, match="needs single instances"):
        method_probe(model, [model.closure(torch.ones(3).double())], PRESETS["delta_sam"])(0.1)
