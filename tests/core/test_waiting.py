"""The host waits for no number of a GPU: what it reads nowhere, and that the result is the same as where it reads."""

import numpy as np
import pytest
import torch

from fairseq_sam import PRESETS, SharpnessAware
from fairseq_sam.core import buckets, tensors
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.tensors import kept, known, on_device
from fairseq_sam.core.vectors import Vector
from tests.core.models import SETTINGS, batch, feed, flat, mlp, model_for

# Those choose instances, or the largest of some numbers, on the host.
READS = {name for name, method in PRESETS.items() if method.selects or method.mask == "fisher"}
MISHAPS = {
    "none": {},
    "no gradient": {0: 0.0},
    "all zero": dict.fromkeys(range(99), 0.0),
    "overflow": {0: float("inf")},
    "overflow of the second pass": {1: float("nan")},
    "overflow of the second update": {2: float("nan"), 3: float("inf")},
}


def spoiled(model, factors):
    """Let the gradients of some passes be multiplied by a number."""
    number = iter(range(10**6))

    def on_pass():
        factor = factors.get(next(number), 1.0)
        for p in model.parameters():
            p.factor = factor

    for p in model.parameters():
        p.factor = 1.0
        p.register_hook(lambda gradient, p=p: gradient * p.factor)
    return on_pass


