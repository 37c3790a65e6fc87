"""The identities of the table of methods, and compositions of axes against the general twin."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_sam import InstanceBatch, Method, SharpnessAware
from tests import reference
from tests.core.models import Problem, batch, feed, flat, groups_of, mlp, model_for

EPSILON = 0.1


def train(preset: str, num_steps: int = 5, instances: bool = True, **options):
    """Bits of the weights after some steps; both sides of an identity take the same kind of batch."""
    model = model_for(preset, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sam = SharpnessAware(optimizer, model, method=preset, **options)
    for number in range(num_steps):
        torch.manual_seed(number)
        data = batch(number, dtype=torch.float32)
        sam.step(batch_of(model, data) if instances else feed(sam.method, model, data))
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def batch_of(model: nn.Module, data) -> InstanceBatch:
    return InstanceBatch(lambda x, y: (model(x) - y).square().mean(1), *data)


SAM = {"epsilon": EPSILON}
IDENTITIES = {
    "gsam, alpha 0, one radius": ("gsam", {**SAM, "gsam_alpha": 0.0, "epsilon_min": EPSILON}, "sam", SAM),
    "esam, beta 1, gamma 1": ("esam", {**SAM, "sparsity": 0.0, "esam_gamma": 1.0}, "sam", SAM),
    "msam, m 1": ("msam", {**SAM, "m": 1}, "sam", SAM),
    "fraction 1": ("efficient_sam", {**SAM, "ascent_fraction": 1.0}, "sam", SAM),
    "all-ones Fisher mask": ("fisher_sam", {**SAM, "sparsity": 0.0}, "sam", SAM),
    "interval 1": ("look_sam", {**SAM, "interval": 1}, "sam", SAM),
    "look_sam, alpha 0": ("look_sam", {**SAM, "interval": 3, "look_alpha": 0.0}, "sam", {**SAM, "interval": 3}),
    "m = N": ("msam", {**SAM, "m": 8}, "instance_sam", SAM),
    "awp with one layer": ("awp", {**SAM, "granularity": "model"}, "sam", {**SAM, "scale": "weight_norm"}),
    "a ball for each group, L-infinity": (
        "ga_sam", {**SAM, "ball": "group"}, "ga_sam", SAM,
    ),
    "mean over K ascent points": (
        "multistep_defense", {**SAM, "steps": 2, "step_size": 0.1, "descent": "mean_ascent"},
        "multistep_defense", {**SAM, "steps": 1, "step_size": 0.1},
    ),
    "gsam on the radius's upper end": ("gsam", {**SAM, "epsilon_min": 0.01}, "sam", {**SAM, "descent": "gsam"}),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name):
    preset, options, other, other_options = IDENTITIES[name]
    assert train(preset, **options) == train(other, **other_options)
    assert train(preset, **options) != train(other, **{**other_options, "epsilon": 0.07}), "epsilon matters"


def test_a_fisher_mask_that_keeps_all_is_bit_identical():
    """Not by skipping it: the instances really run, and leave no trace."""
    model = mlp(dtype=torch.float32)
    sam = SharpnessAware(torch.optim.Adam(model.parameters(), lr=0.01), model, method="fisher_sam", epsilon=EPSILON,
                         sparsity=1e-9, fisher_samples=4)  # fmt: skip
    calls = []
    for number in range(5):
        data = batch(number, dtype=torch.float32)

        def losses(x, y):
            calls.append(len(x))
            return (model(x) - y).square().mean(1)

        sam.step(InstanceBatch(losses, *data))
    assert calls == [1] * 4 + [8] * 10
    assert [p.detach().numpy().tobytes() for p in model.parameters()] == train("sam", **SAM)


def test_freelb_with_a_zero_perturbation_is_the_base():
    model, plain = model_for("freelb", torch.float32), model_for("freelb", torch.float32)
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method="freelb", epsilon=0.0, steps=3)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number in range(5):
        data = batch(number, dtype=torch.float32)
        sam.step(feed(sam.method, model, data))
        base.zero_grad()
        (plain(data[0]) - data[1]).square().mean().backward()
        base.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


# -- compositions ------------------------------------------------------------------------------------------------------

GA_SAM = {"scale": "gradient_strength", "granularity": "layer", "steps": 2, "descent": "mean"}
COMPOSITIONS = {
    "quarter-batch GA-SAM": ("ga_sam", {**GA_SAM, "ascent_fraction": 0.25}),
    "quarter-batch GA-SAM, last": ("ga_sam", {**GA_SAM, "ascent_fraction": 0.25, "descent": "last"}),
    "Fisher-masked GA-SAM": ("ga_sam", {**GA_SAM, "mask": "fisher", "sparsity": 0.6, "fisher_samples": 8}),
    "both": ("ga_sam", {**GA_SAM, "mask": "fisher", "sparsity": 0.6, "fisher_samples": 8, "ascent_fraction": 0.5}),
    "delta-SAM weights, Fisher mask": ("delta_sam", {"mask": "fisher", "sparsity": 0.6, "fisher_samples": 8}),
    "delta-SAM weights, gradient-strength scale": ("delta_sam", {**GA_SAM, "descent": "last"}),
    "F_GSAM": ("gsam", {"mask": "fisher", "sparsity": 0.6, "fisher_samples": 8}),
    "GSAM with GA-SAM's scale and K": ("gsam", {**GA_SAM, "descent": "gsam"}),
}


@pytest.mark.parametrize("norm", [2.0, math.inf])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition_equals_the_general_twin(name, norm):
    preset, options = COMPOSITIONS[name]
    model, data, seen = mlp(), batch(3), []
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset, norm=norm, epsilon=0.05,
                         **options)  # fmt: skip
    method = sam.method.at(0.1)
    w, problem = flat(model.parameters()), Problem(mlp(), data)

    def losses(x, y):
        seen.append((flat(model.parameters()), len(x)))
        return (model(x) - y).square().mean(1)

    sam.zero_grad()
    sam.accumulate(InstanceBatch(losses, *data))
    mask, ascent = 1.0, None
    if method.mask == "fisher":
        assert [n for _, n in seen[:8]] == [1] * 8
        del seen[:8]
        mask = reference.fisher_mask(list(problem.instance_gradients(w)), method.sparsity)
    rows = range(round(8 * method.ascent_fraction))
    ascent_gradient = lambda v: problem.gradient(v, rows)  # noqa: E731
    if method.ascent == "weighted":
        l_0, up, down = problem.losses(w), problem.losses(seen[0][0]), problem.losses(seen[1][0])
        weights = np.abs(up + down - 2 * l_0) / np.maximum(np.abs(up - down), 1e-4)
        ascent_gradient = lambda v: weights @ problem.instance_gradients(v) / 8  # noqa: E731
    ascent = ascent_gradient
    g, a = reference.method_gradient(
        w, problem.gradient, groups_of(model, method.granularity), scale=method.scale, p=norm, epsilon=method.epsilon,
        steps=method.steps, descent="mean" if method.descent == "mean" else "last", ascent=ascent, mask=mask,
    )  # fmt: skip
    if method.descent == "gsam":
        g_0 = problem.gradient(w)
        g = g - 0.4 * (g_0 - (g_0 @ g) / (g @ g) * g)
    np.testing.assert_allclose(flat(p.grad for p in model.parameters()), g, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(seen[-1][0] - w, mask * a[-1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("granularity", ["element", "filter", "tensor", "layer", "model"])
@pytest.mark.parametrize("norm", [2.0, 3.0])
def test_a_ball_for_each_group(granularity, norm):
    """Every group is moved by epsilon in its own norm, along its own steepest direction."""
    model, data, seen = mlp(), batch(1), []
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), model, epsilon=0.05, ball="group",
                         granularity=granularity, norm=norm)  # fmt: skip
    w = flat(model.parameters())
    g = Problem(mlp(), data).gradient(w)
    sam.accumulate(feed(sam.method, model, data, lambda: seen.append(flat(model.parameters()) - w)))
    groups = groups_of(model, granularity)
    for group in np.unique(groups):
        inside = groups == group
        expected = reference.ascent_step(g[inside], np.ones(inside.sum()), norm, 0.05)
        np.testing.assert_allclose(seen[1][inside], expected, rtol=1e-9, atol=1e-15)


def test_esam_with_the_fisher_mask_selects_and_masks():
    """F_ESAM of FSAM's table 6: SDS with the Fisher mask in place of SWP's random tensors."""
    model, data, seen = mlp(), batch(2), []
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), model, method="esam", mask="fisher",
                         sparsity=0.6, fisher_samples=8, epsilon=0.1)  # fmt: skip
    w, problem = flat(model.parameters()), Problem(mlp(), data)

    def losses(x, y):
        seen.append(len(x))
        return (model(x) - y).square().mean(1)

    sam.accumulate(InstanceBatch(losses, *data))
    mask = reference.fisher_mask(list(problem.instance_gradients(w)), 0.6)
    expected = reference.esam(w, problem, rho=0.1, keep=mask, beta=1.0, gamma=0.5)
    assert seen == [1] * 8 + [8, 8, 4]
    np.testing.assert_allclose(flat(p.grad for p in model.parameters()), expected, rtol=1e-8, atol=1e-11)


def test_selection_after_an_ascent_on_a_part_compares_with_the_loss_at_w():
    """The losses at w of the instances that the ascent did not see cost a forward pass of their own."""
    model, data, seen = mlp(), batch(2), []
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), model, method="esam", mask="none",
                         ascent_fraction=0.25, epsilon=0.1)  # fmt: skip
    w, problem = flat(model.parameters()), Problem(mlp(), data)
    sam.accumulate(feed(sam.method, model, data, lambda: seen.append(flat(model.parameters()))))
    a = reference.sam_perturbation(problem.gradient(w, [0, 1]), 0.1)
    rise = problem.losses(w + a) - problem.losses(w)
    expected = problem.gradient(w + a, np.argsort(-rise)[:4])
    np.testing.assert_allclose(flat(p.grad for p in model.parameters()), expected, rtol=1e-8, atol=1e-11)
    assert sam.last_step.num_passes == 0.25 + 0.5 and sam.last_step.num_forwards == 2 == sam.method.forwards


def test_random_directions_differ_between_steps_and_are_gaussian():
    """Without dropout nothing advances torch's random state, yet no two directions are alike; T shapes them."""
    model, seen = nn.Linear(400, 50, bias=False, dtype=torch.float64), []
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), model, method="random_sam", epsilon=1.0)
    before = flat(model.parameters())
    for _ in range(3):
        sam.step(feed(sam.method, model, (torch.ones(2, 400).double(), torch.ones(2, 50).double()),
                      lambda: seen.append(flat(model.parameters()) - before)))  # fmt: skip
    assert len(seen) == 3
    assert all(abs(a @ b) < 0.05 for a, b in ((seen[0], seen[1]), (seen[1], seen[2]), (seen[0], seen[2])))
    scaled = seen[0] * math.sqrt(len(before))
    assert abs(scaled.mean()) < 0.03 and abs((scaled**4).mean() - 3.0) < 0.2, "mean 0, kurtosis 3"


