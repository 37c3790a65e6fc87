"""Checkpoints: exact resume, ordinary files, the safe loader stays on, averaging."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_sam import PRESETS
from fairseq_sam.adapter.checkpoints import average_weights, last_checkpoints
from tests.adapter import runs


def run_flags(preset):
    return [
        *runs.TRANSLATION, "--optimizer", preset, "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0",
        "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "4", "--update-freq", "2",
        "--sam-interval", "2", "--sam-start-update", "3", "--sam-dropout", "fresh", *runs.steps_flag(preset, 2),
        *FISHER.get(preset, []),
    ]  # fmt: skip


# Update 4 collects what it can of 100 instances, update 6 more, and so on: the resume is in the middle of it.
FISHER = {"fisher_sam": ["--sam-fisher-samples", "100", "--sam-sparsity", "0.5", "--sam-mask-interval", "7"]}


@pytest.mark.parametrize("preset", PRESETS)
def test_resume_is_exact(translation_data, tmp_path, preset):
    """12 updates equal 6 updates, a resume and 6 more, bit for bit: weights, optimizer state, method state."""
    whole = runs.train(translation_data, tmp_path / "whole", *run_flags(preset), "--max-update", "12")
    half = runs.train(translation_data, tmp_path / "parts", *run_flags(preset), "--max-update", "6")
    resumed = runs.train(translation_data, tmp_path / "parts", *run_flags(preset), "--max-update", "12")
    assert whole["optimizer_history"][-1]["num_updates"] == 12
    assert runs.same_bits(whole["model"], resumed["model"])
    assert runs.same_state(whole["last_optimizer_state"], resumed["last_optimizer_state"])
    method = whole["last_optimizer_state"]["sharpness_aware"]
    assert method["num_ascents"] >= 5, "updates 4, 6, 8, 10 and 12 are sharpness-aware"
    assert ("fisher" in method) == (preset == "fisher_sam") and ("component" in method) == (preset == "look_sam")
    if preset == "fisher_sam":
        begun = half["last_optimizer_state"]["sharpness_aware"]["fisher"]
        assert begun["sums"] and 0 < begun["num_instances"] < 100


@pytest.mark.parametrize("stop", [8, 12, 15])
def test_resume_after_the_first_epoch_is_exact(translation_data, tmp_path, stop):
    """An epoch has 6 updates: within the second, at its end, within the third. Plain fairseq sees other batches."""
    flags = [*run_flags("ga_sam"), "--sam-start-epoch", "2"]
    whole = runs.train(translation_data, tmp_path / "whole", *flags, "--max-update", "20")
    runs.train(translation_data, tmp_path / "parts", *flags, "--max-update", str(stop))
    resumed = runs.train(translation_data, tmp_path / "parts", *flags, "--max-update", "20")
    assert whole["extra_state"]["train_iterator"]["epoch"] == 4
    assert runs.same_bits(whole["model"], resumed["model"])
    assert runs.same_state(whole["last_optimizer_state"], resumed["last_optimizer_state"])


@pytest.mark.parametrize("preset", PRESETS)
def test_no_file_ever_holds_perturbed_weights(translation_data, tmp_path, monkeypatch, preset):
    """Saving and validating after every update, with an average of weights: all see what the base optimizer left."""
    from fairseq.models.ema import EMA
    from fairseq.trainer import Trainer

    left, seen, averages = [], [], []
    step, validate = Trainer.train_step, Trainer.valid_step

    def weights(trainer):
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    def train_step(self, samples, raise_oom=False):
        if not averages:
            averages.append(EMA(copy.deepcopy(self.model), self.cfg.ema))
            assert self.ema is not None  # fairseq makes its own when it is first asked for
        result = step(self, samples, raise_oom)
        averages[0].step(copy.deepcopy(self.model), self.get_num_updates())
        average = {name: tensor.clone() for name, tensor in averages[0].get_model().state_dict().items()}
        left.append((weights(self), average))
        return result

    def valid_step(self, sample, raise_oom=False):
        seen.append((self.get_num_updates(), weights(self)))
        return validate(self, sample, raise_oom)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(Trainer, "valid_step", valid_step)
    monkeypatch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)  # of an earlier run in this process
    flags = [flag for flag in runs.COMMON.split() if flag != "--disable-validation"]
    monkeypatch.setattr(runs, "COMMON", " ".join(flags))
    runs.train(
        translation_data, tmp_path, *run_flags(preset), "--sam-start-update", "0", "--sam-epsilon", "0.05",
        "--max-update", "4", "--save-interval-updates", "1", "--validate-interval-updates", "1",
        "--store-ema", "--ema-decay", "0.5",
    )  # fmt: skip
    assert len(left) == 4 and {update for update, _ in seen} == {1, 2, 3, 4}
    assert all(runs.same_bits(found, left[update - 1][0]) for update, found in seen)
    files = {f"checkpoint_1_{number}.pt": number for number in range(1, 5)}
    assert {*files, "checkpoint_last.pt", "checkpoint_best.pt"} == {path.name for path in tmp_path.iterdir()}
    for name, number in {**files, "checkpoint_last.pt": 4}.items():
        state = runs.load(tmp_path / name)
        assert runs.same_bits(state["model"], left[number - 1][0]), name
        assert runs.same_bits(state["extra_state"]["ema"], left[number - 1][1]), name
    best = runs.load(tmp_path / "checkpoint_best.pt")["model"]
    assert any(runs.same_bits(best, after) for after, _ in left)


@pytest.fixture(scope="module")
def saved(translation_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    flags = [*runs.TRANSLATION, "--optimizer", "ga_sam", "--max-epoch", "3"]
    runs.train(translation_data, folder, *flags)
    return folder


def without_plugin(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)


def test_the_safe_loader_is_on_by_default_and_reads_the_checkpoint(saved):
    state = torch.load(saved / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["optimizer_name"] == "GaSamOptimizer"


def test_without_the_plugin_the_safe_loader_alone_refuses_or_the_full_one_loads(saved):
    """The file is an ordinary fairseq checkpoint: plain fairseq reads task, model and weights, given a full loader."""
    program = f"""