def trained(preset, factors, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model, data = model_for(preset, dtype), batch(0, dtype=dtype)
    sam = SharpnessAware(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, method=preset,
        **{**SETTINGS[preset], **options},
    )  # fmt: skip
    on_pass, measured = spoiled(model, factors), []
    for _ in range(2):
        sam.step(feed(sam.method, model, data, on_pass))
        step = sam.last_step
        measured.append([float(x) for x in (
            step.gradient_norm, step.perturbation_norm, step.num_capped, step.num_skipped, step.num_overflows,
            step.num_passes,
        )])  # fmt: skip
    return flat(model.parameters()), np.array(measured), sam.state_dict()["method"]["num_skipped"]


def as_on_a_gpu(monkeypatch):
    """Nothing is read, and several tensors are moved by one call: here up to three matrices."""
    monkeypatch.setattr(tensors, "READABLE", ())
    monkeypatch.setattr(buckets, "CACHES", ())
    monkeypatch.setattr(buckets, "BUCKET", 300)


@pytest.mark.parametrize("mishap", MISHAPS)
@pytest.mark.parametrize("norm", ["l2", "linf", "3"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_same_as_where_the_host_reads(monkeypatch, preset, norm, mishap):
    steps = {"steps": 3} if PRESETS[preset].steps > 1 else {}
    expected = trained(preset, MISHAPS[mishap], norm=norm, **steps)
    as_on_a_gpu(monkeypatch)
    found = trained(preset, MISHAPS[mishap], norm=norm, **steps)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mishap", MISHAPS)
@pytest.mark.parametrize(("scale", "granularity"), [
    (scale, granularity)
    for scale in ("weight_abs", "weight_norm", "gradient_strength", "inverse_gradient")
    for granularity in ("element", "filter", "layer", "model")
    if (granularity == "element", scale) not in ((False, "weight_abs"), (True, "weight_norm"))
])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 3])
def test_scales_and_granularities(monkeypatch, scale, granularity, steps, mishap):
    options = {"scale": scale, "granularity": granularity, "steps": steps, "descent": "mean", "epsilon": 0.05}
    expected = trained("sam", MISHAPS[mishap], **options)
    as_on_a_gpu(monkeypatch)
    for a, b in zip(trained("sam", MISHAPS[mishap], **options), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def scaled(monkeypatch, preset, model_of, factors, **options):
    """Updates with a loss scale, of which those with an overflow are dropped: weights, and which updates were made."""
    torch.manual_seed(1)
    model, made = model_of(), []
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset, **options)
    for number, factor in enumerate(factors):
        data, passes = batch(number), iter(range(99))

        def closure(data=data, passes=passes, factor=factor):
            loss = (model(data[0]) - data[1]).square().mean()
            (loss * 2.0 * (factor if next(passes) == 1 else 1.0)).backward()
            return loss.detach() * 2.0

        sam.zero_grad()
        sam.accumulate(closure, loss_scale=2.0)
        gradients = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
        made.append(all(bool(torch.isfinite(g).all()) for g in gradients))
        if made[-1]:
            sam.apply()
        sam.num_updates += 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return flat(model.parameters()), made


class Words(torch.nn.Module):
    """A model with an embedding whose gradient is sparse."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4, sparse=True, dtype=torch.float64)
        self.out = torch.nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x):
        return self.out(self.embedding((x.abs() * 4).long().clamp(max=7)).mean(1))


@pytest.mark.parametrize("model_of", [mlp, Words])
@pytest.mark.parametrize(
    ("preset", "options"),
    [("sam", {}), ("ga_sam", {"steps": 2}), ("multistep_defense", {"steps": 3, "norm": "l2"}), ("gsam", {}),
     ("look_sam", {"interval": 5})],
)  # fmt: skip
def test_a_loss_scaler_drops_the_same_updates(monkeypatch, preset, options, model_of):
    """The first update's second pass overflows; what is kept of it must not spoil those that follow."""
    if preset == "gsam" and model_of is Words:
        options = {"descent": "last"}
    options = {**SETTINGS[preset], **options}
    factors = [float("inf"), *[1.0] * 6]
    expected, made = scaled(monkeypatch, preset, model_of, factors, **options)
    as_on_a_gpu(monkeypatch)
    found, also = scaled(monkeypatch, preset, model_of, factors, **options)
    assert also == made and made[1:] == [True] * 6
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", ["inverse_gradient", "gradient_strength"])
def test_an_infinite_scale_moves_nothing(monkeypatch, scale):
    """Gradients so small that T is infinite, where no cap makes it finite."""
    options = {"scale": scale, "granularity": "element", "max_scale": float("inf"), "steps": 2, "epsilon": 0.1}
    factors = dict.fromkeys(range(99), 1e-310)
    expected = trained("sam", factors, **options)
    assert np.isfinite(expected[0]).all()
    as_on_a_gpu(monkeypatch)
    for a, b in zip(trained("sam", factors, **options), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mishap", ["none", "overflow"])
def test_half_precision(monkeypatch, mishap):
    expected = trained("ga_sam", MISHAPS[mishap], torch.bfloat16)
    as_on_a_gpu(monkeypatch)
    for a, b in zip(trained("ga_sam", MISHAPS[mishap], torch.bfloat16), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.01)


@pytest.mark.parametrize("preset", sorted({*PRESETS} - READS - {"freelb"}))
def test_no_number_is_read(monkeypatch, preset):
    """Tensors of the meta device have no numbers: whoever asks for one gets an error."""
    drawn = RandomState.generator

    def generator(self, stream, device="cpu"):
        return None if torch.device(device).type == "meta" else drawn(self, stream, device)

    monkeypatch.setattr(RandomState, "generator", generator)
    model = mlp(dtype=torch.float32).to("meta")
    data = [part.to("meta") for part in batch(0, dtype=torch.float32)]
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset, **SETTINGS[preset])
    with pytest.raises((RuntimeError, NotImplementedError)):
        data[0].sum().item()
    for _ in range(3):
        sam.step(feed(sam.method, model, data))
    assert sam.num_updates == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch says there who waits for it")
@pytest.mark.parametrize("preset", sorted({*PRESETS} - READS - {"freelb"}))
def test_the_host_does_not_wait_for_a_gpu(preset):
    model = mlp(dtype=torch.float32).cuda()
    data = [part.cuda() for part in batch(0, dtype=torch.float32)]
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset, **SETTINGS[preset])
    sam.step(feed(sam.method, model, data))  # libraries wait when they are first used
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sam.step(feed(sam.method, model, data))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_flag_makes_numbers_zero_that_are_none():
    values = [torch.tensor([1.0, float("nan"), float("inf")]), torch.tensor(-2.0)]
    for flag in (True, False):
        vector = Vector([value.clone() for value in values], owned=False).scale_(0.5).keep_if_(torch.tensor(flag))
        found = vector.values()
        if flag:
            torch.testing.assert_close(found, [value * 0.5 for value in values], equal_nan=True)
            continue
        assert all((value == 0).all() for value in found) and vector.norm(2.0) == 0
        assert all((value == 0).all() for value in vector.add_(Vector([torch.zeros(3), torch.zeros(())])).values())
    assert known(torch.tensor(False)) is False and torch.is_tensor(known(torch.ones((), device="meta") > 0))
    assert kept(torch.tensor([float("nan")]), torch.tensor(False)).tolist() == [0.0]
    assert on_device([1, 2], torch.device("cpu")).tolist() == [1, 2]
