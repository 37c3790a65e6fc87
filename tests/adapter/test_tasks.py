"""Any task, criterion and model: epsilon 0 is the base bit for bit, and every preset trains with finite weights."""

import pytest
import torch

from fairseq_sam import PRESETS
from tests.adapter import runs

ENCODER = (
    "--encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 2 "
    "--max-positions 128 --dropout 0.1"
).split()
DECODER = (
    "--decoder-layers 1 --decoder-embed-dim 16 --decoder-ffn-embed-dim 24 --decoder-attention-heads 2 --dropout 0.1"
).split()
LM_TASK = ["--task", "language_modeling", "--tokens-per-sample", "32"]
RECIPES = {
    "transformer_lm": ("lm", [*LM_TASK, "--arch", "transformer_lm", *DECODER, "--criterion", "cross_entropy"]),
    "transformer_lm_adaptive": (
        "lm",
        [*LM_TASK, "--arch", "transformer_lm", *DECODER, "--criterion", "adaptive_loss",
         "--adaptive-softmax-cutoff", "50,200", "--ddp-backend", "legacy_ddp"],
    ),
    "lstm_lm": (
        "lm",
        [*LM_TASK, "--arch", "lstm_lm", "--criterion", "cross_entropy", "--decoder-embed-dim", "16",
         "--decoder-hidden-size", "16", "--decoder-out-embed-dim", "16", "--decoder-layers", "2", "--dropout", "0.1"],
    ),
    "masked_lm": (
        "lm",
        ["--task", "masked_lm", "--tokens-per-sample", "32", "--arch", "roberta", *ENCODER, "--criterion", "masked_lm"],
    ),
    "denoising": (
        "lm",
        ["--task", "denoising", "--tokens-per-sample", "32", "--arch", "bart_base", *runs.TINY, "--mask", "0.3",
         "--mask-length", "span-poisson", "--criterion", "cross_entropy", "--max-source-positions", "128",
         "--max-target-positions", "128", "--dropout", "0.1"],
    ),
    "sentence_prediction": (
        "cls",
        ["--task", "sentence_prediction", "--num-classes", "2", "--init-token", "0", "--arch", "roberta", *ENCODER,
         "--criterion", "sentence_prediction", "--classification-head-name", "head"],
    ),
    "sentence_prediction_regression": (
        "cls",
        ["--task", "sentence_prediction", "--num-classes", "1", "--init-token", "0", "--arch", "roberta", *ENCODER,
         "--criterion", "sentence_prediction", "--classification-head-name", "head", "--regression-target"],
    ),
    "lstm_translation": (
        "translation",
        ["--arch", "lstm", "--encoder-embed-dim", "16", "--decoder-embed-dim", "16", "--encoder-hidden-size", "16",
         "--decoder-hidden-size", "16", "--decoder-out-embed-dim", "16", "--criterion", "cross_entropy"],
    ),
    "layerdrop": ("translation", [*runs.TRANSLATION, "--encoder-layers", "3", "--encoder-layerdrop", "0.5"]),
    "activation_checkpointing": ("translation", [*runs.TRANSLATION, "--checkpoint-activations"]),
}  # fmt: skip


# Methods without a pass at the unperturbed weights and embeddings, whose first pass is all there is to log.
NOT_CLEAN = ("random_sam", "freelb")


@pytest.fixture
def data_of(translation_data, language_model_data, classification_data):
    return {"translation": translation_data, "lm": language_model_data, "cls": classification_data}


def trained(data, recipe, *optimizer):
    trainer, batches = runs.build_trainer(data, *recipe, *optimizer)
    logged = []
    for number in range(3):
        logged.append(trainer.train_step(batches[2 * number : 2 * number + 2]))
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, logged


@pytest.mark.parametrize("name", RECIPES)
def test_epsilon_zero_on_every_task(data_of, name):
    kind, recipe = RECIPES[name]
    plain, _ = trained(data_of[kind], recipe, "--optimizer", "adam")
    found, logged = trained(data_of[kind], recipe, "--optimizer", "ga_sam", "--sam-epsilon", "0", "--sam-steps", "2")
    assert runs.same_bits(plain, found)
    assert all(log is not None for log in logged)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", RECIPES)
def test_presets_on_every_task(data_of, name, preset):
    kind, recipe = RECIPES[name]
    plain, clean = trained(data_of[kind], recipe, "--optimizer", "adam")
    more = ["--sam-fisher-samples", "4", "--sam-sparsity", "0.5"] if PRESETS[preset].mask == "fisher" else []
    more += ["--sam-epsilon", "0.05", "--max-tokens", "100"] if preset == "instance_sam" else []
    found, logged = trained(data_of[kind], recipe, "--optimizer", preset, *more)
    assert all(torch.isfinite(w).all() for w in found.values())
    assert not runs.same_bits(plain, found)
    if not PRESETS[preset].needs_instances and preset not in NOT_CLEAN:
        assert logged[0]["loss"] == pytest.approx(clean[0]["loss"]), (
            "the logged loss of the first update is the clean one"
        )
