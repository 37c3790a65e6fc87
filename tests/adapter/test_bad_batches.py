"""Batches and models at the edge of what training meets, for every preset through fairseq's trainer."""

import math

import pytest
import torch
from fairseq.tasks.translation import TranslationTask

from fairseq_sam import PRESETS
from fairseq_sam.adapter.optimizers import unwrap
from tests.adapter import runs

PRESET = pytest.mark.parametrize("preset", PRESETS)


def build(data, preset, *more, epsilon="0.05"):
    few = ["--sam-fisher-samples", "6"] if PRESETS[preset].mask == "fisher" else []
    trainer, batches = runs.build_trainer(
        data, *runs.TRANSLATION, "--max-tokens", "100", "--optimizer", preset, "--sam-epsilon", epsilon, *few, *more
    )
    trainer.reset_dummy_batch(batches[0])
    return trainer, sorted(batches, key=lambda sample: len(sample["id"]))[-3:]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def is_finite(trainer):
    return all(torch.isfinite(p).all() for p in trainer.model.parameters())


def batch_of(trainer, *pairs):
    """Collated sentences, given as lists of word numbers without their end."""
    dataset = trainer.task.dataset("train")
    rows = [
        {"id": i, "source": torch.tensor([*source, dataset.eos]), "target": torch.tensor([*target, dataset.eos])}
        for i, (source, target) in enumerate(pairs)
    ]
    return dataset.collater(rows)


@PRESET
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_as_before_the_batch(
    translation_data, monkeypatch, tmp_path, preset, value
):
    """fairseq's own error; weights, the method's state and crash.pt are those of before the update."""
    trainer, batches = build(translation_data, preset, "--save-dir", str(tmp_path), "--update-freq", "2")
    trainer.train_step(batches[:1])
    before, state = weights(trainer), trainer.optimizer.state_dict()["sharpness_aware"]
    kept = {key: dict(v) if isinstance(v, dict) else v for key, v in state.items()}
    poisoned, original = batches[2], type(trainer.criterion).compute_loss

    def compute_loss(self, model, net_output, sample, reduce=True):
        loss, nll = original(self, model, net_output, sample, reduce)
        has_it = set(sample["id"].tolist()) & set(poisoned["id"].tolist())
        return (loss * value if has_it else loss), nll

    monkeypatch.setattr(type(trainer.criterion), "compute_loss", compute_loss)
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        trainer.train_step([batches[1], poisoned])
    assert runs.same_bits(before, weights(trainer))
    assert runs.same_state(kept, trainer.optimizer.state_dict()["sharpness_aware"])
    crashed = runs.load(tmp_path / "crash.pt")
    assert all(torch.equal(before[name], crashed["model"][name]) for name in before)
    assert runs.same_state(kept, crashed["last_optimizer_state"]["sharpness_aware"])


# The others go on: a perturbation that has no finite gradient or losses is dropped, a step of given rate stays small.
# What throws freelb is the random perturbation that it begins with.
HURT = [
    pair for pair in runs.SCOPED if pair[0] not in {"multistep_defense", "delta_sam", "model_perturbation", "freelb"}
]


@pytest.mark.parametrize(("preset", "scope"), HURT)
def test_a_perturbation_that_ends_the_run_is_named(translation_data, caplog, tmp_path, preset, scope):
    """The flag, its value and what to do stand in the log beside fairseq's error."""
    huge = ("--sam-epsilon", "1e30", "--sam-scope", scope, "--save-dir", str(tmp_path))
    trainer, batches = build(translation_data, preset, *huge, "--update-freq", "2")
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        trainer.train_step(batches[:2])
    assert runs.same_bits(before, weights(trainer))
    assert "update 0 failed at perturbed weights (--sam-epsilon 1e+30, norm of the perturbation" in caplog.text
    assert "Try --sam-epsilon 1e+29, or --sam-epsilon auto" in caplog.text


@pytest.mark.parametrize(("norms", "told"), [(("1.5", "2.5"), False), (("nan", "2.5"), True), (("inf", "inf"), True)])
def test_workers_that_went_apart_are_not_blamed_on_the_perturbation(
    translation_data, monkeypatch, caplog, tmp_path, norms, told
):
    """fairseq says the same of workers whose gradients differ and of those that have one which is not finite."""
    trainer, batches = build(translation_data, "sam", "--save-dir", str(tmp_path))
    ranks = "".join(f"rank {rank:3d} = {norm}\n" for rank, norm in enumerate(norms))

    def clip(*args):
        raise FloatingPointError(f"Fatal error: gradients are inconsistent between workers.\n{ranks}")

    monkeypatch.setattr(trainer, "clip_grad_norm", clip)
    with pytest.raises(FloatingPointError, match="inconsistent"):
        trainer.train_step(batches[:1])
    assert ("failed at perturbed weights" in caplog.text) is told


@pytest.mark.parametrize("poisoned", [(0,), (1,), (0, 1)])
def test_a_batch_that_ends_the_run_is_not_blamed_on_the_perturbation(
    translation_data, monkeypatch, caplog, tmp_path, poisoned
):
    """The loss of a batch is not finite at the unperturbed weights either: a smaller radius would not help."""
    trainer, batches = build(translation_data, "sam", "--update-freq", "2", "--save-dir", str(tmp_path))
    ids = {number for place in poisoned for number in batches[place]["id"].tolist()}
    original = type(trainer.criterion).compute_loss

    def compute_loss(self, model, net_output, sample, reduce=True):
        loss, nll = original(self, model, net_output, sample, reduce)
        return (loss * math.nan if ids & set(sample["id"].tolist()) else loss), nll

    monkeypatch.setattr(type(trainer.criterion), "compute_loss", compute_loss)
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        trainer.train_step(batches[:2])
    assert "failed at perturbed weights" not in caplog.text


