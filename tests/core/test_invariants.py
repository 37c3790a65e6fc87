"""Limits and promises of the step: epsilon 0, the ball, restoring, accumulation, dropout, state."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_sam import PRESETS, InstanceBatch, SharpnessAware
from fairseq_sam.core.batch import ClosureBatch
from fairseq_sam.core.groups import Groups
from fairseq_sam.core.step import SharpnessAwareStep
from tests.core.models import SETTINGS, batch, closure_of, feed, flat, groups_of, loss_of, mlp, model_for, scale_of

PRESET = pytest.mark.parametrize("preset", PRESETS)
# Presets whose only perturbation is that of the whole batch, by its gradient, in one ball.
ONE_BALL = [
    name
    for name, m in PRESETS.items()
    if m.where == "weights" and m.ascent in ("batch", "weighted") and m.m == 1 and m.mask != "random"
]
RANDOM = "random_sam"  # has no ascent pass


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def make(model: nn.Module, preset: str = "sam", lr: float = 0.05, **options) -> SharpnessAware:
    return SharpnessAware(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), model, method=preset, **options)


@PRESET
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("dropout", ["same", "fresh"])
def test_epsilon_zero_is_the_base_optimizer_bit_for_bit(preset, steps, dropout):
    def network() -> nn.Module:
        return nn.Sequential(model_for(preset, torch.float32), nn.Dropout(0.3))

    model, plain = network(), network()
    options = {"dropout": dropout, "interval": 1, **({} if preset == RANDOM else {"steps": steps})}
    sam = make(model, preset, epsilon=0.0, **options)
    base = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for number in range(10):
        data = batch(number, dtype=torch.float32)
        torch.manual_seed(number)
        sam.step(closure_of(model, data))
        assert sam.last_step.num_passes == (1 if preset == RANDOM else steps + 1), "the passes really run"
        after = torch.get_rng_state()
        torch.manual_seed(number)
        base.zero_grad()
        loss_of(plain, data).backward()
        base.step()
        assert torch.equal(after, torch.get_rng_state()), "the random state ends as in a plain step"
    assert bits(model) == bits(plain)


@pytest.mark.parametrize("preset", ONE_BALL)
@pytest.mark.parametrize("norm", [2.0, math.inf, 1.5, 5.0])
def test_perturbation_stays_in_the_ball(preset, norm):
    model, data = mlp(), batch(0)
    sam = make(model, preset, **{**SETTINGS[preset], "epsilon": 0.07, "steps": 4, "norm": norm})
    method, before, seen = sam.method.at(0.05), flat(model.parameters()), []
    grads = torch.autograd.grad(loss_of(model, data), list(model.parameters()))
    groups = Groups(method.granularity, [0, 0, 1, 1, 2, 2])
    T = scale_of(
        method.scale, groups, [p.detach() for p in model.parameters()], grads,
        eta=method.asam_eta, max_scale=method.max_scale,
    )  # fmt: skip
    factors = flat(f.expand_as(p) for f, p in zip(T.factors, grads, strict=True))
    sam.step(feed(method, model, data, lambda: seen.append(flat(model.parameters()) - before)))
    passes = [a for a in seen if a.any()]
    assert len(passes) >= 4 and not seen[2 if preset == "delta_sam" else 0].any()
    for a in passes:
        if preset == "delta_sam" and len(passes) == 6 and any(a is p for p in passes[:2]):
            assert np.linalg.norm(a) == pytest.approx(0.07, rel=1e-9), "the probe is in the 2-norm"
            continue
        in_balls = [a / factors]
        if method.ball == "group":
            layers = groups_of(model, "layer")
            in_balls = [(a / factors)[layers == layer] for layer in np.unique(layers)]
        assert all(np.linalg.norm(x, ord=norm) <= 0.07 * (1 + 1e-9) for x in in_balls)
    if method.mask == "none":
        assert all(np.linalg.norm(x, ord=norm) == pytest.approx(0.07, rel=1e-9) for x in in_balls), "the ball is filled"


@PRESET
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_in_any_pass_restores_weights_gradients_and_buffers(preset, error):
    data, num_calls, failing = batch(0), 0, 0
    while failing == 0 or failing < num_calls:
        model = model_for(preset)
        sam = make(model, preset, **({**SETTINGS[preset]} if preset == RANDOM else {**SETTINGS[preset], "steps": 2}))
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        before, calls = bits(model), []

        def on_pass(calls=calls, failing=failing):
            calls.append(1)
            if failing and len(calls) == failing:
                raise error

        if failing == 0:
            sam.accumulate(feed(sam.method, model, data, on_pass))
            num_calls = len(calls)
            assert num_calls == (1 if preset == RANDOM else num_calls) and (preset == RANDOM or num_calls >= 3)
        else:
            with pytest.raises(type(error)):
                sam.accumulate(feed(sam.method, model, data, on_pass))
            assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in model.parameters())
        assert bits(model) == before
        failing += 1


@pytest.mark.parametrize("preset", [name for name, m in PRESETS.items() if m.where == "weights"])
def test_an_interrupt_during_the_restore_still_restores(preset, monkeypatch):
    from fairseq_sam.core.perturbation import WeightPerturbation

    model, data = mlp(), batch(0)
    before, original, calls = bits(model), WeightPerturbation.restore, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 1:
            self.space.tensors[0].data.copy_(self._backup[0])  # and no other
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(WeightPerturbation, "restore", interrupted)
    sam = make(model, preset, **SETTINGS[preset])
    with pytest.raises(KeyboardInterrupt):
        sam.accumulate(feed(sam.method, model, data))
    assert len(calls) >= 2 and bits(model) == before


def test_weights_are_restored_bit_for_bit_where_adding_and_subtracting_would_not():
    model, data = mlp(dtype=torch.float32), batch(0, dtype=torch.float32)
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    before = bits(model)
    make(model, epsilon=10.0).accumulate(closure_of(model, data))
    assert bits(model) == before


@PRESET
def test_accumulated_micro_batches_add_up(preset):
    model, single = model_for(preset), []
    sam = make(model, preset, **SETTINGS[preset])
    for number in range(3):
        sam.optimizer.zero_grad()  # the first, second and third micro-batch of one update: each has its random choices
        sam.accumulate(feed(sam.method, model, batch(number)))
        single.append(flat(p.grad for p in model.parameters()))
    sam = make(model, preset, **SETTINGS[preset])
    sam.zero_grad()
    for number in range(3):
        sam.accumulate(feed(sam.method, model, batch(number)))
    np.testing.assert_array_equal(flat(p.grad for p in model.parameters()), (single[0] + single[1]) + single[2])


def test_same_masks_in_every_pass_and_fresh_ones_only_in_the_ascent():
    model = nn.Sequential(nn.Linear(4, 64, dtype=torch.float64), nn.Dropout(0.5))
    masks = {}
    for dropout in ("same", "fresh"):
        seen = []
        sam = make(model, "sam", lr=0.0, epsilon=1e-3, steps=3, dropout=dropout)

        def closure(seen=seen):
            output = model(torch.ones(1, 4, dtype=torch.float64))
            seen.append((output == 0).flatten())
            loss = output.square().mean()
            loss.backward()
            return loss

        torch.manual_seed(3)
        sam.step(closure)
        masks[dropout] = seen
    assert all(torch.equal(mask, masks["same"][0]) for mask in masks["same"])
    fresh = masks["fresh"]
    assert torch.equal(fresh[-1], masks["same"][0]), "the last pass sees the masks of a plain step"
    assert len({tuple(mask.tolist()) for mask in fresh}) == 4


def test_a_zero_gradient_gives_no_perturbation_and_is_counted():
    model, data = mlp(), batch(0)
    sam = make(model, "ga_sam", epsilon=0.1)

    def closure():
        loss = (model(data[0]) * 0.0).sum()
        loss.backward()
        return loss

    before = bits(model)
    sam.step(closure)
    assert bits(model) == before and sam.num_skipped == 1 and float(sam.last_step.perturbation_norm) == 0.0


@PRESET
def test_a_zero_gradient_gives_finite_weights(preset):
    """A loss that does not depend on the weights: nothing to ascend, nothing to select by, no NaN."""
    model, data = model_for(preset), batch(0)
    sam = make(model, preset, **SETTINGS[preset])
    if sam.method.needs_instances:
        feeding = InstanceBatch(lambda x, y: (model(x) * 0.0).sum(1), *data)
    else:

        def feeding():
            loss = (model(data[0]) * 0.0).sum()
            loss.backward()
            return loss

    before = bits(model)
    sam.step(feeding)
    assert bits(model) == before
    assert sam.num_skipped == num_ascents(sam.method)


def num_ascents(method) -> int:
    """Ascent steps along a gradient in one step on a batch of 8."""
    parts = 8 if method.ascent == "instance" else method.m
    return 0 if method.ascent == "random" else parts * method.num_ascents


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@PRESET
def test_a_gradient_that_is_not_finite_gives_no_perturbation_and_is_counted(preset, bad):
    model, data = model_for(preset), batch(0)
    sam = make(model, preset, **{**SETTINGS[preset], "steps": 1})
    before = bits(model)
    if sam.method.needs_instances:
        feeding = InstanceBatch(lambda x, y: (model(x) - y).square().mean(1) * bad, *data)
    else:

        def feeding():
            assert bits(model) == before or preset == RANDOM, "no pass sees perturbed weights"
            loss = loss_of(model, data) * bad
            loss.backward()
            return loss

    sam.accumulate(feeding)
    assert bits(model) == before
    assert sam.num_skipped == num_ascents(sam.method)
    assert not np.isfinite(flat(p.grad for p in model.parameters())).all(), "the base optimizer sees the overflow"


def test_a_zero_weight_and_a_zero_gradient_do_not_move():
    """ASAM: T = |w| = 0 for a fresh bias. GA-SAM: ||g_i|| = 0 for a layer that the loss does not depend on."""
    model, data = mlp(), batch(0)
    with torch.no_grad():
        model[2].bias.zero_()
    seen = []

    def closure():
        seen.append(model[2].bias.detach().clone())
        return closure_of(model, data)()

    make(model, "asam", epsilon=0.3).step(closure)
    assert not seen[1].any()
    unused = nn.ModuleList([mlp(), nn.Linear(2, 2, dtype=torch.float64)])
    seen.clear()

    def closure_with_unused():
        seen.append(unused[1].weight.detach().clone())
        loss = loss_of(unused[0], data) + 0.0 * unused[1].weight.sum()
        loss.backward()
        return loss

    make(unused, "ga_sam", epsilon=0.1).step(closure_with_unused)
    assert torch.equal(seen[0], seen[1]) and np.isfinite(flat(unused.parameters())).all()


def test_parameters_without_a_gradient_neither_move_nor_count():
    """An unused parameter with absurd weights and a frozen one leave the perturbation of the others as it is."""
    data, reference = batch(0), mlp()
    sam = make(reference, "ga_sam", epsilon=0.1)
    sam.accumulate(closure_of(reference, data))
    model = nn.ModuleList([mlp(), nn.Linear(3, 3, dtype=torch.float64), nn.Linear(2, 2, dtype=torch.float64)])
    with torch.no_grad():
        model[1].weight.fill_(1e36)
    model[2].requires_grad_(False)

    def closure():
        loss = loss_of(model[0], data)
        loss.backward()
        return loss

    make(model, "ga_sam", epsilon=0.1).accumulate(closure)
    for expected, found in zip(reference.parameters(), model[0].parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad)
    assert model[1].weight.grad is None


def test_tied_parameters_count_once():
    tied = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)}).double()
    tied["b"].weight = tied["a"].weight
    sam = make(tied, "sam", epsilon=0.1)

    def closure():
        loss = tied["b"](tied["a"](torch.ones(1, 4, dtype=torch.float64))).square().sum()
        loss.backward()
        return loss

    sam.accumulate(closure)
    assert float(sam.last_step.perturbation_norm) == pytest.approx(0.1, rel=1e-12)


def test_exclude_trains_but_does_not_perturb():
    model, data, seen = mlp(), batch(0), []

    def closure():
        seen.append([p.detach().clone() for p in model.parameters()])
        return closure_of(model, data)()

    make(model, epsilon=0.1, exclude=r"bias$").accumulate(closure)
    moved = [not torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert moved == [name.endswith("weight") for name, _ in model.named_parameters()]
    assert all(p.grad is not None for p in model.parameters())


def test_interval_and_start():
    model = mlp()
    sam = make(model, epsilon=0.1, start_epoch=2, start_update=3, interval=2)
    passes = []
    for update in range(10):
        sam.set_epoch(1 if update < 2 else 2)
        sam.step(closure_of(model, batch(update)))
        passes.append(sam.last_step.num_passes)
    assert passes == [1, 1, 1, 2, 1, 2, 1, 2, 1, 2]


@PRESET
def test_interval_one_is_every_step(preset):
    runs = []
    for options in ({}, {"interval": 1, "start_epoch": 1, "start_update": 0}):
        model = model_for(preset)
        settings = {**SETTINGS[preset], "interval": 1}
        if preset == "look_sam" and not options:
            settings = {"epsilon": SETTINGS["sam"]["epsilon"]}  # refreshed in every update, it is SAM
        sam = make(model, "sam" if preset == "look_sam" and not options else preset, **{**settings, **options})
        for number in range(5):
            torch.manual_seed(number)
            sam.step(feed(sam.method, model, batch(number)))
        runs.append(bits(model))
    assert runs[0] == runs[1]


@PRESET
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_resume_is_exact(preset, optimizer):
    """2 k updates equal k updates, a saved state, and k updates from it."""

    def start():
        model = model_for(preset, torch.float32)
        options = {**SETTINGS[preset], "interval": 3}
        return model, SharpnessAware(optimizer(model.parameters(), lr=0.01), model, method=preset, **options)

    def train(model, sam, numbers):
        for number in numbers:
            torch.manual_seed(number)  # random directions and masks follow from torch's random state
            sam.step(feed(sam.method, model, batch(number, dtype=torch.float32)))

    whole, sam = start()
    train(whole, sam, range(14))
    first, sam = start()
    train(first, sam, range(7))
    weights, state = copy.deepcopy(first.state_dict()), copy.deepcopy(sam.state_dict())
    second, sam = start()
    second.load_state_dict(weights)
    sam.load_state_dict(state)
    train(second, sam, range(7, 14))
    assert bits(second) == bits(whole)
    assert sam.num_updates == 14


def test_asam_is_invariant_to_scale_preserving_reparametrisation():
    """Scaling one layer by c and the next by 1 / c leaves a ReLU network, and ASAM's perturbed loss, as they are."""
    sharpness = {}
    for preset in ("asam", "sam"):
        values = []
        for c in (1.0, 20.0):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)).double()
            with torch.no_grad():
                model[0].weight.mul_(c)
                model[2].weight.div_(c)
            sam = make(model, preset, epsilon=0.3)
            sam.accumulate(closure_of(model, batch(0)))
            values.append(float(sam.sharpness))
        sharpness[preset] = values
    assert sharpness["asam"][0] == pytest.approx(sharpness["asam"][1], rel=1e-10)
    assert sharpness["sam"][0] != pytest.approx(sharpness["sam"][1], rel=1e-2), "SAM is not invariant"


