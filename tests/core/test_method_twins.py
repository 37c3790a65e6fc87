"""Every preset equals its paper's formulas in float64 over 60 steps, with SGD and with Adam.

Random choices (directions, masks, instances) are read off from the weights and batches that the passes saw, and
checked against their own rules; the twin computes everything else.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fairseq_sam import PRESETS, SharpnessAware
from tests import reference
from tests.core.models import SETTINGS, Problem, batch, feed, flat, groups_of, mlp, model_for, reader
from tests.core.test_reference_twins import OPTIMIZERS, WHOLE_BATCH


class Record:
    """The flat weights and the inputs that every pass of a step saw."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights: list[np.ndarray] = []
        self.inputs: list[torch.Tensor] = []
        model.register_forward_pre_hook(lambda module, args: self.see(args[0]))

    def see(self, x: torch.Tensor) -> None:
        self.weights.append(flat(self.model.parameters()))
        self.inputs.append(x)

    def clear(self) -> None:
        self.weights.clear()
        self.inputs.clear()


def rows_of(seen: torch.Tensor, x: torch.Tensor) -> list[int]:
    """Which rows of x a slice consists of."""
    return [int((x == row).all(1).nonzero()[0]) for row in seen]


def efficient_sam(method, w, problem, record, step):
    assert [len(x) for x in record.inputs] == [2, 8]
    return reference.efficient_sam(w, problem, rho=method.epsilon, ascent_rows=[0, 1])


def msam(method, w, problem, record, step):
    assert [len(x) for x in record.inputs] == [3, 3, 3, 3, 2, 2]
    return reference.m_sam(w, problem, rho=method.epsilon, parts=np.array_split(np.arange(8), 3))


class Fisher:
    """Collects 12 instances from two updates, every 7 updates."""

    def __init__(self) -> None:
        self.gradients: list[np.ndarray] = []

    def __call__(self, method, w, problem, record, step):
        if step % 7 == 0:
            self.gradients = []
        number = (8, 4)[step % 7] if step % 7 < 2 else 0
        assert [len(x) for x in record.inputs] == [1] * number + [8, 8]
        chosen = [rows_of(x, problem.data[0])[0] for x in record.inputs[:number]]
        assert len(set(chosen)) == number, "no instance twice"
        self.gradients += [problem.instance_gradients(w)[i] for i in chosen]
        mask = reference.fisher_mask(self.gradients, method.sparsity)
        assert np.count_nonzero(record.weights[-1] - record.start) == np.count_nonzero(mask)
        return reference.fisher_sam(w, problem, rho=method.epsilon, mask=mask)


def esam(method, w, problem, record, step):
    moved = record.weights[-1] - record.start
    keep = np.zeros_like(w)
    tensors = groups_of(problem.model, "tensor")
    for name in np.unique(tensors):
        keep[tensors == name] = float(moved[tensors == name].any())
    assert [len(x) for x in record.inputs] == [8, 8, 4]
    return reference.esam(w, problem, rho=method.epsilon, keep=keep, beta=0.5, gamma=0.5)


def gsam(method, w, problem, record, step):
    return reference.gsam(
        w, problem, rho_max=0.1, rho_min=0.02, lr=record.lr, lr_max=record.lr_max, lr_min=0.0, alpha=0.4
    )


def delta_sam(method, w, problem, record, step):
    up, down, at_w = record.weights[:3]
    r = up - record.start
    assert np.array_equal(at_w, record.start)
    assert np.linalg.norm(r) == pytest.approx(method.epsilon, rel=1e-12)
    np.testing.assert_allclose(r, record.start - down, rtol=1e-12, atol=1e-15)
    return reference.delta_sam(w, problem, rho=method.epsilon, r=r, eta=1e-4)


def instance_sam(method, w, problem, record, step):
    assert [len(x) for x in record.inputs] == [1] * 16
    return reference.instance_sam(w, problem, rho=method.epsilon)


def random_sam(method, w, problem, record, step):
    (moved,) = record.weights
    assert np.linalg.norm(moved - record.start) == pytest.approx(method.epsilon, rel=1e-12)
    return problem.gradient(moved)


def model_perturbation(method, w, problem, record, step):
    return reference.model_perturbation(w, problem, epsilon=0.1, rate=0.5, steps=2)


def awp(method, w, problem, record, step):
    return reference.awp(w, problem, gamma=0.05, groups=groups_of(problem.model, "layer"))


class Look:
    def __init__(self) -> None:
        self.twin = reference.LookSam(rho=0.1, k=3, alpha=0.7)

    def __call__(self, method, w, problem, record, step):
        assert len(record.inputs) == (2 if step % 3 == 0 else 1), "a step between two refreshes is one pass"
        return self.twin.gradient(step, w, problem)