import functools, torch
torch.load = functools.partial(torch.load, weights_only=False)
from fairseq import checkpoint_utils
models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([{str(saved / "checkpoint_last.pt")!r}])
import sys
assert "fairseq_sam" not in sys.modules
print(type(task).__name__, type(models[0]).__name__, cfg.criterion._name)
"""
    done = without_plugin(program)
    assert done.stdout.split() == ["TranslationTask", "TransformerModel", "label_smoothed_cross_entropy"], done.stderr


class Malicious:
    """Runs a command when it is unpickled by a loader that is not safe."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class Unknown:
    """A class that no fairseq checkpoint holds."""


@pytest.mark.parametrize("kind", ["command", "class"])
def test_a_pickle_with_anything_else_is_refused(saved, tmp_path, kind):
    state = torch.load(saved / "checkpoint_last.pt")
    mark = tmp_path / "was_run"
    state["extra_state"]["surprise"] = Malicious(mark) if kind == "command" else Unknown()
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError):
        runs.load(tmp_path / "bad.pt")
    assert not mark.exists()


def test_classes_of_a_checkpoint_after_bleu_validation(saved, tmp_path):
    """numpy scalars as --eval-bleu leaves them in the best metric, and a Namespace as legacy tasks do."""
    import argparse

    import numpy as np

    state = torch.load(saved / "checkpoint_last.pt")
    state["extra_state"]["best"] = np.float64(31.2)
    state["extra_state"]["counts"] = np.array([1, 2, 3])
    state["cfg"]["task"] = argparse.Namespace(task="translation", source_lang="src")
    torch.save(state, tmp_path / "bleu.pt")
    found = torch.load(tmp_path / "bleu.pt")
    assert found["extra_state"]["best"] == 31.2 and found["extra_state"]["counts"].tolist() == [1, 2, 3]


