"""fairseq's own sentence ranking, for COPA: slices of its batches, losses of instances, every method on it."""

import copy

import pytest
import torch

from fairseq_sam import PRESETS
from fairseq_sam.adapter.slicing import Slicer, UnsliceableBatchError
from tests.adapter import runs
from tests.adapter.test_slicing import (  # noqa: F401  they run on the case below
    losses_of,
    test_instance_losses_equal_those_of_each_instance_alone,
    test_slices_have_their_rows_and_counts,
    test_their_weighted_gradient_equals_that_of_each_instance_alone,
    test_they_add_up_in_training_mode_with_its_dropout,
)
from tests.adapter.test_tasks import trained
from tests.recipes import glue_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokens = glue_files.write_wordpiece(tmp_path_factory.mktemp("tokens"))
    return glue_files.prepared(tmp_path_factory.mktemp("data"), "COPA", tokens)


@pytest.fixture
def case(folder):
    trainer, batches = runs.build_trainer(folder, *glue_files.flags_of("COPA"), "--optimizer", "adam")
    return trainer, max(batches, key=lambda sample: len(sample["id"]))


def test_each_choice_is_as_its_dataset_collates_it(case):
    """Padding is trimmed, of each choice for itself."""
    trainer, sample = case
    slicer, dataset = Slicer(trainer.task), trainer.task.dataset("train")
    assert slicer.num_instances(sample) == len(sample["id"])
    own = {int(dataset[n]["id"]): n for n in range(len(dataset))}
    for i in range(len(sample["id"])):
        single = slicer.select(sample, [i])
        alone = dataset.collater([dataset[own[int(sample["id"][i])]]])
        assert runs.same_state(dict(single["net_input1"]), dict(alone["net_input1"]))
        assert runs.same_state(dict(single["net_input2"]), dict(alone["net_input2"]))
        assert single["ntokens"] == alone["ntokens"] and torch.equal(single["target"], alone["target"])


def test_all_choices_must_have_the_instances(case):
    trainer, sample = case
    broken = copy.deepcopy(sample)
    broken["net_input2"]["src_tokens"] = broken["net_input2"]["src_tokens"][1:]
    with pytest.raises(UnsliceableBatchError, match=r"net_input2\.src_tokens"):
        Slicer(trainer.task).select(broken, [0])
    broken.pop("id")
    with pytest.raises(UnsliceableBatchError, match=r"no id, and its tensors have the lengths .*net_input2.src_tokens"):
        Slicer(trainer.task).num_instances(broken)


def test_losses_are_those_of_the_choices(case):
    """Cross entropy of the scores that two calls of the model give."""
    trainer, sample = case
    losses, _ = losses_of(trainer, sample)
    trainer.model.eval()
    scores = [
        trainer.model(**sample[f"net_input{k}"], classification_head_name="sentence_classification_head")[0]
        for k in (1, 2)
    ]
    expected = torch.nn.functional.cross_entropy(torch.cat(scores, 1), sample["target"], reduction="none")
    torch.testing.assert_close(losses, expected)


FLAGS = [*glue_files.flags_of("COPA"), "--batch-size", "4"]


@pytest.fixture(scope="module")
def plain(folder):
    return trained(folder, FLAGS, "--optimizer", "adam")[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_trains(folder, plain, preset):
    more = ["--sam-fisher-samples", "4", "--sam-sparsity", "0.5"] if PRESETS[preset].mask == "fisher" else []
    found, _ = trained(folder, FLAGS, "--optimizer", preset, *more)
    assert all(torch.isfinite(weight).all() for weight in found.values())
    assert not runs.same_bits(plain, found)


def test_epsilon_zero_is_the_base_optimizer(folder, plain):
    found, _ = trained(folder, FLAGS, "--optimizer", "sam", "--sam-epsilon", "0")
    assert runs.same_bits(plain, found)
