"""The bias of an attention key projection: a gradient of pure rounding noise, on which 1 / ||g|| alone explodes."""

import math

import pytest
import torch

from tests.adapter import runs

ARCH = ["--arch", "transformer_tiny", "--criterion", "label_smoothed_cross_entropy", "--dropout", "0.0"]
EPSILON = 1e-4


def one_step(data, *options):
    """Weights seen by the last pass of a GA-SAM step on transformer_tiny in float64, and what was logged."""
    from fairseq.logging import metrics

    trainer, batches = runs.build_trainer(
        data, *ARCH, "--optimizer", "ga_sam", "--sam-norm", "linf", "--sam-epsilon", str(EPSILON), *options
    )
    trainer.model.double()
    seen, gradients, losses = [], {}, []
    original = trainer.task.train_step

    def train_step(*args, **kwargs):
        seen.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        result = original(*args, **kwargs)
        losses.append(float(result[0]))
        gradients.update(
            {name: p.grad.clone() for name, p in trainer.model.named_parameters()} if not gradients else {}
        )
        return result

    trainer.task.train_step = train_step
    try:
        from fairseq_sam.adapter.optimizers import unwrap
        from fairseq_sam.adapter.seam import SharpnessAwareTrainStep

        step = SharpnessAwareTrainStep(trainer, unwrap(trainer.optimizer), batches[:1])
        with metrics.aggregate(new_root=True) as logged:
            step(batches[0], trainer.model, trainer.criterion, trainer.optimizer, 0)
            step.log()
        values = logged.get_smoothed_values()
    finally:
        del trainer.task.train_step
    moved = {name: float((seen[1][name] - seen[0][name]).abs().max()) for name in seen[0]}
    return moved, gradients, losses, values


def key_biases(names):
    return [name for name in names if name.endswith("k_proj.bias")]


def test_the_gradient_is_rounding_noise(translation_data):
    """In float64 about 1e-16 on the summed gradient; 1e-7 in encoder attention, whose softmax is float32 in fairseq."""
    _, gradients, _, _ = one_step(translation_data)
    found = key_biases(gradients)
    assert len(found) == 6
    real = min(float(g.norm()) for name, g in gradients.items() if name not in found)
    assert real > 0.1
    for name in found:
        assert float(gradients[name].norm()) < (1e-6 if "encoder_attn" in name else 1e-14)


def test_grouped_by_tensor_and_uncapped_the_step_explodes(translation_data):
    moved, _, _, logged = one_step(translation_data, "--sam-granularity", "tensor", "--sam-max-scale", "inf")
    for name in key_biases(moved):
        assert moved[name] > (100.0 if "encoder_attn" in name else 1e9)
    assert logged["sam_eps"] > 1e9


@pytest.mark.parametrize(
    ("options", "num_capped"),
    [((), 0), (("--sam-max-scale", "inf"), 0), (("--sam-granularity", "tensor"), 6)],
    ids=["layer, cap", "layer, no cap", "tensor, cap"],
)
def test_either_remedy_keeps_the_step_small(translation_data, options, num_capped):
    """Grouping by module suffices and the default cap does not bind there; alone, the cap bounds the noise as well."""
    moved, gradients, losses, logged = one_step(translation_data, *options)
    assert math.isfinite(losses[1]) and abs(losses[1] - losses[0]) < 0.5 * losses[0]
    assert logged["sam_capped"] == num_capped
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    sample_size = 1.0 / (norm / logged["sam_gnorm"])
    bound = EPSILON * 1000.0 / (norm * sample_size)
    assert max(moved.values()) <= bound * 1.001


def test_in_half_precision_the_capped_step_is_finite(translation_data):
    """What the cap is for: without it the moved bias overflows fp16."""
    for options, finite in (((), True), (("--sam-granularity", "tensor", "--sam-max-scale", "inf"), False)):
        moved, _, _, _ = one_step(translation_data, *options)
        assert bool(torch.isfinite(torch.tensor(max(moved.values())).half())) is finite