def test_a_group_of_rounding_noise_explodes_without_the_cap():
    """The example of methods.md on a small scale: one tensor with a gradient of 1e-19 takes T = 1/||g|| of 1e19."""
    weights = [torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    gradients = [torch.full((4,), 0.5, dtype=torch.float64), torch.full((4,), 1e-19, dtype=torch.float64)]
    args = ("gradient_strength", Groups("tensor"), weights, gradients)
    free, capped = scale_of(*args), scale_of(*args, max_scale=1000.0)
    assert float(free.factors[1]) > 1e18 and free.num_capped == 0
    assert float(capped.factors[1]) == pytest.approx(1000.0 / 1.0) and capped.num_capped == 1
    assert capped.factors[0] == free.factors[0]
    by_layer = scale_of("gradient_strength", Groups("layer", [0, 0]), *args[2:], max_scale=1000.0)
    assert by_layer.num_capped == 0 and float(by_layer.factors[1]) == pytest.approx(1.0)


def test_groups_follow_modules():
    """The twin's groups and the engine's agree on what a layer is: a Linear's weight and bias together."""
    model = mlp()
    assert len(np.unique(groups_of(model, "layer"))) == 3
    weights = [p.detach() for p in model.parameters()]
    factors = scale_of("weight_norm", Groups("layer", [0, 0, 1, 1, 2, 2]), weights, weights).factors
    expected = math.hypot(float(weights[0].norm()), float(weights[1].norm()))
    assert float(factors[0]) == float(factors[1]) == pytest.approx(expected, rel=1e-12)


def test_half_precision_weights_move_from_their_masters():
    from fairseq_sam.core import Method, ParameterSpace, SharpnessAwareStep

    model = nn.Linear(64, 1, bias=False).to(torch.bfloat16)
    master = model.weight.detach().float() + 1e-3  # differs from the rounded weight
    space = ParameterSpace.of({"": model}).with_masters([master])
    step = SharpnessAwareStep(Method.from_preset("sam", epsilon=0.5), space)
    seen = []

    def run_pass():
        seen.append(model.weight.detach().clone())
        loss = model(torch.ones(2, 64, dtype=torch.bfloat16)).float().square().mean()
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    step.ascend(ClosureBatch(run_pass), lambda gradients, _: (gradients, 1.0))
    gradient = torch.ones(1, 64) * torch.sign(seen[0].float().sum())
    step.descend(ClosureBatch(run_pass))
    expected = (master + 0.5 * gradient / 8.0).to(torch.bfloat16)
    torch.testing.assert_close(seen[1], expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(model.weight, before)


# Single instances have no batch statistics: methods that need them train models without BatchNorm.
@pytest.mark.parametrize("preset", [name for name, m in PRESETS.items() if not m.needs_instances])
def test_buffers_follow_the_clean_pass(preset):
    """BatchNorm's statistics are those of a plain step, though K + 1 passes ran; they come back after an error too."""

    def network() -> nn.Module:
        return nn.Sequential(model_for(preset), nn.BatchNorm1d(2, dtype=torch.float64))

    model, plain, data = network(), network(), batch(0)
    options = {} if preset == RANDOM else {"steps": 2}
    sam = make(model, preset, **{**SETTINGS[preset], **options, "interval": 1})
    sam.step(closure_of(model, data))
    loss_of(plain, data).backward()
    same = [torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True)]
    # A method without a pass at the unperturbed weights keeps the statistics of its first pass.
    assert all(same) or (preset in (RANDOM, "freelb") and model[1].num_batches_tracked == 1)
    after, calls = [buffer.clone() for buffer in model.buffers()], []

    def failing():
        loss = closure_of(model, batch(1))()
        calls.append(1)
        if len(calls) == (1 if preset == RANDOM else 3):
            raise RuntimeError("boom")
        return loss

    with pytest.raises(RuntimeError, match="boom"):
        sam.accumulate(failing)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), after, strict=True))


