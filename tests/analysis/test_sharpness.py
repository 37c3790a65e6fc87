"""Ascent-direction sharpness against its closed form on a quadratic."""

import math

import pytest
import torch
from torch import nn

from fairseq_sam.analysis import ascent_sharpness


class Quadratic(nn.Module):
    """``w' A w / 2``."""

    def __init__(self) -> None:
        super().__init__()
        self.A = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))


def loss_sum(model: Quadratic, batch: float):
    return batch * 0.5 * model.w @ model.A @ model.w, batch


@pytest.mark.parametrize("norm", ["l2", "linf", 3.0])
def test_quadratic(norm):
    model = Quadratic().train()
    before = model.w.detach().clone()
    g = model.A @ before
    x = {"l2": g / g.norm(), "linf": g.sign()}.get(norm)
    if x is None:
        x = g.sign() * g.abs().sqrt()
        x = x / torch.linalg.vector_norm(x, 3.0)
    moved = before + 0.3 * x
    expected = float(0.5 * moved @ model.A @ moved - 0.5 * before @ model.A @ before)
    found = ascent_sharpness(model, [1.0, 2.0, 5.0], loss_sum, epsilon=0.3, norm=norm)
    assert found.sharpness == pytest.approx(expected, rel=1e-12)
    assert torch.equal(model.w, before) and model.training


def test_weights_come_back_after_an_error():
    model, calls = Quadratic(), []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("boom")
        return loss_sum(model, batch)

    before = model.w.detach().clone()
    with pytest.raises(RuntimeError, match="boom"):
        ascent_sharpness(model, [1.0], failing, epsilon=0.3)
    assert torch.equal(model.w, before)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_bad_radius(epsilon):
    with pytest.raises(ValueError, match="epsilon must be a finite number > 0"):
        ascent_sharpness(Quadratic(), [1.0], loss_sum, epsilon=epsilon)


def test_no_data():
    with pytest.raises(ValueError, match="positive total weight"):
        ascent_sharpness(Quadratic(), [], loss_sum, epsilon=1.0)
