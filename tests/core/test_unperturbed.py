"""Losses of which only a part is perturbed, against derivatives by hand in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fairseq_sam import PRESETS, SharpnessAware
from fairseq_sam.core import unperturbed
from fairseq_sam.core.unperturbed import call_unperturbed
from tests import interrupt
from tests.core.models import batch, mlp, reader

EPSILON, RATE = 0.3, 0.1


def product(first, second):
    """A loss that does not divide into a part of each call."""
    return (first * torch.tanh(second)).sum(1).square().mean()


def closure_of(model, x):
    def closure():
        loss = product(call_unperturbed(model, x), model(x))
        loss.backward()
        return loss

    return closure


def at(model, x, first, second):
    return product(functional_call(model, first, (x,)), functional_call(model, second, (x,)))


def leaves(weights):
    return {name: value.detach().clone().requires_grad_() for name, value in weights.items()}


def gradient(loss, weights):
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), retain_graph=True), strict=True))


def length(gradients):
    return torch.cat([g.flatten() for g in gradients.values()]).norm()


@pytest.mark.parametrize("steps", [1, 3])
def test_sam_perturbs_and_ascends_one_call(steps):
    model, x = mlp(), batch(1)[0]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        first, moved = leaves(weights), leaves(weights)
        size, total = 1.5 * EPSILON / steps, {name: torch.zeros_like(w) for name, w in weights.items()}
        for _ in range(steps):
            ascent = gradient(at(model, x, weights, moved), moved)
            total = {name: total[name] + size * ascent[name] / length(ascent) for name in total}
            shrink = min(1.0, float(EPSILON / length(total)))
            total = {name: shrink * a for name, a in total.items()}
            moved = leaves({name: weights[name] + total[name] for name in weights})
        loss = at(model, x, first, moved)
        descent = {name: gradient(loss, first)[name] + g for name, g in gradient(loss, moved).items()}
        weights = {name: weights[name] - RATE * descent[name] for name in weights}
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), RATE), model, "sam", epsilon=EPSILON, steps=steps)
    for _ in range(3):
        sam.step(closure_of(model, x))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-9, atol=1e-12)


def test_freelb_perturbs_the_embeddings_of_one_call():
    model, x = reader(), batch(1)[0]
    plain, seen = model(x).detach(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), RATE), model, "freelb", epsilon=EPSILON)
    sam.step(closure_of(model, x))
    assert len(seen) == 4
    assert all(torch.equal(found, plain) for found in seen[0::2])
    assert not any(torch.allclose(found, plain) for found in (*seen[1::2], seen[3] - seen[1] + plain))


@pytest.mark.parametrize("preset", [p for p in PRESETS if not PRESETS[p].needs_instances])
def test_epsilon_zero_is_the_base_optimizer(preset):
    results = []
    for sharp in (False, True):
        model, x = (reader if preset == "freelb" else mlp)(), batch(1)[0]
        base = torch.optim.Adam(model.parameters(), 1e-2)
        sam = SharpnessAware(base, model, preset, epsilon=0, **({"epsilon_min": 0} if preset == "gsam" else {}))
        for _ in range(3):
            if sharp:
                sam.step(closure_of(model, x))
            else:
                base.zero_grad()
                closure_of(model, x)()
                base.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("preset", ["ga_sam", "gsam", "look_sam"])
def test_methods_that_descend_along_the_ascent_are_refused(preset):
    model, x = mlp(), batch(1)[0]
    before = [p.detach().clone() for p in model.parameters()]
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), RATE), model, preset)
    with pytest.raises(ValueError, match=r"--sam-descent last and --sam-between plain"):
        sam.step(closure_of(model, x))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_error_in_a_perturbed_pass_leaves_nothing_behind():
    model, x = mlp(), batch(1)[0]
    before = [p.detach().clone() for p in model.parameters()]
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), RATE), model, "sam", epsilon=EPSILON)
    calls = []

    def closure():
        calls.append(len(unperturbed._running))
        loss = product(call_unperturbed(model, x), model(x))
        if len(calls) == 2:
            raise RuntimeError("boom")
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="boom"):
        sam.step(closure)
    assert calls == [1, 1] and not unperturbed._running
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    output = call_unperturbed(model, x)
    assert output.requires_grad and torch.equal(output, model(x))


def test_recurrent_models_are_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x.unsqueeze(1))[0].squeeze(1)

    model, x = Recurrent().double(), batch(1)[0]
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), RATE), model, "sam", epsilon=EPSILON)
    with pytest.raises(ValueError, match=r"nn\.LSTM"):
        sam.step(closure_of(model, x))


def test_shared_weights_and_frozen_ones_keep_their_gradients():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.two.bias.requires_grad_(False)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    model, x = Tied().double(), batch(1)[0]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = model.two.bias.detach().clone()
    first, moved = leaves(weights), leaves(weights)
    ascent = gradient(at(model, x, weights, moved), moved)
    moved = leaves({name: weights[name] + EPSILON * ascent[name] / length(ascent) for name in weights})
    loss = at(model, x, first, moved)
    expected = {name: gradient(loss, first)[name] + g for name, g in gradient(loss, moved).items()}
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), 0.0), model, "sam", epsilon=EPSILON)
    sam.step(closure_of(model, x))
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)
    assert model.two.bias.grad is None and torch.equal(model.two.bias, frozen)


class Interrupted:
    """A step of SGD with one perturbed call, to be interrupted anywhere."""

    def __init__(self, preset):
        torch.manual_seed(0)
        self.model, self.x = (reader if preset == "freelb" else mlp)(), batch(1)[0]
        self.sam = SharpnessAware(torch.optim.SGD(self.model.parameters(), RATE), self.model, preset, epsilon=EPSILON)
        self.parameters = {
            (path, key): p for path, module in self.model.named_modules() for key, p in module._parameters.items()
        }
        self.values = [p.detach().clone() for p in self.parameters.values()]

    def accumulate(self):
        self.sam.accumulate(closure_of(self.model, self.x))

    def check(self):
        for (path, key), p in self.parameters.items():
            assert self.model.get_submodule(path)._parameters[key] is p
        assert all(torch.equal(p, value) for p, value in zip(self.parameters.values(), self.values, strict=True))
        assert not any(module._forward_hooks for module in self.model.modules())


@pytest.mark.parametrize("error", interrupt.ERRORS)
@pytest.mark.parametrize("preset", ["sam", "freelb"])
def test_an_interrupt_anywhere_leaves_the_model(preset, error):
    """Every bytecode of this room, and of what enters and leaves its contexts, in turn with the four errors.

    Where one is executed often, for each of the parameters, the first and the last time.
    """
    run = Interrupted(preset)
    run.accumulate()
    seen = interrupt.trace(run.accumulate, "opcode")
    own = {n for n, (file, _) in enumerate(seen) if file.endswith("unperturbed.py")}
    near = sorted({m for n in own for m in range(max(0, n - 3), min(len(seen), n + 4))})
    near = [near[place] for place in interrupt.first_and_last([seen[n] for n in near])]
    expected = Interrupted(preset)
    expected.accumulate()
    assert len(near) > 100
    for number in near[:: 1 if error == "interrupt" else 5]:
        run = Interrupted(preset)
        with pytest.raises(interrupt.RAISED):
            interrupt.trace(run.accumulate, "opcode", number, error)
        torch.set_grad_enabled(True)
        run.check()
        run.sam.zero_grad()
        run.accumulate()
        for found, p in zip(run.parameters.values(), expected.parameters.values(), strict=True):
            assert (found.grad is None and p.grad is None) or torch.equal(found.grad, p.grad)