def test_autocast_around_the_step_sees_the_perturbed_weights():
    """An autocast outside the passes caches casts of the weights; the move must not be hidden by them."""
    found = []
    for outside in (True, False):
        model, data = mlp(dtype=torch.float32), batch(0, dtype=torch.float32)
        sam = make(model, "sam", epsilon=0.5)

        def closure(model=model, data=data):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, data)
            loss.backward()
            return loss

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
            sam.step(closure)
        found.append(float(sam.sharpness))
    assert found[0] == found[1] > 0.01


def test_a_bad_gradient_on_the_way_stays_out_of_the_mean():
    """Pass 2 of 3 overflows: the perturbation goes back to 0, and the update is that of the finite passes."""
    model, data, calls = mlp(), batch(0), []
    sam = make(model, "ga_sam", epsilon=0.02, steps=2)

    def closure():
        calls.append(1)
        loss = loss_of(model, data) * (math.nan if len(calls) == 2 else 1.0)
        loss.backward()
        return loss

    expected = torch.autograd.grad(loss_of(model, data), list(model.parameters()))
    sam.accumulate(closure)
    assert sam.num_skipped == 1
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=0)


def test_gradients_combined_inside_backward_equal_those_combined_after_it():
    """As under torch's DDP, also for a task that runs backward twice in a pass, and on top of earlier gradients."""
    from fairseq_sam.core import Method, ParameterSpace, SharpnessAwareStep

    results = {}
    for in_backward in (False, True):
        model = mlp()
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25)
        step = SharpnessAwareStep(Method.from_preset("ga_sam", epsilon=0.05, steps=2), ParameterSpace.of({"": model}))

        def run_pass(model=model):
            loss_of(model, batch(0)).backward()
            loss_of(model, batch(1)).backward()
            return 0.0

        step.ascend(ClosureBatch(run_pass), lambda gradients, _: (gradients, 1.0))
        step.descend(ClosureBatch(run_pass), in_backward=in_backward)
        results[in_backward] = flat(p.grad for p in model.parameters())
    np.testing.assert_array_equal(results[True], results[False])