def test_resume_of_a_base_run_asks_for_reset_optimizer(translation_data, tmp_path):
    runs.train(translation_data, tmp_path, *runs.TRANSLATION, "--optimizer", "adam", "--max-update", "2")
    more = [*runs.TRANSLATION, "--optimizer", "sam", "--max-update", "4"]
    with pytest.raises(AssertionError, match=r"--reset-optimizer.*FairseqAdam vs SamOptimizer"):
        runs.train(translation_data, tmp_path, *more)
    state = runs.train(translation_data, tmp_path, *more, "--reset-optimizer", "--reset-dataloader")
    assert state["optimizer_history"][-1]["optimizer_name"] == "SamOptimizer"


def test_another_base_on_resume_asks_for_reset_optimizer(translation_data, tmp_path):
    runs.train(translation_data, tmp_path, *runs.TRANSLATION, "--optimizer", "sam", "--max-update", "2")
    more = [*runs.TRANSLATION, "--optimizer", "sam", "--base-optimizer", "sgd", "--max-update", "4"]
    with pytest.raises(ValueError, match=r"is that of --base-optimizer adam, but .* sgd.*--reset-optimizer"):
        runs.train(translation_data, tmp_path, *more)


def test_average(saved):
    paths = last_checkpoints(saved, 3)
    assert [path.name for path in paths] == ["checkpoint3.pt", "checkpoint2.pt", "checkpoint1.pt"]
    models = [torch.load(path)["model"] for path in paths]
    average = average_weights(paths)
    for name, weight in average["model"].items():
        parts = [model[name] for model in models]
        assert weight.dtype == parts[0].dtype
        if weight.is_floating_point():
            expected = torch.stack([part.double() for part in parts]).mean(0).to(weight.dtype)
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)
    assert not runs.same_bits(average["model"], models[0])
    assert "last_optimizer_state" not in average


def test_average_of_one_checkpoint_is_that_checkpoint(saved):
    path = saved / "checkpoint2.pt"
    assert runs.same_bits(average_weights([path])["model"], torch.load(path)["model"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-epoch-checkpoints", "9"], "expected 9 files"),
        (["--num-epoch-checkpoints", "0"], "must be >= 1, got 0"),
        (["--num-update-checkpoints", "1"], "expected 1 files checkpoint_<epoch>_<update>.pt"),
        (["--checkpoint-upper-bound", "2"], "needs --num-epoch-checkpoints"),
        ([], "--inputs is a folder"),
    ],
)
def test_average_command_refuses(saved, tmp_path, arguments, message):
    done = average(saved, tmp_path / "average.pt", *arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def average(folder, output, *arguments):
    script = str(runs.ROOT / "scripts" / "average_checkpoints.py")
    command = [sys.executable, script, "--inputs", str(folder), "--output", str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_average_command_with_an_upper_bound(saved, tmp_path):
    done = average(saved, tmp_path / "a.pt", "--num-epoch-checkpoints", "2", "--checkpoint-upper-bound", "2")
    assert done.returncode == 0, done.stderr
    expected = average_weights([saved / "checkpoint2.pt", saved / "checkpoint1.pt"])["model"]
    assert runs.same_bits(torch.load(tmp_path / "a.pt")["model"], expected)


def test_average_command_refuses_a_broken_file(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    done = average(tmp_path / "broken.pt", tmp_path / "a.pt")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert any(line.startswith("error:") for line in done.stderr.splitlines())


def test_averaging_different_models_is_refused(saved, tmp_path):
    state = torch.load(saved / "checkpoint1.pt")
    state["model"].pop("decoder.embed_tokens.weight")
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other parameters"):
        average_weights([saved / "checkpoint2.pt", tmp_path / "other.pt"])
