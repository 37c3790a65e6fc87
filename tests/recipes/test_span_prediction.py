"""Span prediction: its head, its batches, every method on it."""

import pytest
import torch
from torch import nn

import fairseq_sam.tasks.span_prediction  # noqa: F401  registers the task
from fairseq_sam import PRESETS
from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.slicing import Slicer
from fairseq_sam.tasks.span_prediction import SpanHead, mean_of_span, read_spans
from tests.adapter import runs
from tests.adapter.test_slicing import (  # noqa: F401  they run on the case below
    test_a_sample_without_nsentences_and_without_id,
    test_each_instance_is_as_its_dataset_collates_it,
    test_instance_losses_equal_those_of_each_instance_alone,
    test_slices_have_their_rows_and_counts,
    test_their_weighted_gradient_equals_that_of_each_instance_alone,
    test_they_add_up_in_training_mode_with_its_dropout,
)
from tests.adapter.test_tasks import trained
from tests.recipes import glue_files


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tokens = glue_files.write_wordpiece(tmp_path_factory.mktemp("tokens"))
    place = tmp_path_factory.mktemp("data")
    return {name: glue_files.prepared(place, name, tokens) for name in ("WiC", "WSC")}


@pytest.fixture(params=["WiC", "WSC"])
def case(request, folders):
    trainer, batches = runs.build_trainer(
        folders[request.param], *glue_files.flags_of(request.param), "--optimizer", "adam"
    )
    return trainer, max(batches, key=lambda sample: len(sample["id"]))


# -- the head ----------------------------------------------------------------------------------------------------------


class Template(nn.Module):
    def __init__(self, size=4, inner=5):
        super().__init__()
        self.dense, self.dropout, self.activation_fn = nn.Linear(size, inner), nn.Dropout(0.3), torch.tanh


def test_the_mean_of_a_span():
    features = torch.randn(3, 7, 4, dtype=torch.float64)
    start, end = torch.tensor([0, 2, 5]), torch.tensor([1, 6, 7])
    found = mean_of_span(features, start, end)
    expected = torch.stack([features[n, a:b].mean(0) for n, (a, b) in enumerate([(0, 1), (2, 6), (5, 7)])])
    torch.testing.assert_close(found, expected)


def test_the_head_sees_first_token_and_both_spans():
    head = SpanHead(Template(), num_classes=3).double().eval()
    features = torch.randn(2, 6, 4, dtype=torch.float64)
    spans = {"start0": [1, 2], "end0": [3, 3], "start1": [4, 3], "end1": [5, 6]}
    with head.reading({name: torch.tensor(places) for name, places in spans.items()}):
        found = head(features)
    for n in range(2):
        means = [features[n, spans[f"start{k}"][n] : spans[f"end{k}"][n]].mean(0) for k in (0, 1)]
        joined = torch.cat([features[n, 0], *means])
        expected = head.out_proj(torch.tanh(head.dense(joined)))
        torch.testing.assert_close(found[n], expected)
    assert head.dropout.p == 0.3 and found.shape == (2, 3)


def test_a_head_without_spans_says_so():
    head = SpanHead(Template(), num_classes=2)
    with pytest.raises(RuntimeError, match=r"head\.reading"):
        head(torch.zeros(1, 3, 4))
    with pytest.raises(ZeroDivisionError), head.reading({}):
        raise ZeroDivisionError
    assert head._spans is None, "also after an error"
    with pytest.raises(ConfigurationError, match="whose classification heads have dense, as RoBERTa's do; got Linear"):
        SpanHead(nn.Linear(3, 2), num_classes=2)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [None, 0])
@pytest.mark.parametrize("separator", [None, 2])
def test_spans_are_moved_with_their_input(folders, init, separator):
    """The tokens at a span are those of the written span, whatever stands before them."""
    words = {None: [], 0: ["--init-token", "0"]}[init] + ([] if separator is None else ["--separator-token", "2"])
    flags = ["--task", "span_prediction", "--criterion", "span_prediction", *words, *glue_files.ENCODER]
    for name in ("WiC", "WSC"):
        trainer, batches = runs.build_trainer(folders[name], *flags, "--optimizer", "adam")
        folder, dictionary = folders[name], trainer.task.source_dictionary
        for sample in batches:
            for row, number in enumerate(sample["id"].tolist()):
                for k in (0, 1):
                    line = (folder / f"span{k}" / "train.span").read_text().splitlines()[number]
                    start, end = map(int, line.split())
                    own = k if name == "WiC" else 0
                    written = trainer.task._indexed(f"input{own}", "train")[number][start:end]
                    at = [int(sample["spans"][f"{edge}{k}"][row]) for edge in ("start", "end")]
                    assert torch.equal(sample["net_input"]["src_tokens"][row, at[0] : at[1]], written.long())
        assert dictionary.pad() not in written