def test_updates_are_counted_where_the_base_optimizer_steps():
    """So that a gradient scaler, which steps the base optimizer by itself, counts as well."""
    model = mlp()
    sam = make(model, epsilon=0.1, interval=2)
    passes = []
    for number in range(4):
        sam.zero_grad()
        sam.accumulate(closure_of(model, batch(number)))
        passes.append(sam.last_step.num_passes)
        sam.optimizer.step()
    assert passes == [2, 1, 2, 1] and sam.num_updates == 4


def test_norms_of_large_and_small_gradients():
    """Norms are accumulated in float64: 16M equal float32 numbers, gradients whose squares leave float32's range."""
    from fairseq_sam.core.norms import vector_norm

    assert float(vector_norm([torch.full((2**24,), 0.1)], 2.0)) == pytest.approx(0.1 * 2**12, rel=1e-6)
    for size in (1e25, 1e-25):
        assert float(vector_norm([torch.full((4,), size)], 2.0)) == pytest.approx(2 * size, rel=1e-6)
    model, data = mlp(dtype=torch.float32), batch(0, dtype=torch.float32)
    sam = make(model, "sam", epsilon=0.1)

    def closure():
        loss = loss_of(model, data) * 1e-26
        loss.backward()
        return loss

    sam.accumulate(closure)
    assert sam.num_skipped == 0 and float(sam.last_step.perturbation_norm) == pytest.approx(0.1, rel=1e-5)