def test_swp_keeps_whole_tensors_at_the_given_rate():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False, dtype=torch.float64) for _ in range(40)])
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), model, method="sam", mask="random", sparsity=0.25)
    x, kept = torch.ones(1, 2, dtype=torch.float64), []
    for _ in range(20):
        start = [layer.weight.detach().clone() for layer in model]
        seen = []

        def closure(seen=seen):
            seen.append([layer.weight.detach().clone() for layer in model])
            loss = sum(layer(x).square().sum() for layer in model)
            loss.backward()
            return loss

        sam.step(closure)
        moved = [(a - b) for a, b in zip(seen[1], start, strict=True)]
        kept += [bool(m.all()) for m in moved]
        assert all(bool(m.all()) or not bool(m.any()) for m in moved)
        full = torch.cat([layer.weight.grad.reshape(-1) for layer in model])
        assert len(full) == 160
    assert abs(np.mean(kept) - 0.75) < 0.05 and 0 < np.mean(kept) < 1


# -- other implementations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_sam_and_asam_agree_with_pytorch_optimizer(adaptive):
    """Each of 50 steps, from the same weights: that package takes its norms in float32."""
    package = pytest.importorskip("pytorch_optimizer", reason="another implementation, in the test extra")
    model, other = mlp(), mlp()
    ours = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.05), model, method="asam" if adaptive else "sam",
                          epsilon=0.1)  # fmt: skip
    theirs = package.SAM(other.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.05)
    for number in range(50):
        x, y = batch(number)
        other.load_state_dict(model.state_dict())
        ours.step(feed(ours.method, model, (x, y)))
        for go in (theirs.first_step, theirs.second_step):
            (other(x) - y).square().mean().backward()
            go(zero_grad=True)
        np.testing.assert_allclose(flat(model.parameters()), flat(other.parameters()), rtol=0, atol=1e-8)