def test_spans_are_sliced_with_their_instances(case):
    trainer, sample = case
    part = Slicer(trainer.task).select(sample, [2, 0])
    for name, places in sample["spans"].items():
        assert part["spans"][name].tolist() == [int(places[2]), int(places[0])]


def test_padding_changes_nothing(case):
    """An instance has the same scores alone and among longer ones."""
    trainer, sample = case
    trainer.model.double().eval()
    slicer, criterion = Slicer(trainer.task), trainer.criterion.eval()
    from fairseq_sam.criterions.span_prediction import span_logits

    together = span_logits(trainer.model, sample, criterion.head_name)
    for n in range(len(together)):
        alone = span_logits(trainer.model, slicer.select(sample, [n]), criterion.head_name)
        torch.testing.assert_close(alone[0], together[n])


def test_what_is_logged(case):
    trainer, sample = case
    trainer.model.eval()
    loss, size, log = trainer.criterion(trainer.model, sample)
    assert size == log["nsentences"] == len(sample["id"]) and log["loss"] == loss
    from fairseq.logging import metrics

    with metrics.aggregate() as found:
        type(trainer.criterion).reduce_metrics([log, log])
    values = found.get_smoothed_values()
    assert values["accuracy"] == pytest.approx(100 * int(log["ncorrect"]) / size, abs=0.05)
    assert values["loss"] == pytest.approx(float(loss.detach()) / size / 0.693147, abs=1e-3)


# -- methods -----------------------------------------------------------------------------------------------------------


FLAGS = [*glue_files.flags_of("WiC"), "--batch-size", "4"]


@pytest.fixture(scope="module")
def plain(folders):
    return trained(folders["WiC"], FLAGS, "--optimizer", "adam")[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_trains(folders, plain, preset):
    more = ["--sam-fisher-samples", "4", "--sam-sparsity", "0.5"] if PRESETS[preset].mask == "fisher" else []
    found, _ = trained(folders["WiC"], FLAGS, "--optimizer", preset, *more)
    assert all(torch.isfinite(weight).all() for weight in found.values())
    assert not runs.same_bits(plain, found)
    head = "classification_heads.span_classification_head."
    assert {name[len(head) :] for name in found if name.startswith(head)} == {
        "dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip


def test_epsilon_zero_is_the_base_optimizer(folders, plain):
    found, _ = trained(folders["WiC"], FLAGS, "--optimizer", "sam", "--sam-epsilon", "0")
    assert runs.same_bits(plain, found)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["1", "2 2", "3 1", "0 9", "-1 2", "a b", "0 1 2", ""])
def test_lines_that_are_no_spans(tmp_path, line):
    path = tmp_path / "train.span"
    path.write_text(f"0 1\n{line}\n")
    with pytest.raises(ConfigurationError, match=r"line 2: expected START END with 0 <= START < END <= 8.*got "):
        read_spans(path, torch.tensor([4, 8]).numpy())


def test_files_of_spans_that_do_not_fit(tmp_path):
    path = tmp_path / "train.span"
    with pytest.raises(ConfigurationError, match=r"--task span_prediction needs .*train.span"):
        read_spans(path, torch.tensor([4]).numpy())
    path.write_text("0 1\n0 4\n")
    assert read_spans(path, torch.tensor([4, 4]).numpy()).tolist() == [[0, 1], [0, 4]]
    with pytest.raises(ConfigurationError, match="has 2 lines, but there are 3 instances"):
        read_spans(path, torch.tensor([4, 4, 4]).numpy())


def test_folders_and_models_that_do_not_fit(folders, tmp_path):
    flags = [*glue_files.flags_of("WiC"), "--optimizer", "adam"]
    with pytest.raises(ConfigurationError, match="--num-classes 3 is not the 2 labels of"):
        runs.build_trainer(folders["WiC"], *flags, "--num-classes", "3")
    with pytest.raises(ConfigurationError, match=r"is not prepared for --task span_prediction: it has no input0/"):
        runs.build_trainer(tmp_path, *flags)
    with pytest.raises(ConfigurationError, match="--task span_prediction needs an encoder with classification heads"):
        runs.build_trainer(folders["WiC"], *flags[: flags.index("--arch")], "--arch", "transformer", *runs.TINY)