def test_a_discarded_update_leaves_nothing_behind():
    """A micro-batch whose gradient is thrown away, by a gradient scaler for instance, does not enter LookSAM's sum."""
    components = []
    for discards in (False, True):
        model = mlp()
        sam = make(model, "look_sam", epsilon=0.1)
        if discards:
            sam.zero_grad()
            sam.accumulate(closure_of(model, batch(5)))
        sam.zero_grad()
        sam.accumulate(closure_of(model, batch(0)))
        components.append(sam.state_dict()["method"]["component"])
    assert all(torch.equal(components[0][name], components[1][name]) for name in components[0])


@pytest.mark.parametrize("descent", ["mean", "gsam"])
def test_a_random_direction_after_a_clean_pass_leaves_unused_parameters_alone(descent):
    model = nn.ModuleList([mlp(), nn.Linear(3, 3, dtype=torch.float64)])
    before, seen = flat(model[1].parameters()), []

    def closure():
        seen.append(flat(model[1].parameters()))
        return closure_of(model[0], batch(0))()

    sam = make(model, "random_sam", epsilon=0.1, descent=descent, scale="weight_norm")
    sam.step(closure)
    assert len(seen) == 2 and all(np.array_equal(before, part) for part in seen)
    assert float(sam.last_step.perturbation_norm) > 0


