"""The engine equals the papers' formulas in float64, over 100 steps and on every scale, granularity and norm."""

import math

import numpy as np
import pytest
import torch

from fairseq_sam import SharpnessAware
from fairseq_sam.core.axes import GRANULARITIES
from fairseq_sam.core.scales import SCALES
from tests import reference
from tests.core.models import SETTINGS, batch, closure_of, flat, gradient_at, groups_of, mlp

# The other presets are in test_method_twins.
WHOLE_BATCH = ("sam", "asam", "layer_sam", "multistep_defense", "ga_sam")
OPTIMIZERS = {
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.05), lambda: reference.SGD(0.05)),
    "adam": (lambda params: torch.optim.Adam(params, lr=0.01), lambda: reference.Adam(0.01)),
}


@pytest.mark.parametrize("norm", [2.0, math.inf, 3.0, 1.25])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("preset", WHOLE_BATCH)
def test_hundred_steps_equal_the_twin(preset, optimizer, norm):
    model, twin_model = mlp(), mlp()
    make, make_twin = OPTIMIZERS[optimizer]
    sam = SharpnessAware(make(model.parameters()), model, method=preset, norm=norm, **SETTINGS[preset])
    twin, w, method = make_twin(), flat(twin_model.parameters()), sam.method
    groups = groups_of(model, method.granularity)
    for step in range(100):
        data = batch(step)
        sam.step(closure_of(model, data))
        g, a = reference.method_gradient(
            w, gradient_at(twin_model, data), groups, scale=method.scale, p=norm, epsilon=method.epsilon,
            steps=method.steps, descent=method.descent, asam_eta=method.asam_eta,
        )  # fmt: skip
        assert reference.p_norm(a[-1], norm) == pytest.approx(float(sam.last_step.perturbation_norm), rel=1e-9)
        w = twin.step(w, g)
    np.testing.assert_allclose(flat(model.parameters()), w, rtol=1e-8, atol=1e-10)


COMBINATIONS = [
    (s, g) for s in SCALES for g in GRANULARITIES if g != "sentence" and (g == "element" or not SCALES[s].element_only)
]


@pytest.mark.parametrize("norm", [2.0, math.inf, 4.0])
@pytest.mark.parametrize(("scale", "granularity"), COMBINATIONS)
def test_every_scale_and_granularity_equals_the_twin(scale, granularity, norm):
    model, data = mlp(), batch(0)
    options = {"scale": scale, "granularity": granularity, "norm": norm, "steps": 3, "descent": "mean"}
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), model, method="sam", epsilon=0.05, **options)
    w = flat(model.parameters())
    sam.zero_grad()
    sam.accumulate(closure_of(model, data))
    expected, _ = reference.method_gradient(
        w, gradient_at(model, data), groups_of(model, granularity), scale=scale, p=norm, epsilon=0.05, steps=3,
        descent="mean",
    )  # fmt: skip
    np.testing.assert_allclose(flat(p.grad for p in model.parameters()), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradient", ["mean", "sum"])
@pytest.mark.parametrize("scale", reference.GRADIENT_BASED)
def test_gradient_unit_reaches_the_scale(scale, gradient):
    """`mean` divides the gradient by the sample size and the loss scale before T sees it, `sum` by the scale alone."""
    model, data, sample_size, loss_scale = mlp(), batch(0), 7.0, 128.0
    sam = SharpnessAware(
        torch.optim.SGD(model.parameters(), lr=0.0), model, method="sam", epsilon=0.01, scale=scale,
        granularity="layer", gradient=gradient, norm="linf",
    )  # fmt: skip
    w = flat(model.parameters())

    def closure():
        loss = (model(data[0]) - data[1]).square().mean() * loss_scale
        loss.backward()
        return loss

    sam.accumulate(closure, sample_size=sample_size, loss_scale=loss_scale)
    g, a = reference.method_gradient(
        w, gradient_at(model, data), groups_of(model, "layer"), scale=scale, p=math.inf, epsilon=0.01, steps=1,
        descent="last", unit=1.0 / sample_size if gradient == "mean" else 1.0,
    )  # fmt: skip
    np.testing.assert_allclose(flat(p.grad for p in model.parameters()), g * loss_scale, rtol=1e-9, atol=1e-12)
    assert float(sam.last_step.perturbation_norm) == pytest.approx(np.abs(a[-1]).max(), rel=1e-9)


def test_step_size_overrides_the_default():
    model, data = mlp(), batch(3)
    sam = SharpnessAware(
        torch.optim.SGD(model.parameters(), lr=0.0), model, method="multistep_defense", epsilon=0.05, steps=4,
        step_size=0.005, norm="l2",
    )  # fmt: skip
    w = flat(model.parameters())
    sam.accumulate(closure_of(model, data))
    expected, a = reference.method_gradient(
        w, gradient_at(model, data), groups_of(model, "model"), scale="one", p=2.0, epsilon=0.05, steps=4,
        descent="mean", step_size=0.005,
    )  # fmt: skip
    assert reference.p_norm(a[-1], 2.0) < 0.021, "four steps of 0.005 do not reach the radius"
    np.testing.assert_allclose(flat(p.grad for p in model.parameters()), expected, rtol=1e-9, atol=1e-12)
