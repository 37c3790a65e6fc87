"""What every preset keeps to, whatever the model looks like: parts without use, frozen, tied, in several groups."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fairseq_sam import PRESETS, SharpnessAware
from tests.core.models import SETTINGS, Reader, batch, feed, flat, model_for

PRESET = pytest.mark.parametrize("preset", PRESETS)
# Their directions and masks are drawn, or counted, over all perturbed parameters, those without a gradient included.
OVER_ALL = ("random_sam", "delta_sam", "fisher_sam")


class Wider(nn.Module):
    """A model with a part that no pass uses, its weights absurd, and a frozen part that all passes use."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.frozen = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
        with torch.no_grad():
            self.frozen.weight.copy_(torch.eye(2))
            self.frozen.bias.zero_()
        self.unused = nn.Linear(3, 3, dtype=torch.float64)
        with torch.no_grad():
            self.unused.weight.fill_(1e36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.inner(x))


def trained(preset: str, model: nn.Module, steps: int = 5) -> SharpnessAware:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    sam = SharpnessAware(optimizer, model, method=preset, **SETTINGS[preset])
    for number in range(steps):
        torch.manual_seed(number)
        sam.step(feed(sam.method, model, batch(number)))
    return sam


@PRESET
def test_unused_and_frozen_parameters(preset):
    alone, wider = model_for(preset), Wider(model_for(preset))
    frozen, unused = flat(wider.frozen.parameters()), flat(wider.unused.parameters())
    trained(preset, alone)
    sam = trained(preset, wider)
    assert np.array_equal(flat(wider.frozen.parameters()), frozen)
    assert np.array_equal(flat(wider.unused.parameters()), unused)
    assert np.isfinite(flat(wider.inner.parameters())).all() and not sam.num_skipped
    assert all(p.grad is None for p in (*wider.frozen.parameters(), *wider.unused.parameters()))
    if preset not in OVER_ALL:
        np.testing.assert_allclose(flat(wider.inner.parameters()), flat(alone.parameters()), rtol=1e-10, atol=1e-12)


class Tied(Reader):
    """Reads words and scores them by their own embeddings, as a second name of the parameter or without one."""

    def __init__(self, has_two_names: bool) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 3), nn.Linear(8, 2)
        self.score = None
        if has_two_names:
            self.score = nn.Linear(3, 8, bias=False)
            self.score.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = torch.tanh(self.hidden(self.embedding(self.words(x)))).mean(1)
        scores = functional.linear(read, self.embedding.weight) if self.score is None else self.score(read)
        return self.out(torch.tanh(scores))


@PRESET
def test_a_tied_embedding_is_one_parameter(preset):
    models = []
    for has_two_names in (False, True):
        torch.manual_seed(7)
        model = Tied(has_two_names).double()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
        models.append(model)
    assert len(list(models[0].parameters())) == len(list(models[1].parameters()))
    before = flat(models[0].parameters())
    sams = [trained(preset, model) for model in models]
    assert np.array_equal(flat(models[0].parameters()), flat(models[1].parameters()))
    assert not np.array_equal(flat(models[0].parameters()), before) and not sams[1].num_skipped
    assert models[1].score.weight is models[1].embedding.weight


@PRESET
def test_several_groups_share_the_perturbation_and_keep_their_settings(preset):
    """The gradient is that of one group; the base optimizer applies each group's own learning rate to it."""
    rates, grads, weights = (0.3, 0.0, 0.05), [], []
    for has_groups in (False, True):
        model = model_for(preset)
        parameters = list(model.parameters())
        groups = [{"params": parameters[i::3], "lr": rate} for i, rate in enumerate(rates)]
        optimizer = torch.optim.SGD(groups if has_groups else parameters, lr=0.1)
        sam = SharpnessAware(optimizer, model, method=preset, **SETTINGS[preset])
        sam.zero_grad()
        torch.manual_seed(3)
        sam.accumulate(feed(sam.method, model, batch(0)))
        grads.append([p.grad.clone() for p in parameters])
        before = [p.detach().clone() for p in parameters]
        sam.apply()
        weights.append((before, [p.detach().clone() for p in parameters]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    before, after = weights[1]
    for i, (start, end, gradient) in enumerate(zip(before, after, grads[1], strict=True)):
        torch.testing.assert_close(end, start - rates[i % 3] * gradient, rtol=1e-12, atol=1e-15)