@pytest.mark.parametrize("dropout", ["same", "fresh"])
@pytest.mark.parametrize("ascent", ["batch", "weighted", "random"])
def test_selection_compares_losses_under_the_same_masks(monkeypatch, dropout, ascent):
    """At a tiny radius no loss rises by more than a little: what is chosen by is not the noise of dropout."""
    model = nn.Sequential(nn.Dropout(0.5), mlp())
    sam = make(model, "esam", epsilon=1e-6, mask="none", dropout=dropout, ascent=ascent)
    rises, plain = [], SharpnessAwareStep._loss_rises

    def watch(step, whole):
        rises.append(plain(step, whole))
        return rises[-1]

    monkeypatch.setattr(SharpnessAwareStep, "_loss_rises", watch)
    x, y = batch(0)
    backward, forward = [], []
    model.register_forward_pre_hook(
        lambda module, arguments: (backward if torch.is_grad_enabled() else forward).append(len(arguments[0]) / 8)
    )
    sam.step(InstanceBatch(lambda x, y: (model(x) - y).square().mean(1), x, y))
    assert 0 < float(rises[0].abs().max()) < 1e-4
    assert sum(backward) == pytest.approx(sam.method.passes) and sum(forward) == pytest.approx(sam.method.forwards)


@pytest.mark.parametrize("dropout", ["same", "fresh"])
def test_instance_weights_compare_losses_under_the_same_masks(monkeypatch, dropout):
    """A loss that dropout alone makes different would otherwise pass for curvature. Later passes keep the weights."""
    model = nn.Sequential(nn.Dropout(0.5), mlp())
    sam = make(model, "delta_sam", epsilon=0.1, steps=3, dropout=dropout)
    masks, weights, plain = [], [], SharpnessAwareStep._instance_weights
    model[0].register_forward_hook(lambda module, arguments, output: masks.append(output == 0))

    def watch(step, *args):
        weights.append(plain(step, *args))
        return weights[-1]

    monkeypatch.setattr(SharpnessAwareStep, "_instance_weights", watch)
    x, y = batch(0)
    sam.step(InstanceBatch(lambda x, y: (model(x) - y).square().mean(1), x, y))
    up, down, first, second, third, last = masks
    assert torch.equal(up, down) and torch.equal(up, first)
    assert torch.equal(second, first) == torch.equal(third, first) == torch.equal(last, first) == (dropout == "same")
    assert len(weights) == 3 and all(torch.equal(each, weights[0]) for each in weights)


def test_sharpness_is_given_where_both_passes_see_the_same_instances():
    for preset in PRESETS:
        sam = make(model_for(preset), preset, **SETTINGS[preset])
        sam.step(feed(sam.method, sam._model, batch(0)))
        assert (sam.sharpness is None) == (preset in ("efficient_sam", "esam", "random_sam"))
