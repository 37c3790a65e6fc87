"""Algebra that holds for all numbers: projections, balls, scale invariances, the order of parameters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_sam import SharpnessAware
from fairseq_sam.core.groups import Groups
from fairseq_sam.core.norms import vector_norm
from fairseq_sam.core.scales import SCALES
from fairseq_sam.core.vectors import Ball, Vector
from tests.core.models import scale_of

NORMS = st.sampled_from([1.01, 1.5, 2.0, 3.0, 10.0, math.inf])
NUMBERS = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6))
MAGNITUDES = st.floats(1e-6, 1e6)
GRANULARITIES = st.sampled_from(["element", "filter", "tensor", "layer", "model"])
SHAPES = st.lists(st.sampled_from([(), (1,), (5,), (2, 3), (4, 1, 2)]), min_size=1, max_size=4)
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def tensors(draw, shapes=None):
    """A list of float64 tensors, not all 0."""
    shapes = draw(SHAPES) if shapes is None else shapes
    found = []
    for shape in shapes:
        number = math.prod(shape)
        values = draw(st.lists(NUMBERS, min_size=number, max_size=number))
        found.append(torch.tensor(values, dtype=torch.float64).view(shape))
    if not any(t.any() for t in found):
        found[0] = torch.ones_like(found[0])
    return found


def copies(values):
    return [value.clone() for value in values]


def steepest(gradient, p):
    return Ball(p).steepest_(Vector(copies(gradient))).numbers()


def norm(values, p):
    return float(vector_norm(values, p))


@EXAMPLES
@given(tensors(), NORMS, MAGNITUDES)
def test_projection_is_inside_idempotent_and_leaves_the_inside_alone(values, p, radius):
    ball = Ball(p, radius)
    once = ball.project_(Vector(copies(values))).numbers()
    assert norm(once, p) <= radius * (1 + 1e-9)
    twice = ball.project_(Vector(copies(once))).numbers()
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    if norm(values, p) <= radius * (1 - 1e-9):
        assert all(torch.equal(a, b) for a, b in zip(once, values, strict=True))


@EXAMPLES
@given(tensors(), NORMS)
def test_the_steepest_direction_has_norm_one_and_the_dual_norm_as_slope(values, p):
    """Hölder: of all directions of p-norm 1 it has the largest inner product with the gradient, the dual norm."""
    largest = max(float(v.abs().max()) for v in values if v.numel())
    gradient = [v / largest for v in values]
    direction = steepest(gradient, p)
    assert norm(direction, p) == pytest.approx(1.0, rel=1e-8)
    slope = sum(float((d * g).sum()) for d, g in zip(direction, gradient, strict=True))
    dual = 1.0 if p == math.inf else p / (p - 1)
    assert slope == pytest.approx(norm(gradient, dual), rel=1e-6)


@EXAMPLES
@given(tensors(), NORMS, MAGNITUDES)
def test_the_direction_does_not_depend_on_the_gradient_s_size(values, p, factor):
    first, second = steepest(values, p), steepest([v * factor for v in values], p)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@EXAMPLES
@given(tensors(), NORMS, MAGNITUDES, st.lists(MAGNITUDES, min_size=4, max_size=4), st.data())
def test_factors_that_are_multiplied_in_late_change_nothing(values, p, radius, factors, data):
    """Norms, directions, projections and sums of a vector with factors are those of the products."""
    plain = [value * factor for value, factor in zip(values, factors, strict=False)]
    other = data.draw(tensors([value.shape for value in values]))
    length, signs = norm(plain, p), [value.sign() for value in plain]
    shrunk = [value * min(1.0, radius / length) for value in plain]
    clipped = [value.clamp(-radius, radius) for value in plain]
    largest = max(float(value.abs().max()) for value in plain if value.numel())
    powers = [v.sign() * (v.abs() / largest) ** (1 / (p - 1)) for v in plain] if p != math.inf else signs
    directions = [value / (1.0 if p == math.inf else norm(powers, p)) for value in powers]

    def lazy():
        scale = torch.tensor(factors[: len(values)], dtype=torch.float64)
        vector = Vector(values, owned=False)
        assert float(vector.norm(2.0)) == pytest.approx(norm(values, 2.0))
        return vector.scale_(scale)

    assert float(lazy().norm(p)) == pytest.approx(length, rel=1e-9)
    for found, expected in (
        (lazy(), plain),
        (lazy().sign_(), signs),
        (Ball(p).steepest_(lazy()), directions),
        (Ball(p, radius).project_(lazy()), clipped if p == math.inf else shrunk),
        (Ball(p, radius).project_(Ball(p).steepest_(lazy())), [value * min(1.0, radius) for value in directions]),
        (lazy().add_(Vector(other, owned=False).scale_(3.0)), [a + 3.0 * b for a, b in zip(plain, other, strict=True)]),
        (lazy().scale_(copies(other)), [a * b for a, b in zip(plain, other, strict=True)]),
    ):
        assert norm(expected, 2.0) == pytest.approx(float(found.shared().norm(2.0)), rel=1e-8)
        for a, b in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12 * max(1.0, largest))
        for a, b in zip(found.numbers(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12 * max(1.0, largest))


@EXAMPLES
@given(st.data(), GRANULARITIES, st.sampled_from(sorted(SCALES)), MAGNITUDES)
def test_scales_are_homogeneous(data, granularity, name, factor):
    """T of weights c w is c^j T, and T of gradients c g is c^-k T, with j and k of the formula."""
    if SCALES[name].element_only:
        granularity = "element"
    shapes = data.draw(SHAPES)
    weights, gradients = data.draw(tensors(shapes)), data.draw(tensors(shapes))
    groups = Groups(granularity, list(range(len(weights))))
    j = 1 if name.startswith("weight") else 0
    k = 1 if SCALES[name].gradient_based else 0
    plain = scale_of(name, groups, weights, gradients).factors
    scaled = scale_of(name, groups, [w * factor for w in weights], gradients).factors
    steeper = scale_of(name, groups, weights, [g * factor for g in gradients]).factors
    for a, b, c in zip(plain, scaled, steeper, strict=True):
        if a is not None:
            torch.testing.assert_close(b, a * factor**j, rtol=1e-9, atol=1e-300)
            torch.testing.assert_close(c, a * factor**-k, rtol=1e-9, atol=1e-300)


class Two(nn.Module):
    """The same four parameters, registered in one order or the other."""

    def __init__(self, names):
        super().__init__()
        layers = {name: nn.Linear(3, 3, dtype=torch.float64) for name in ("a", "b")}
        for number, name in enumerate(("a", "b")):
            with torch.no_grad():
                for p in layers[name].parameters():
                    p.copy_(torch.linspace(-1, 1.5 + number, p.numel(), dtype=torch.float64).view(p.shape).sin())
        for name in names:
            self.add_module(name, layers[name])

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@EXAMPLES
@given(
    st.sampled_from(["sam", "asam", "layer_sam", "multistep_defense", "ga_sam", "gsam", "awp", "model_perturbation"]),
    NORMS,
    st.floats(1e-3, 0.3),
)
def test_the_order_of_parameters_does_not_matter(preset, p, epsilon):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    found = []
    for names in ("ab", "ba"):
        model = Two(names)
        sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, preset, norm=p, epsilon=epsilon)

        def closure(model=model):
            loss = (model(x) - 1.0).square().mean()
            loss.backward()
            return loss

        sam.step(closure)
        found.append(dict(model.named_parameters()))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-12)
