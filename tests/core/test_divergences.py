"""Closed forms of the divergences, in float64."""

import math

import pytest
import torch

from fairseq_sam.core.divergences import NUM_DIRECTIONS, squared_error, symmetric_kl
from fairseq_sam.core.tensors import at_least_float32


def log_probs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_symmetric_kl_of_two_coins():
    p, q = log_probs([0.8, 0.2], [0.5, 0.5]), log_probs([0.5, 0.5], [0.1, 0.9])
    one = 0.8 * math.log(1.6) + 0.2 * math.log(0.4) + 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    other = 0.4 * math.log(9)
    assert symmetric_kl(p, q).item() == pytest.approx(one + other, rel=1e-14)
    assert symmetric_kl(p, p).item() == 0.0
    assert symmetric_kl(p, q).item() == symmetric_kl(q, p).item()


def test_gradient_of_symmetric_kl():
    """With respect to logits: KL(p || q) gives p (log p - log q - KL(p || q)), KL(q || p) gives p - q."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    log_q = torch.randn(3, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    (found,) = torch.autograd.grad(symmetric_kl(logits.log_softmax(-1), log_q), logits)
    log_p = logits.detach().log_softmax(-1)
    p, difference = log_p.exp(), log_p - log_q
    forward = (p * difference).sum(-1, keepdim=True)
    torch.testing.assert_close(found, p * (difference - forward) + p - log_q.exp(), rtol=1e-12, atol=1e-14)


def test_small_differences_are_not_lost():
    """To second order the symmetric divergence is the variance of the change of the logits; float32 keeps it."""
    logits = torch.tensor([[0.3, -0.2, 0.5]])
    change = torch.tensor([[1.0, -2.0, 0.5]]) * 1e-3
    p = logits.softmax(-1)
    variance = ((p * change.square()).sum() - (p * change).sum().square()).item()
    found = symmetric_kl(logits.log_softmax(-1), (logits + change).log_softmax(-1)).item()
    assert found == pytest.approx(variance, rel=2e-3)


def test_squared_error_sums_over_instances():
    first, second = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([0.5, 2.0, 7.0])
    assert squared_error(first, second).item() == 0.25 + 9.0


@pytest.mark.parametrize("divergence", NUM_DIRECTIONS)
def test_half_precision_is_computed_in_single(divergence):
    first, second = torch.randn(2, 4, 300).log_softmax(-1).half()
    found = divergence(first, second)
    assert found.dtype == torch.float32 and torch.equal(found, divergence(first.float(), second.float()))
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
