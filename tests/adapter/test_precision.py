"""Half precision: the gradient's unit, the masters, epsilon 0. On CPU where fairseq runs there, else on a GPU."""

import pytest
import torch
from fairseq.logging import metrics

from fairseq_sam import PRESETS
from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.adapter.precision import loss_scale, master_weights
from fairseq_sam.core.axes import TENSOR_GRANULARITIES
from tests.adapter import runs

ON_CPU = {
    "fp16 not flat": ["--fp16", "--fp16-no-flatten-grads"],
    "memory-efficient fp16": ["--fp16", "--memory-efficient-fp16"],
}
HALF_ON_CPU = {**ON_CPU, "memory-efficient bf16": ["--bf16", "--memory-efficient-bf16"]}
ON_GPU = {**ON_CPU, "amp": ["--amp"], "fp32": [], "fp16 flat": ["--fp16", "--sam-granularity", "model"]}


def states(data, mode, *options, cpu=True):
    trainer, batches = runs.build_trainer(
        data, *runs.TRANSLATION, *mode, "--fp16-init-scale", "4", "--fp16-scale-window", "100", *options
    )
    for number in range(3):
        trainer.train_step(batches[2 * number : 2 * number + 2])
    return trainer, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("mode", ON_CPU)
@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_epsilon_zero(translation_data, mode, scope):
    _, plain = states(translation_data, ON_CPU[mode], "--optimizer", "adam")
    zero = ("--optimizer", "ga_sam", "--sam-epsilon", "0", "--sam-steps", "2", "--sam-scope", scope)
    _, found = states(translation_data, ON_CPU[mode], *zero)
    assert all(w.dtype == torch.float16 for w in plain.values())
    assert runs.same_bits(plain, found)


@pytest.mark.parametrize("mode", ON_CPU)
def test_the_gradient_is_unscaled_for_the_scale(translation_data, mode):
    """The same perturbation whatever the loss scale: T = 1 / ||g|| sees the unscaled gradient."""
    norms = []
    for scale in ("4", "64"):
        trainer, batches = runs.build_trainer(
            translation_data, *runs.TRANSLATION, *ON_CPU[mode], "--fp16-init-scale", scale, "--optimizer", "ga_sam",
            "--sam-norm", "linf", "--dropout", "0",
        )  # fmt: skip
        assert loss_scale(trainer.optimizer) == float(scale)
        with metrics.aggregate(new_root=True) as logged:
            trainer.train_step(batches[:1])
        norms.append(logged.get_smoothed_values()["sam_gnorm"])
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def logged_survival(data, *flags):
    """The survived part in each of two updates, and whether the user was warned."""
    trainer, batches = runs.build_trainer(data, *runs.TRANSLATION, "--fp16-init-scale", "4", *flags)
    found = []
    for number in range(2):
        with metrics.aggregate(new_root=True) as logged:
            trainer.train_step(batches[number : number + 1])
        found.append(logged.get_smoothed_values().get("sam_survived"))
    return found


SMALL = ["--optimizer", "sam", "--sam-norm", "linf", "--sam-epsilon", "2e-6"]


@pytest.mark.parametrize(
    ("mode", "rounding", "survives"),
    [
        ("fp16 not flat", [], True),
        ("memory-efficient fp16", [], False),
        ("memory-efficient fp16", ["--sam-rounding", "stochastic"], True),
        ("memory-efficient bf16", [], False),
        ("memory-efficient bf16", ["--sam-rounding", "stochastic"], True),
    ],
)
def test_what_survives_of_a_small_perturbation(translation_data, caplog, mode, rounding, survives):
    """fp32 masters keep it, and so does rounding at random; else the user is warned, once, with the remedies.

    Masters that were just made from rounded weights are as rounded as these: no warning before they have moved.
    """
    with caplog.at_level("WARNING", "fairseq_sam"):
        found = logged_survival(translation_data, *HALF_ON_CPU[mode], *SMALL, *rounding)
    assert all(0 <= part <= 1 for part in found)
    assert found[1] > 0.6 if survives else max(found) < 0.5
    warnings = [r.getMessage() for r in caplog.records if "of the perturbation" in r.getMessage()]
    assert len(warnings) == (0 if survives else 1)
    dtype = "bfloat16" if "bf16" in mode else " float16"
    assert all(word in m for m in warnings for word in (dtype, "--amp", "--sam-epsilon", "--sam-rounding stochastic"))


def test_float32_logs_no_survival(translation_data):
    assert logged_survival(translation_data, *SMALL) == [None, None]


