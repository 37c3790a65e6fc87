"""Closed forms on a quadratic ``L(w) = w' A w / 2``, whose gradient is ``A w``, in float64."""

import math

import pytest
import torch
from torch import nn

from fairseq_sam import SharpnessAware

A = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 4.0]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class Quadratic(nn.Module):
    """A three-dimensional quadratic."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(START.clone())

    def forward(self) -> torch.Tensor:
        return 0.5 * self.w @ A @ self.w


def gradient_of(method: str, **options) -> torch.Tensor:
    model = Quadratic()
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=method, **options)

    def closure() -> torch.Tensor:
        loss = model()
        loss.backward()
        return loss

    loss = sam.accumulate(closure)
    assert float(loss) == float(0.5 * START @ A @ START), "the clean loss is returned"
    return model.w.grad


def test_sam_l2():
    g = A @ START
    torch.testing.assert_close(gradient_of("sam", epsilon=0.3), A @ (START + 0.3 * g / g.norm()), rtol=1e-14, atol=0)


def test_sam_linf():
    g = A @ START
    found = gradient_of("sam", epsilon=0.3, norm="linf")
    torch.testing.assert_close(found, A @ (START + 0.3 * g.sign()), rtol=1e-14, atol=0)


def test_asam_l2():
    g, T = A @ START, START.abs()
    expected = A @ (START + 0.3 * T**2 * g / (T * g).norm())
    torch.testing.assert_close(gradient_of("asam", epsilon=0.3), expected, rtol=1e-14, atol=0)


def test_layer_sam_l2():
    """With one layer, T = ||w|| / ||g|| is a number: a = epsilon T g / ||g||."""
    g = A @ START
    expected = A @ (START + 0.01 * START.norm() / g.norm() * g / g.norm())
    torch.testing.assert_close(gradient_of("layer_sam", epsilon=0.01), expected, rtol=1e-14, atol=0)


def test_ga_sam_linf_averages_both_gradients():
    """With one layer, T = 1 / ||g||, and the descent gradient is (A w + A (w + epsilon T sgn g)) / 2."""
    g = A @ START
    expected = A @ START + 0.5 * A @ (0.2 / g.norm() * g.sign())
    torch.testing.assert_close(gradient_of("ga_sam", epsilon=0.2), expected, rtol=1e-14, atol=0)


def test_multistep_defense_two_steps_l2():
    g0 = A @ START
    a1 = 0.75 * 0.3 * g0 / g0.norm()  # eta = 1.5 epsilon / 2
    g1 = A @ (START + a1)
    a2 = a1 + 0.75 * 0.3 * g1 / g1.norm()
    a2 = a2 * min(1.0, 0.3 / float(a2.norm()))
    expected = (g0 + g1 + A @ (START + a2)) / 3
    found = gradient_of("multistep_defense", epsilon=0.3, norm="l2", steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("p", [1.1, 1.5, 3.0, 10.0, 200.0])
def test_general_norm_is_the_steepest_direction(p):
    """a = epsilon x with ||x||_p = 1 and g . x = ||g||_q for the dual norm q, which no other x exceeds."""
    g = A @ START
    found = torch.linalg.solve(A, gradient_of("sam", epsilon=0.3, norm=p)) - START
    assert float(torch.linalg.vector_norm(found, p)) == pytest.approx(0.3, rel=1e-10)
    dual = torch.linalg.vector_norm(g, p / (p - 1))
    assert float(g @ found) == pytest.approx(0.3 * float(dual), rel=1e-10)


def test_norms_meet_at_infinity():
    torch.testing.assert_close(
        gradient_of("sam", epsilon=0.3, norm=1e6), gradient_of("sam", epsilon=0.3, norm=math.inf), rtol=1e-4, atol=0
    )
