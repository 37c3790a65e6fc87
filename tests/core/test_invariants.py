"""Limits and promises of the step: epsilon 0, the ball, restoring, accumulation, dropout, state."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_sam import PRESETS, SharpnessAware
from fairseq_sam.core.scales import build_scale
from tests.core.models import SETTINGS, batch, closure_of, flat, groups_of, loss_of, mlp

PRESET = pytest.mark.parametrize("preset", PRESETS)


def bits(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def make(model: nn.Module, preset: str = "sam", lr: float = 0.05, **options) -> SharpnessAware:
    return SharpnessAware(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), model, method=preset, **options)


@PRESET
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("dropout", ["same", "fresh"])
def test_epsilon_zero_is_the_base_optimizer_bit_for_bit(preset, steps, dropout):
    def network() -> nn.Module:
        model = mlp(dtype=torch.float32)
        return nn.Sequential(model[0], nn.Dropout(0.3), *model[1:])

    model, plain = network(), network()
    sam = make(model, preset, epsilon=0.0, steps=steps, dropout=dropout)
    base = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for number in range(10):
        data = batch(number, dtype=torch.float32)
        torch.manual_seed(number)
        sam.step(closure_of(model, data))
        assert sam.last_step.num_passes == steps + 1, "the passes really run"
        after = torch.get_rng_state()
        torch.manual_seed(number)
        base.zero_grad()
        loss_of(plain, data).backward()
        base.step()
        assert torch.equal(after, torch.get_rng_state()), "the random state ends as in a plain step"
    assert bits(model) == bits(plain)


@PRESET
@pytest.mark.parametrize("norm", [2.0, math.inf, 1.5, 5.0])
def test_perturbation_stays_in_the_ball(preset, norm):
    model, data = mlp(), batch(0)
    options = {**SETTINGS[preset], "epsilon": 0.07, "steps": 4, "norm": norm}
    sam = make(model, preset, **options)
    before, seen = flat(model.parameters()), []

    def closure():
        seen.append(flat(model.parameters()) - before)
        return closure_of(model, data)()

    grads = torch.autograd.grad(loss_of(model, data), list(model.parameters()))
    method = sam.method
    T = build_scale(
        method.scale, method.granularity, [p.detach() for p in model.parameters()], grads, [0, 0, 1, 1, 2, 2],
        eta=method.asam_eta, max_scale=method.max_scale,
    )  # fmt: skip
    factors = [torch.ones_like(p) if f is None else f.expand_as(p) for f, p in zip(T.factors, grads, strict=True)]
    sam.step(closure)
    assert len(seen) == 5 and not seen[0].any() and seen[1].any()
    for a in seen:
        radius = np.linalg.norm(a / flat(factors), ord=norm)
        assert radius <= 0.07 * (1 + 1e-9)
    assert np.linalg.norm(seen[-1] / flat(factors), ord=norm) == pytest.approx(0.07, rel=1e-9)


@PRESET
@pytest.mark.parametrize("failing_pass", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_restores_weights_and_gradients(preset, failing_pass, error):
    model, data = mlp(), batch(0)
    sam = make(model, preset, **{**SETTINGS[preset], "steps": 2})
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before, passes = bits(model), 0

    def closure():
        nonlocal passes
        passes += 1
        loss = closure_of(model, data)()
        if passes == failing_pass + 1:
            assert failing_pass == 0 or bits(model) != before, "the pass does see perturbed weights"
            raise error
        return loss

    with pytest.raises(type(error)):
        sam.accumulate(closure)
    assert bits(model) == before
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in model.parameters())


@PRESET
def test_an_interrupt_during_the_restore_still_restores(preset, monkeypatch):
    from fairseq_sam.core.step import SharpnessAwareStep

    model, data = mlp(), batch(0)
    before, original, calls = bits(model), SharpnessAwareStep._restore, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 1:
            self.space.tensors[0].data.copy_(self._backup[0])
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(SharpnessAwareStep, "_restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(model, preset, **SETTINGS[preset]).accumulate(closure_of(model, data))
    assert len(calls) == 2 and bits(model) == before


def test_weights_are_restored_bit_for_bit_where_adding_and_subtracting_would_not():
    model, data = mlp(dtype=torch.float32), batch(0, dtype=torch.float32)
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    before = bits(model)
    make(model, epsilon=10.0).accumulate(closure_of(model, data))
    assert bits(model) == before


@PRESET
def test_accumulated_micro_batches_add_up(preset):
    model = mlp()
    sam = make(model, preset, **SETTINGS[preset])
    single = []
    for number in range(3):
        sam.zero_grad()
        sam.accumulate(closure_of(model, batch(number)))
        single.append(flat(p.grad for p in model.parameters()))
    sam.zero_grad()
    for number in range(3):
        sam.accumulate(closure_of(model, batch(number)))
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@PRESET
def test_a_gradient_that_is_not_finite_gives_no_perturbation_and_is_counted(preset, bad):
    model, data = mlp(), batch(0)
    sam = make(model, preset, **{**SETTINGS[preset], "steps": 1})
    before = bits(model)

    def closure():
        assert bits(model) == before, "no pass sees perturbed weights"
        loss = loss_of(model, data) * bad
        loss.backward()
        return loss

    sam.accumulate(closure)
    assert bits(model) == before and sam.num_skipped == 1
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
        model = mlp()
        sam = make(model, preset, **SETTINGS[preset], **options)
        for number in range(5):
            sam.step(closure_of(model, batch(number)))
        runs.append(bits(model))
    assert runs[0] == runs[1]


@PRESET
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_resume_is_exact(preset, optimizer):
    """2 k updates equal k updates, a saved state, and k updates from it."""

    def start():
        model = mlp(dtype=torch.float32)
        sam = SharpnessAware(
            optimizer(model.parameters(), lr=0.01), model, method=preset, interval=3, **SETTINGS[preset]
        )
        return model, sam

    def train(model, sam, numbers):
        for number in numbers:
            sam.step(closure_of(model, batch(number, dtype=torch.float32)))

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
    args = ("gradient_strength", "tensor", weights, gradients, [0, 0])
    free, capped = build_scale(*args), build_scale(*args, max_scale=1000.0)
    assert float(free.factors[1]) > 1e18 and free.num_capped == 0
    assert float(capped.factors[1]) == pytest.approx(1000.0 / 1.0) and capped.num_capped == 1
    assert capped.factors[0] == free.factors[0]
    by_layer = build_scale("gradient_strength", "layer", *args[2:], max_scale=1000.0)
    assert by_layer.num_capped == 0 and float(by_layer.factors[1]) == pytest.approx(1.0)


def test_groups_follow_modules():
    """The twin's groups and the engine's agree on what a layer is: a Linear's weight and bias together."""
    model = mlp()
    assert len(np.unique(groups_of(model, "layer"))) == 3
    weights = [p.detach() for p in model.parameters()]
    factors = build_scale("weight_norm", "layer", weights, weights, [0, 0, 1, 1, 2, 2]).factors
    expected = math.hypot(float(weights[0].norm()), float(weights[1].norm()))
    assert float(factors[0]) == float(factors[1]) == pytest.approx(expected, rel=1e-12)