@pytest.mark.parametrize(("preset", "scope"), runs.SCOPED)
@pytest.mark.parametrize("empty", [{}, None], ids=["empty", "none"])
def test_an_update_without_a_sample_changes_nothing(translation_data, preset, scope, empty):
    """A worker whose shard is shorter runs dummy batches; here all of an update are."""
    trainer, batches = build(translation_data, preset, "--sam-scope", scope, "--base-optimizer", "sgd")
    trainer.train_step(batches[:1])
    before = weights(trainer)
    trainer.train_step([empty, empty])
    assert runs.same_bits(before, weights(trainer))
    assert unwrap(trainer.optimizer).num_skipped == 0 or scope == "update"
    trainer.train_step(batches[:1])
    assert not runs.same_bits(before, weights(trainer)) and is_finite(trainer)


@PRESET
def test_a_batch_of_one_token(translation_data, preset):
    """A sentence that is its end alone: one instance, sample size 1."""
    trainer, _ = build(translation_data, preset)
    before = weights(trainer)
    for number in range(2):
        trainer.train_step([batch_of(trainer, ([], []))])
        assert trainer.get_num_updates() == number + 1
    assert not runs.same_bits(before, weights(trainer)) and is_finite(trainer)
    assert unwrap(trainer.optimizer).num_skipped == 0


@PRESET
def test_rows_of_padding(translation_data, preset):
    """A sentence whose target is padding alone has no loss; a batch of such sentences has no gradient at all."""
    every = ["--sam-interval", "1"] if preset == "look_sam" else []
    trainer, _ = build(translation_data, preset, "--base-optimizer", "sgd", "--dropout", "0", *every)
    pad = trainer.task.target_dictionary.pad()
    sample = batch_of(trainer, ([5, 6, 7], [8, 9]), ([6, 5], [9]), ([7], [8, 8]))
    sample["target"][1] = pad
    sample["ntokens"] = int((sample["target"] != pad).sum())
    before = weights(trainer)
    trainer.train_step([sample])
    assert not runs.same_bits(before, weights(trainer)) and is_finite(trainer)
    sample["target"][:], sample["ntokens"] = pad, 0
    before, skipped = weights(trainer), unwrap(trainer.optimizer).num_skipped
    trainer.train_step([sample])
    assert runs.same_bits(before, weights(trainer))
    method = PRESETS[preset]
    counts = not (method.ascent == "random" or method.epsilon == 0)
    assert (unwrap(trainer.optimizer).num_skipped > skipped) == counts, "an ascent without gradient is counted"


@PRESET
def test_frozen_embeddings(translation_data, monkeypatch, preset):
    """They are neither trained nor moved; attacks on their outputs still work."""
    original = TranslationTask.build_model

    def build_model(self, cfg, from_checkpoint=False):
        model = original(self, cfg, from_checkpoint)
        model.encoder.embed_tokens.weight.requires_grad_(False)
        return model

    monkeypatch.setattr(TranslationTask, "build_model", build_model)
    seen, forward = [], torch.nn.Embedding.forward

    def watched(self, words):
        seen.append(self.weight.detach().clone() if not self.weight.requires_grad else None)
        return forward(self, words)

    trainer, batches = build(translation_data, preset, epsilon="0.5")
    monkeypatch.setattr(torch.nn.Embedding, "forward", watched)
    frozen, before = trainer.model.encoder.embed_tokens.weight, weights(trainer)
    for sample in batches:
        trainer.train_step([sample])
    after = weights(trainer)
    name = "encoder.embed_tokens.weight"
    assert torch.equal(before[name], after[name]) and frozen.grad is None
    looked_up = [weight for weight in seen if weight is not None]
    assert looked_up and all(torch.equal(weight, before[name]) for weight in looked_up)
    assert any(not torch.equal(before[key], after[key]) for key in before) and is_finite(trainer)
    assert unwrap(trainer.optimizer).num_skipped == 0


@PRESET
def test_parameter_groups_with_their_own_learning_rates(translation_data, monkeypatch, preset):
    """One ascent over all groups; the base optimizer applies each group's rate to its part of the gradient."""
    found = []
    for rates in ((0.1, 0.1), (0.1, 0.0)):
        trainer, batches = build(translation_data, preset, "--base-optimizer", "sgd", "--lr", "0.1", "--dropout", "0")
        torch_optimizer = unwrap(trainer.optimizer).base.optimizer
        (group,) = torch_optimizer.param_groups
        params = group["params"]
        torch_optimizer.param_groups.clear()
        for part, rate in zip((params[::2], params[1::2]), rates, strict=True):
            torch_optimizer.add_param_group(
                {**{k: v for k, v in group.items() if k != "params"}, "params": part, "lr": rate}
            )
        before = [p.detach().clone() for p in params]
        trainer.train_step(batches[:1])
        found.append([p.detach() - old for p, old in zip(params, before, strict=True)])
    (both, one) = found
    assert all(torch.equal(a, b) for a, b in zip(both[::2], one[::2], strict=True))
    assert not any(change.any() for change in one[1::2]) and any(change.any() for change in both[1::2])
