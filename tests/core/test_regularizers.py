"""The regularisers on a plain model: closed forms, and what they may not touch."""

import pytest
import torch
from torch import nn

from fairseq_sam.core.divergences import squared_error, symmetric_kl
from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.regularizers import R3F, REGULARIZERS, RDrop, Smart

WORDS = torch.tensor([[1, 2, 3], [4, 5, 0]])
TARGET = torch.tensor([0.7, -0.4], dtype=torch.float64)


class Regression(nn.Module):
    """``w . (o_1 + o_2 + o_3)``; 0 pads."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.words = nn.Embedding(6, 2, padding_idx=0, dtype=torch.float64)
        self.w = nn.Parameter(torch.tensor([0.6, -1.5], dtype=torch.float64))
        with torch.no_grad():
            self.words.weight.copy_(torch.randn(6, 2, generator=generator, dtype=torch.float64))

    def forward(self):
        return self.words(WORDS).sum(dim=1) @ self.w


class PlainPasses:
    divergence = staticmethod(squared_error)

    def __init__(self, model, second=None):
        self.model, self.second = model, second or model

    def repeat(self):
        prediction = self.second()
        return (prediction - TARGET).square().sum(), prediction

    def predict(self, perturb):
        with WordEmbeddings.of(self.model).perturbed(perturb):
            return self.model()


def first_pass(model):
    prediction = model()
    return (prediction - TARGET).square().sum(), prediction


def test_rdrop():
    model, other = Regression(), Regression()
    with torch.no_grad():
        other.w.mul_(1.1)
    loss, prediction = first_pass(model)
    found, term = RDrop(rdrop_alpha=0.3)(loss, prediction, PlainPasses(model, other))
    second = 1.1 * prediction
    expected = 0.3 * (0.1 * prediction).square().sum()
    torch.testing.assert_close(term, expected)
    torch.testing.assert_close(found, 0.5 * (loss + (second - TARGET).square().sum()) + expected)


def test_rdrop_takes_the_mean_of_both_directions():
    passes = PlainPasses(None, lambda: None)
    log_p, log_q = torch.randn(2, 3, 4, dtype=torch.float64).log_softmax(-1)
    passes.divergence, passes.repeat = symmetric_kl, lambda: (torch.zeros(()), log_q)
    _, term = RDrop(rdrop_alpha=1.0)(torch.zeros(()), log_p, passes)
    directions = [(a.exp() * (a - b)).sum() for a, b in ((log_p, log_q), (log_q, log_p))]
    torch.testing.assert_close(term, sum(directions) / 2)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_r3f(noise):
    """The term is ``lambda (w . sum of noise over tokens)^2`` of each sentence."""
    model = Regression()
    loss, prediction = first_pass(model)
    torch.manual_seed(3)
    found, term = R3F(r3f_lambda=2.0, r3f_eps=0.1, r3f_noise=noise)(loss, prediction, PlainPasses(model))
    torch.manual_seed(3)
    drawn = torch.empty(2, 3, 2, dtype=torch.float64)
    drawn = drawn.uniform_(-0.1, 0.1) if noise == "uniform" else drawn.normal_(0, 0.1)
    drawn[1, 2] = 0  # padding
    torch.testing.assert_close(term, 2.0 * (drawn.sum(dim=1) @ model.w).square().sum())
    assert torch.equal(found, loss + term)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_padding_gets_no_noise(noise, dtype):
    output, is_token = torch.randn(4, 6, 50).to(dtype), torch.rand(4, 6, 1) < 0.6
    noisy = R3F(r3f_eps=0.5, r3f_noise=noise).add_noise(0, is_token, output)
    assert noisy.dtype == dtype
    changed = (noisy != output).any(dim=-1, keepdim=True)
    assert torch.equal(changed, is_token) and 0 < is_token.sum() < is_token.numel()
    size = (noisy - output).float()[is_token.expand_as(output)]
    assert size.abs().max() <= 0.501 if noise == "uniform" else size.std() == pytest.approx(0.5, rel=0.1)


def test_smart_takes_normalised_steps_in_the_ball():
    """``l = (w . delta)^2`` has gradient ``2 (w . delta) w``: a step is ``+-w / max|w|``, the same at every token."""
    model = Regression()
    settings = {"smart_step_size": 0.04, "smart_eps": 0.05, "smart_init": 0.02}
    loss, prediction = first_pass(model)
    torch.manual_seed(4)
    found, term = Smart(smart_lambda=3.0, smart_steps=2, **settings)(loss, prediction, PlainPasses(model))
    torch.manual_seed(4)
    is_token = WORDS.ne(0).unsqueeze(-1)
    delta = torch.empty(2, 3, 2, dtype=torch.float64).normal_(0, 0.02) * is_token
    w = model.w.detach()
    for _ in range(2):
        sign = (delta.sum(dim=1) @ w).sign()[:, None, None]
        delta = (delta + 0.04 * sign * w / w.abs().max()).clamp(-0.05, 0.05) * is_token
    assert 0 < (delta.abs() == 0.05).sum() < is_token.sum() * 2, "some entries are clipped, some are not"
    expected = 3.0 * (delta.sum(dim=1) @ model.w).square().sum()
    torch.testing.assert_close(term, expected)
    assert torch.equal(found, loss + term)


def test_the_ascent_leaves_no_gradient_on_weights():
    model = Regression()
    _, prediction = first_pass(model)
    deltas = Smart(smart_steps=3).ascend(prediction.detach(), PlainPasses(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(delta.requires_grad for delta in deltas)


def test_an_instance_without_a_gradient_keeps_its_start():
    """A start of 0 has no direction: l = 0 and its gradient is 0."""
    model = Regression()
    deltas = Smart(smart_init=0.0).ascend(model().detach(), PlainPasses(model))
    assert all(torch.equal(delta, torch.zeros_like(delta)) for delta in deltas)


@pytest.mark.parametrize(
    ("name", "flag", "value", "text"),
    [
        ("rdrop", "rdrop_alpha", -0.1, r"--rdrop-alpha must be finite and >= 0, got -0\.1"),
        ("rdrop", "rdrop_alpha", float("inf"), "--rdrop-alpha must be finite"),
        ("r3f", "r3f_lambda", -1.0, "--r3f-lambda must be finite and >= 0"),
        ("r3f", "r3f_eps", float("nan"), "--r3f-eps must be finite and >= 0, got nan"),
        ("r3f", "r3f_noise", "cauchy", "--r3f-noise must be one of uniform, normal, got 'cauchy'"),
        ("smart", "smart_lambda", -1.0, "--smart-lambda must be finite and >= 0"),
        ("smart", "smart_steps", 0, "--smart-steps must be finite and >= 1, got 0"),
        ("smart", "smart_step_size", -1e-3, "--smart-step-size must be finite and >= 0"),
        ("smart", "smart_eps", -1.0, "--smart-eps must be finite and >= 0"),
        ("smart", "smart_init", -1.0, "--smart-init must be finite and >= 0"),
    ],
)
def test_bad_values_are_refused(name, flag, value, text):
    with pytest.raises(ValueError, match=text):
        REGULARIZERS[name](**{flag: value})
