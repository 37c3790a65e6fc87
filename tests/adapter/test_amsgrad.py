"""AMSGrad is torch's, alone and within a preset."""

import pytest
import torch
from fairseq import optim
from omegaconf import OmegaConf

from fairseq_sam.adapter.errors import ConfigurationError
from tests.adapter import runs


def amsgrad(weights, **changed):
    values = {"lr": [0.01], "adam_betas": "(0.8, 0.9)", "adam_eps": 1e-10, "weight_decay": 0.1, "tpu": False, **changed}
    return optim.build_optimizer(OmegaConf.create({"_name": "amsgrad", **values}), weights)


def test_the_update_is_torch_s():
    """Gradients become small, so that the largest second moment is not the last one."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(5, 3, generator=generator).requires_grad_()
    second = first.detach().clone().requires_grad_()
    ours, theirs = amsgrad([first]), torch.optim.AdamW([second], 0.01, (0.8, 0.9), 1e-10, 0.1, amsgrad=True)
    plain = torch.optim.AdamW([third := first.detach().clone().requires_grad_()], 0.01, (0.8, 0.9), 1e-10, 0.1)
    for number in range(12):
        gradient = torch.randn(5, 3, generator=generator) * 0.5**number
        for weight, optimizer in ((first, ours), (second, theirs), (third, plain)):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert (first - third).abs().max() > 1e-3


def test_within_a_preset(translation_data):
    """At epsilon 0 bit for bit the base; with --adam-betas, and without momentum."""
    results = {}
    for name, optimizer in {
        "amsgrad": ["--optimizer", "amsgrad"],
        "epsilon 0": ["--optimizer", "fisher_sam", "--base-optimizer", "amsgrad", "--sam-epsilon", "0"],
        "perturbed": ["--optimizer", "sam", "--base-optimizer", "amsgrad", "--sam-epsilon", "0.1"],
        "adam": ["--optimizer", "adam"],
    }.items():
        trainer, batches = runs.build_trainer(
            translation_data, *runs.TRANSLATION, *optimizer, "--adam-betas", "(0.0, 0.9)", "--weight-decay", "0.01"
        )
        for number in range(4):
            trainer.train_step(batches[number : number + 1])
        results[name] = {key: weight.clone() for key, weight in trainer.model.state_dict().items()}
    assert runs.same_bits(results["amsgrad"], results["epsilon 0"])
    assert not runs.same_bits(results["amsgrad"], results["perturbed"])
    assert not runs.same_bits(results["amsgrad"], results["adam"])


def test_adam_s_half_precision_state_is_refused():
    with pytest.raises(ConfigurationError, match="--fp16-adam-stats cannot be used with amsgrad"):
        amsgrad([torch.zeros(2).requires_grad_()], fp16_adam_stats=True)