def test_gsam_agrees_with_pytorch_optimizer():
    package = pytest.importorskip("pytorch_optimizer", reason="another implementation, in the test extra")

    class Radius:
        value = 0.0

        def step(self) -> float:
            return self.value

    model, other, radius = mlp(), mlp(), Radius()
    ours = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.05), model, method="gsam", epsilon=0.2,
                          epsilon_min=0.05, gsam_alpha=0.4)  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(ours.optimizer, lambda t: 1.0 - t / 50)
    base = torch.optim.SGD(other.parameters(), lr=0.05)
    theirs = package.GSAM(other.parameters(), base, other, radius, alpha=0.4, perturb_eps=0.0)
    for number in range(40):
        x, y = batch(number)
        radius.value = 0.05 + 0.15 * (1.0 - number / 50)
        theirs.update_rho_t()
        base.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
        ours.step(feed(ours.method, model, (x, y)))
        theirs.set_closure(nn.functional.mse_loss, x, y)
        theirs.step()
        np.testing.assert_allclose(flat(model.parameters()), flat(other.parameters()), rtol=0, atol=1e-8)
        schedule.step()


def test_methods_that_need_instances_refuse_a_closure():
    for preset in ("efficient_sam", "msam", "fisher_sam", "esam", "delta_sam", "instance_sam"):
        model = mlp()
        sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset)
        assert Method.from_preset(preset).needs_instances
        with pytest.raises(TypeError, match=rf"{preset} needs single instances.*InstanceBatch"):
            sam.step(lambda: 0.0)
