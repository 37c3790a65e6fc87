"""Slices of every task's batches: rows, counts, trimmed padding; losses of instances equal to running each alone."""

import copy
import itertools

import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from torch import nn

from fairseq_sam.adapter import instance_losses as registry
from fairseq_sam.adapter.instance_losses import (
    capture_output,
    check_criterion,
    instance_losses,
    register_instance_losses,
)
from fairseq_sam.adapter.slicing import Slicer, UnsliceableBatchError
from tests.adapter import runs
from tests.adapter.test_tasks import RECIPES, data_of  # noqa: F401

CASES = {
    **RECIPES,
    "label_smoothed_prefix": ("translation", [*runs.TRANSLATION, "--ignore-prefix-size", "1", "--sentence-avg"]),
    "left_pad_off": ("translation", [*runs.TRANSLATION, "--left-pad-source", "--left-pad-target"]),
    "lm_by_sentence": (
        "lm", [*RECIPES["transformer_lm"][1], "--sample-break-mode", "eos", "--tokens-per-sample", "64"],
    ),
    "adaptive_dropout": ("lm", [*RECIPES["transformer_lm_adaptive"][1], "--adaptive-softmax-dropout", "0.3"]),
    "masked_lm_by_sentence": (
        "lm", [*RECIPES["masked_lm"][1], "--sample-break-mode", "eos", "--mask-prob", "0.1"],
    ),
    "bart_sentence_prediction": (
        "cls",
        ["--task", "sentence_prediction", "--num-classes", "2", "--init-token", "0", "--arch", "bart_base", *runs.TINY,
         "--criterion", "sentence_prediction", "--add-prev-output-tokens", "--max-source-positions", "64",
         "--max-target-positions", "64"],
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, data_of):  # noqa: F811
    kind, flags = CASES[request.param]
    trainer, batches = runs.build_trainer(data_of[kind], *flags, "--optimizer", "adam")
    batch = max(batches, key=lambda sample: len(sample["id"]))
    if request.param.endswith("by_sentence"):
        batch = max(
            batches, key=lambda s: int(s["net_input"]["src_lengths"].max() - s["net_input"]["src_lengths"].min())
        )
    assert len(batch["id"]) >= 4
    return trainer, batch


def run(trainer, sample, train=False):
    trainer.model.train(train)
    trainer.criterion.train(train)
    return trainer.criterion(trainer.model, sample)


def test_slices_have_their_rows_and_counts(case):
    trainer, sample = case
    slicer, before = Slicer(trainer.task), copy.deepcopy(sample)
    number = slicer.num_instances(sample)
    assert number == len(sample["id"])
    assert slicer.select(sample, range(number)) is sample
    cuts = [0, 1, number // 2, number]
    parts = [slicer.select(sample, range(a, b)) for a, b in itertools.pairwise(cuts)]
    assert runs.same_state(before, sample), "the given sample stays as it is"
    assert [part["nsentences"] for part in parts] == [b - a for a, b in itertools.pairwise(cuts)]
    assert sum(part["ntokens"] for part in parts) == sample["ntokens"]
    assert all(type(part["ntokens"]) is type(sample["ntokens"]) and list(part) == list(sample) for part in parts)
    assert torch.equal(torch.cat([part["id"] for part in parts]), sample["id"])
    trainer.model.double(), trainer.criterion.double()
    loss, sample_size, _ = run(trainer, sample)
    results = [run(trainer, part) for part in parts]
    torch.testing.assert_close(sum(r[0] for r in results), loss, rtol=1e-6, atol=1e-6)
    assert sum(int(r[1]) for r in results) == int(sample_size)
    picked = slicer.select(sample, [number - 1, 0])
    assert picked["id"].tolist() == [int(sample["id"][-1]), int(sample["id"][0])]


def test_each_instance_is_as_its_dataset_collates_it(case):
    """What the dataset's own collater makes of the one item: its counts, and the width that it needs."""
    trainer, sample = case
    slicer, dataset = Slicer(trainer.task), trainer.task.dataset("train")
    dataset.set_epoch(1)
    for i in range(3):
        single = slicer.select(sample, [i])
        own = dataset.collater([dataset[int(sample["id"][i])]])
        if trainer.cfg.task._name == "denoising":  # each item is noised anew, to another length
            assert single["ntokens"] == int(single["target"].ne(1).sum())
            continue
        assert single["ntokens"] == own["ntokens"]
        assert single["net_input"].keys() == own["net_input"].keys()
        for key in ("src_tokens", "prev_output_tokens"):
            if key in own["net_input"]:
                assert single["net_input"][key].shape == own["net_input"][key].shape, "padding is trimmed"


def test_a_sample_without_nsentences_and_without_id(case):
    """The number of instances is then read off from the tensors; tokens are counted all the same."""
    trainer, sample = case
    slicer = Slicer(trainer.task)
    whole = slicer.select(sample, [1, 2])
    for key in ("nsentences", "id"):
        sample = {k: v for k, v in sample.items() if k != key}
        assert slicer.num_instances(sample) == len(sample["target"])
        part = slicer.select(sample, [1, 2])
        assert key not in part and part["ntokens"] == whole["ntokens"]
        assert runs.same_state(part["net_input"], whole["net_input"])


def losses_of(trainer, sample, train=False):
    with capture_output(trainer.criterion, trainer.model) as captured:
        loss, _, _ = run(trainer, sample, train)
    return instance_losses(trainer.criterion, trainer.model, captured, sample, len(sample["target"]), loss), loss


def test_instance_losses_equal_those_of_each_instance_alone(case):
    trainer, sample = case
    trainer.model.double(), trainer.criterion.double()
    slicer = Slicer(trainer.task)
    losses, loss = losses_of(trainer, sample)
    alone = torch.stack([run(trainer, slicer.select(sample, [i]))[0].sum() for i in range(len(losses))])
    assert losses.shape == (len(sample["id"]),)
    torch.testing.assert_close(losses.double(), alone.double(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(losses.double().sum(), loss.double().sum(), rtol=1e-6, atol=1e-8)


def test_their_weighted_gradient_equals_that_of_each_instance_alone(case):
    """To single precision: fairseq computes the softmax in it."""
    trainer, sample = case
    trainer.model.double(), trainer.criterion.double()
    slicer, parameters = Slicer(trainer.task), [p for p in trainer.model.parameters() if p.requires_grad]
    losses, _ = losses_of(trainer, sample)
    weights = torch.linspace(0.1, 2.0, len(losses), dtype=losses.dtype)

    def gradients(loss):
        for p in parameters:
            p.grad = None
        if loss.requires_grad:
            loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    found = gradients((weights * losses).sum())
    each = [gradients(w * run(trainer, slicer.select(sample, [i]))[0].sum()) for i, w in enumerate(weights.tolist())]
    for g, parts in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(g, sum(parts), rtol=1e-3, atol=3e-5)


def test_they_add_up_in_training_mode_with_its_dropout(case):
    """The losses are those of the pass that ran, dropout included, not of another one."""
    trainer, sample = case
    losses, loss = losses_of(trainer, sample, train=True)
    torch.testing.assert_close(losses.sum(), loss.sum(), rtol=1e-4, atol=1e-4)


def test_a_sentence_without_a_masked_token_has_loss_zero(language_model_data):
    trainer, batches = runs.build_trainer(language_model_data, *RECIPES["masked_lm"][1], "--optimizer", "adam")
    sample, pad = batches[0], trainer.task.source_dictionary.pad()
    sample["target"][1] = pad
    losses, _ = losses_of(trainer, sample)
    assert float(losses[1].detach()) == 0.0 and float(losses[0].detach()) > 0
    sample["target"].fill_(pad)
    losses, loss = losses_of(trainer, sample)
    assert not losses.any() and float(loss) == 0.0 and losses.requires_grad


# -- samples that no fairseq task of the list makes --------------------------------------------------------------------


@pytest.fixture
def translation(translation_data):
    trainer, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, "--optimizer", "adam")
    return Slicer(trainer.task), copy.deepcopy(max(batches, key=lambda sample: len(sample["id"])))


def test_lists_tensor_counts_and_unknown_parts(translation):
    slicer, sample = translation
    number = len(sample["id"])
    sample["names"] = [f"sentence {i}" for i in range(number)]
    sample["net_input"]["weights"] = torch.arange(number)
    sample["net_input"]["flag"], sample["ntokens"] = True, torch.tensor(sample["ntokens"])
    sample["target"] = [sample["target"], sample["target"] + 0]
    part = slicer.select(sample, [3, 1])
    assert part["names"] == ["sentence 3", "sentence 1"] and part["net_input"]["weights"].tolist() == [3, 1]
    assert part["net_input"]["flag"] is True and torch.is_tensor(part["ntokens"])
    assert [len(target) for target in part["target"]] == [2, 2]
    sample["net_input"]["columns"] = torch.zeros(number, 99)
    assert slicer.select(sample, [0])["net_input"]["src_tokens"].shape[1] == sample["net_input"]["src_tokens"].shape[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(alignments=torch.zeros(99, 2)), ("alignments", "(99, 2)")),
        (lambda s: s.update(sample_size=7), ("sample_size", "7")),
        (lambda s: s.update(ntokens=1), ("ntokens is 1",)),
        (lambda s: s.update(names=["a"]), ("names", "list of 1")),
        (lambda s: s["net_input"].update(scale=torch.tensor(1.0)), ("net_input.scale", "()")),
        (lambda s: (s.pop("id"), s["net_input"].update(x=torch.zeros(2, 2))), ("no id", "net_input.x")),
        (lambda s: s.pop("net_input"), ("net_input", "keys")),
    ],
)
def test_a_batch_that_cannot_be_sliced_says_why(translation, change, words):
    slicer, sample = translation
    change(sample)
    with pytest.raises(UnsliceableBatchError) as caught:
        slicer.select(sample, [0])
    assert all(word in str(caught.value) for word in (*words, "--optimizer sam"))


def test_a_sample_of_several_languages_is_refused():
    with pytest.raises(UnsliceableBatchError, match="de-en, fr-en"):
        Slicer(None).num_instances({"de-en": {}, "fr-en": {}})


# -- the registry ------------------------------------------------------------------------------------------------------


class Plain(CrossEntropyCriterion):
    """Changes nothing of the loss."""


class Other(CrossEntropyCriterion):
    def forward(self, model, sample, reduce=True):
        loss, sample_size, log = super().forward(model, sample, reduce)
        return 2 * loss, sample_size, log


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def test_a_subclass_with_a_loss_of_its_own_must_register(clean_registry, translation_data):
    check_criterion(Plain)
    with pytest.raises(ValueError, match=r"Other does not say it.*register_instance_losses"):
        check_criterion(Other)
    trainer, batches = runs.build_trainer(translation_data, *RECIPES["lstm_translation"][1], "--optimizer", "adam")
    criterion = trainer.criterion
    criterion.__class__ = Other

    @register_instance_losses(Other)
    def wrong(criterion, model, output, sample):
        return registry._REGISTRY[CrossEntropyCriterion].losses(criterion, model, output, sample)

    with pytest.raises(ValueError, match=r"registered for Other add up to .* but the criterion's loss is"):
        losses_of(trainer, batches[0])

    @register_instance_losses(Other)
    def right(criterion, model, output, sample):
        return 2 * wrong(criterion, model, output, sample)

    losses, loss = losses_of(trainer, batches[0])
    torch.testing.assert_close(losses.sum(), loss)


WRONG = {
    "per token": lambda losses: losses.repeat_interleave(3),
    "a column": lambda losses: losses.unsqueeze(1),
    "a sum": lambda losses: losses.sum(),
    "nothing": lambda losses: None,
    "detached": lambda losses: losses.detach(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_instance_losses_of_a_wrong_form_are_refused(clean_registry, translation_data, wrong):
    trainer, batches = runs.build_trainer(translation_data, *RECIPES["lstm_translation"][1], "--optimizer", "delta_sam")
    trainer.criterion.__class__ = Other
    plain = registry._REGISTRY[CrossEntropyCriterion].losses

    @register_instance_losses(Other)
    def losses(criterion, model, output, sample):
        return WRONG[wrong](2 * plain(criterion, model, output, sample))

    number = len(batches[0]["id"])
    with pytest.raises(ValueError, match=rf"registered for Other must be a tensor of shape \({number},\)"):
        trainer.train_step(batches[:1])


def test_a_model_that_does_not_run_is_noticed(translation_data):
    trainer, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, "--optimizer", "adam")
    with capture_output(trainer.criterion, nn.Linear(1, 1)) as captured:
        run(trainer, batches[0])
    with pytest.raises(ValueError, match="did not call the module"):
        instance_losses(trainer.criterion, trainer.model, captured, batches[0], len(batches[0]["id"]))
    assert not trainer.model._forward_hooks