def test_half_precision_weights_move_from_their_masters():
    from fairseq_sam.core import Method, ParameterSpace, SharpnessAwareStep

    model = nn.Linear(64, 1, bias=False).to(torch.bfloat16)
    master = model.weight.detach().float() + 1e-3  # differs from the rounded weight
    space = ParameterSpace.of({"": model}, masters=[master])
    step = SharpnessAwareStep(Method.from_preset("sam", epsilon=0.5), space)
    seen = []

    def run_pass():
        seen.append(model.weight.detach().clone())
        loss = model(torch.ones(2, 64, dtype=torch.bfloat16)).float().square().mean()
        loss.backward()

    before = model.weight.detach().clone()
    step.ascend(run_pass, lambda gradients, _: (gradients, 1.0))
    gradient = torch.ones(1, 64) * torch.sign(seen[0].float().sum())
    step.descend(run_pass)
    expected = (master + 0.5 * gradient / 8.0).to(torch.bfloat16)
    torch.testing.assert_close(seen[1], expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(model.weight, before)


@PRESET
def test_buffers_follow_the_clean_pass(preset):
    """BatchNorm's statistics are those of a plain step, though K + 1 passes ran; they come back after an error too."""

    def network() -> nn.Module:
        model = mlp()
        return nn.Sequential(model[0], nn.BatchNorm1d(6, dtype=torch.float64), *model[1:])

    model, plain, data = network(), network(), batch(0)
    sam = make(model, preset, **{**SETTINGS[preset], "steps": 2})
    sam.step(closure_of(model, data))
    loss_of(plain, data).backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))

    calls = []

    def failing():
        loss = closure_of(model, batch(1))()
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return loss

    with pytest.raises(RuntimeError, match="boom"):
        sam.accumulate(failing)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


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

        step.ascend(run_pass, lambda gradients, _: (gradients, 1.0))
        step.descend(run_pass, in_backward=in_backward)
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