TWINS = {
    "efficient_sam": lambda: efficient_sam, "msam": lambda: msam, "fisher_sam": Fisher, "esam": lambda: esam,
    "gsam": lambda: gsam, "delta_sam": lambda: delta_sam, "instance_sam": lambda: instance_sam,
    "random_sam": lambda: random_sam, "model_perturbation": lambda: model_perturbation, "awp": lambda: awp,
    "look_sam": Look,
}  # fmt: skip


def test_every_preset_has_a_twin():
    assert {*WHOLE_BATCH, *TWINS, "freelb"} == set(PRESETS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("preset", TWINS)
def test_sixty_steps_equal_the_twin(preset, optimizer):
    model, twin_model = mlp(), mlp()
    make, make_twin = OPTIMIZERS[optimizer]
    sam = SharpnessAware(make(model.parameters()), model, method=preset, **SETTINGS[preset])
    schedule = torch.optim.lr_scheduler.LambdaLR(sam.optimizer, lambda t: 1.0 - t / 80)
    twin, twin_optimizer, record = TWINS[preset](), make_twin(), Record(model)
    w = flat(twin_model.parameters())
    record.lr_max = twin_optimizer.lr
    for step in range(60):
        data = batch(step)
        record.clear()
        record.start = flat(model.parameters())
        record.lr = twin_optimizer.lr = sam.param_groups[0]["lr"]
        sam.step(feed(sam.method, model, data))
        w = twin_optimizer.step(w, twin(sam.method, w, Problem(twin_model, data), record, step))
        schedule.step()
        np.testing.assert_allclose(flat(model.parameters()), w, rtol=1e-8, atol=1e-10)
    assert not sam.num_skipped


def freelb_gradients(model, data):
    """Gradients of the mean loss in w and in delta, with the model's forward written out."""
    x, y = data
    words = model.words(x)

    def gradients(w: np.ndarray):
        parts = torch.tensor(w).split([p.numel() for p in model.parameters()])
        table, w1, b1, w2, b2 = (v.view(p.shape) for v, p in zip(parts, model.parameters(), strict=True))

        def loss(table, w1, b1, w2, b2, delta):
            embedded = functional.embedding(words, table, padding_idx=0) + delta
            out = functional.linear(torch.tanh(functional.linear(embedded, w1, b1)).mean(1), w2, b2)
            return (out - y).square().mean()

        def at(delta: np.ndarray):
            g = torch.func.grad(loss, argnums=tuple(range(6)))(table, w1, b1, w2, b2, torch.tensor(delta))
            table_gradient = g[0].clone()
            g_delta = g[5] * (words != 0).unsqueeze(-1)
            # What padding contributes to the table never reaches it: that row is not trained.
            table_gradient[0] = 0.0
            return flat([table_gradient, *g[1:5]]), g_delta.numpy()

        return at

    return gradients


@pytest.mark.parametrize(("norm", "descent"), [(math.inf, "mean"), (2.0, "mean"), (3.0, "mean"), (2.0, "mean_ascent")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_freelb_equals_the_twin(optimizer, norm, descent):
    model, twin_model = reader(), reader()
    make, make_twin = OPTIMIZERS[optimizer]
    options = {**SETTINGS["freelb"], "norm": norm, "steps": 3, "descent": descent, "step_size": 0.06}
    sam = SharpnessAware(make(model.parameters()), model, method="freelb", **options)
    twin, w, seen = make_twin(), flat(twin_model.parameters()), []
    for step in range(30):
        data = batch(step)
        seen.clear()
        clean = model.embedding(model.words(data[0])).detach()
        hook = model.hidden.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        sam.step(feed(sam.method, model, data))
        hook.remove()
        seen[:] = [embedded - clean for embedded in seen]
        delta_0 = seen[0].numpy().copy()
        is_word = (model.words(data[0]) != 0).numpy()
        number = is_word.sum(1) * 3
        bound = 0.1 / (number ** (1 / norm) if norm != math.inf else np.ones(8))
        assert all(not d.numpy()[~is_word].any() for d in seen), "padding never moves"
        assert (np.abs(delta_0).max((1, 2)) <= bound * (1 + 1e-9)).all() and (delta_0[is_word] != 0).all()
        assert len(seen) == (4 if descent == "mean" else 3)
        gradients = freelb_gradients(twin_model, data)(w)
        g = reference.freelb(
            gradients, delta_0, p=norm, epsilon=0.1, step_size=0.06, steps=3 if descent == "mean" else 2
        )
        w = twin.step(w, g)
        np.testing.assert_allclose(flat(model.parameters()), w, rtol=1e-8, atol=1e-10)


def test_the_feed_runs_every_preset():
    for preset in PRESETS:
        model = model_for(preset)
        sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset, **SETTINGS[preset])
        before = flat(model.parameters())
        sam.step(feed(sam.method, model, batch(0)))
        assert not np.array_equal(before, flat(model.parameters()))