def test_masters_belong_to_their_parameters(translation_data):
    trainer, _ = runs.build_trainer(translation_data, *runs.TRANSLATION, *ON_CPU["fp16 not flat"], "--optimizer", "sam")
    assert unwrap(trainer.optimizer) is trainer.optimizer.fp32_optimizer
    tensors = list(trainer.model.parameters())
    masters = master_weights(trainer.optimizer, tensors)
    assert len(masters) == len(tensors)
    for master, tensor in zip(masters, tensors, strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.half(), tensor.detach())


def test_flat_masters_are_cut_in_the_parameters_order():
    from fairseq.optim import FP16Optimizer

    holder = object.__new__(FP16Optimizer)
    holder.fp16_params = [torch.nn.Parameter(torch.full((2, 3), 1.0)), torch.nn.Parameter(torch.full((4,), 2.0))]
    flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) + 0.25 for p in holder.fp16_params]))
    holder.fp32_params = {0: flat}
    masters = master_weights(holder, list(reversed(holder.fp16_params)))
    assert [m.shape for m in masters] == [(4,), (2, 3)]
    assert (masters[0] == 2.25).all() and (masters[1] == 1.25).all()


def on_gpu(test):
    reason = "no CUDA device: fp16, AMP and CUDA's random state need one"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


@on_gpu
@pytest.mark.parametrize("mode", ON_GPU)
def test_epsilon_zero_on_a_gpu(translation_data, monkeypatch, mode):
    monkeypatch.setattr(runs, "COMMON", runs.COMMON.replace(" --cpu", ""))
    _, plain = states(translation_data, [f for f in ON_GPU[mode] if f not in ("--sam-granularity", "model")],
                      "--optimizer", "adam")  # fmt: skip
    zero = ("--optimizer", "ga_sam", "--sam-epsilon", "0")
    trainer, found = states(translation_data, ON_GPU[mode], *zero)
    assert next(trainer.model.parameters()).is_cuda
    assert runs.same_bits(plain, found)
    _, moved = states(translation_data, ON_GPU[mode], "--optimizer", "ga_sam", "--sam-norm", "linf")
    assert not runs.same_bits(plain, moved) and all(torch.isfinite(w).all() for w in moved.values())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.mode(mode)) for mode in ON_CPU])
def test_every_preset_trains_in_half_precision(translation_data, mode, preset):
    """The radius is large enough for the weights' rounding; nothing overflows, and the loss scale stays."""
    few = ["--sam-fisher-samples", "4"] if PRESETS[preset].mask == "fisher" else []
    epsilon = ["--sam-epsilon", "0.5"] if preset not in ("layer_sam", "ga_sam", "multistep_defense", "freelb") else []
    _, plain = states(translation_data, ON_CPU[mode], "--optimizer", "adam")
    trainer, found = states(translation_data, ON_CPU[mode], "--optimizer", preset, *few, *epsilon)
    assert loss_scale(trainer.optimizer) == 4.0 and unwrap(trainer.optimizer).num_skipped == 0
    assert all(w.dtype == torch.float16 and torch.isfinite(w).all() for w in found.values())
    assert not runs.same_bits(plain, found)


GPU_MODES = {
    "fp32": [], "fp16": ["--fp16"], "fp16 not flat": ["--fp16", "--fp16-no-flatten-grads"],
    "memory-efficient fp16": ["--fp16", "--memory-efficient-fp16"], "bf16": ["--bf16"],
    "memory-efficient bf16": ["--bf16", "--memory-efficient-bf16"], "amp": ["--amp"],
}  # fmt: skip
FLAT = [p for p, m in PRESETS.items() if not (m.has_groups and m.granularity in TENSOR_GRANULARITIES)]


@on_gpu
@pytest.mark.parametrize(
    ("mode", "preset"),
    [
        pytest.param(mode, preset, marks=pytest.mark.mode(mode), id=f"{mode}-{preset}")
        for mode in GPU_MODES
        for preset in (FLAT if mode == "fp16" else PRESETS)
    ],
)
def test_every_preset_on_a_gpu(translation_data, monkeypatch, mode, preset):
    """Masks, random directions and losses of instances live on the device; nothing overflows."""
    monkeypatch.setattr(runs, "COMMON", runs.COMMON.replace(" --cpu", ""))
    few = ["--sam-fisher-samples", "4"] if PRESETS[preset].mask == "fisher" else []
    trainer, found = states(translation_data, GPU_MODES[mode], "--optimizer", preset, *few)
    assert next(trainer.model.parameters()).is_cuda and unwrap(trainer.optimizer).num_skipped == 0
    assert all(torch.isfinite(w).all() for w in found.values())
