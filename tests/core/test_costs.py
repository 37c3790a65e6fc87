"""Passes and parameter copies that are really spent equal what the table of methods, and so the cards, say."""

import gc
from pathlib import Path

import pytest
import torch

import fairseq_sam
from fairseq_sam import PRESETS, InstanceBatch, SharpnessAware
from fairseq_sam.__main__ import cost, main, settings, table
from fairseq_sam.core import buckets, tensors
from fairseq_sam.core.guidance import WHEN_TO_USE
from tests.core.models import SETTINGS, batch, feed, mlp, model_for

PRESET = pytest.mark.parametrize("preset", PRESETS)
COMPOSITIONS = {
    "quarter-batch GA-SAM": ("ga_sam", {"ascent_fraction": 0.25, "steps": 3}),
    "ESAM on a part": ("esam", {"ascent_fraction": 0.5}),
    "delta-SAM on a part": ("delta_sam", {"ascent_fraction": 0.5}),
    "ESAM on instance weights": ("esam", {"ascent": "weighted"}),
    "the same, new dropout": ("esam", {"ascent": "weighted", "dropout": "fresh"}),
    "GSAM on a random direction": ("gsam", {"ascent": "random"}),
    "FreeLB without the last point": ("freelb", {"steps": 3, "descent": "mean_ascent"}),
    "Fisher-masked GA-SAM": ("ga_sam", {"mask": "fisher", "fisher_samples": 8}),
}
CASES = [(name, name, SETTINGS[name]) for name in PRESETS] + [
    (name, preset, {**SETTINGS[preset], **options}) for name, (preset, options) in COMPOSITIONS.items()
]


def count(sam, model, data) -> tuple[float, float]:
    """Forward-backward passes and further forward passes of one step, in passes over the whole batch."""
    backward, forward = [], []

    def count_rows(module, arguments):
        (backward if torch.is_grad_enabled() else forward).append(len(arguments[0]) / len(data[0]))

    hook = model.register_forward_pre_hook(count_rows)
    sam.step(feed(sam.method, model, data))
    hook.remove()
    return sum(backward), sum(forward)


@pytest.mark.parametrize(("name", "preset", "options"), CASES, ids=[name for name, _, _ in CASES])
def test_passes_are_those_of_the_card(name, preset, options):
    model = model_for(preset)
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.01), model, method=preset, **options)
    for number in range(4):  # the Fisher mask is refreshed in the first updates; count where it is not
        backward, forward = count(sam, model, batch(number))
        active = number % sam.method.interval == 0
        assert backward == pytest.approx(sam.last_step.num_passes), "what is logged is what was spent"
        assert forward == pytest.approx(sam.last_step.num_forwards)
        collects = sam.method.mask == "fisher" and number < 2
        instances = min(8, sam.method.fisher_samples - 8 * number) / 8 if collects else 0
        assert backward == pytest.approx((sam.method.passes if active else 1) + instances)
        assert forward == pytest.approx(sam.method.forwards if active else 0)


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize(("name", "preset", "options"), CASES, ids=[name for name, _, _ in CASES])
def test_copies_are_those_of_the_card(monkeypatch, name, preset, options, on_a_gpu):
    """Bytes of all tensors that live when the last pass begins, beside those of model, data and base optimizer.

    Also where no number is read and all weights are moved at once, as on a GPU.
    """
    if on_a_gpu:
        monkeypatch.setattr(tensors, "READABLE", ())
        monkeypatch.setattr(buckets, "CACHES", ())
    model, data = model_for(preset, torch.float32), batch(0, dtype=torch.float32)
    model.register_parameter("large", torch.nn.Parameter(torch.ones(300, 200)))
    size = sum(p.numel() for p in model.parameters()) * 4
    before = _live_bytes()
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.01), model, method=preset,
                         **{**options, "interval": 1})  # fmt: skip
    live, calls = [], []

    def losses(x, y):
        calls.append(1)
        if len(calls) == last_call:
            live.append(_live_bytes())
        return (model(x) + model.large.sum() * 0.01 - y).square().mean(1)

    def closure():
        loss = losses(*data).mean()
        loss.backward()
        return loss

    feeding = InstanceBatch(losses, *data) if sam.method.needs_instances else closure
    last_call = 0
    for _ in range(4):
        calls.clear()
        sam.step(feeding)
    last_call = len(calls)
    calls.clear()
    sam.zero_grad()
    sam.accumulate(feeding)
    has_parts = sam.method.m > 1 or sam.method.ascent == "instance"
    gradient = 1 if has_parts else 0  # of the earlier parts: that of plain accumulation
    assert (live[-1] - before) / size == pytest.approx(sam.method.copies + gradient, abs=0.05)


def _live_bytes() -> int:
    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_the_list_of_methods(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PRESETS) + 3 and all(len(line) <= 160 for line in lines)
    for line, method in zip(lines[1:-2], PRESETS.values(), strict=True):
        assert line.startswith(method.name) and cost(method) in line and f"  {method.copies:g}" in line
    assert "1.2" in table().splitlines()[1 + list(PRESETS).index("look_sam")], "what LookSAM costs on average"
    assert main(["ga_sam"]) == 0
    shown = capsys.readouterr().out
    assert all(f in shown for f in ("--sam-scale gradient_strength", "--sam-norm linf", "--sam-epsilon 0.0001"))
    assert f"when to use it: {WHEN_TO_USE['ga_sam']}\n" in shown
    assert "--sam-interval 5" in settings("look_sam") and "--sam-mask" not in settings("sam")


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["sma"])
    message = capsys.readouterr().err
    assert all(word in message for word in ("ga_sam", "path", "sharpness", "got 'sma'"))


def test_folder_and_version(capsys):
    assert main(["path"]) == 0
    assert capsys.readouterr().out == f"{Path(fairseq_sam.__file__).resolve().parent}\n"
    for words, status in ((["--version"], 0), (["path", "there"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == status
    shown = capsys.readouterr()
    assert shown.out == f"fairseq_sam {fairseq_sam.__version__}\n" and "unrecognized arguments: there" in shown.err


def test_looksam_between_refreshes_is_one_pass():
    model = mlp()
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.01), model, method="look_sam", epsilon=0.1)
    passes = [count(sam, model, batch(number))[0] for number in range(11)]
    assert passes == [2, 1, 1, 1, 1] * 2 + [2]
