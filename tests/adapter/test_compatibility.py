"""What the plugin mends in fairseq, each fault shown without the plugin's hand in it where that is possible."""

import math

import pytest
import torch

from fairseq_sam.adapter.config import check_config
from tests.adapter import runs


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


SGD = ["--base-optimizer", "sgd", "--lr", "0.1", "--dropout", "0"]


@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_amp_divides_by_the_loss_scale_once(translation_data, monkeypatch, scope):
    """With SGD a second division would show. The scaler is a real one, on CPU; autocast is not."""
    options = ["--optimizer", "ga_sam", "--sam-norm", "linf", "--sam-epsilon", "1e-3", "--sam-scope", scope, *SGD]
    plain, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, *options)
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda **kwargs: torch.amp.GradScaler("cpu", **kwargs))
    amp, _ = runs.build_trainer(translation_data, *runs.TRANSLATION, *options, "--amp", "--fp16-init-scale", "64")
    assert amp.optimizer.scaler.get_scale() == 64
    for number in range(3):
        samples = batches[2 * number : 2 * number + 2]
        plain.train_step(samples)
        amp.train_step(samples)
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(amp)[name], expected, rtol=1e-4, atol=1e-6)
    assert amp.optimizer.scaler.get_scale() == 64, "no overflow was seen where there was none"


def test_amp_tries_a_batch_again_after_an_overflow(translation_data, monkeypatch):
    """The scaler learns of an overflow once per update, and weights are those of before."""
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda **kwargs: torch.amp.GradScaler("cpu", **kwargs))
    amp, batches = runs.build_trainer(
        translation_data, *runs.TRANSLATION, "--optimizer", "sam", "--amp", "--fp16-init-scale", "64",
        "--amp-batch-retries", "2", *SGD,
    )  # fmt: skip
    task, overflows = type(amp.task), [True, True, False, False]
    original, before = task.train_step, weights(amp)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        result = original(self, sample, model, criterion, optimizer, update_num, ignore_grad)
        if overflows.pop(0):
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return result

    monkeypatch.setattr(task, "train_step", train_step)
    amp.train_step(batches[:1])
    assert amp.optimizer.scaler.get_scale() == 32 and not overflows
    assert not runs.same_bits(before, weights(amp)) and all(torch.isfinite(w).all() for w in weights(amp).values())


def test_bf16_is_not_taken_for_a_tpu(translation_data):
    trainer, batches = runs.build_trainer(
        translation_data, *runs.TRANSLATION, "--optimizer", "sam", "--bf16", "--fp16-no-flatten-grads"
    )
    assert not trainer.tpu and next(trainer.model.parameters()).dtype == torch.bfloat16
    before = weights(trainer)
    trainer.train_step(batches[:1])
    assert not runs.same_bits(before, weights(trainer))


def test_a_gradient_that_is_not_finite_ends_with_fairseq_s_error(translation_data, monkeypatch):
    """Not with StopIteration from the search for the module that it came from."""
    trainer, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, "--optimizer", "sam")
    before = weights(trainer)
    with torch.no_grad():
        trainer.model.decoder.layers[0].fc1.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="Nan/Inf"):
        trainer.train_step(batches[:1])
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "decoder.layers.0.fc1.weight")


@pytest.mark.parametrize("half", ["--fp16", "--bf16", "--amp"])
def test_bmuf_in_half_precision_is_refused(half):
    flags = ["/nowhere", *runs.common_flags(), *runs.TRANSLATION, "--optimizer", "sam", "--use-bmuf", half]
    with pytest.raises(ValueError, match=rf"--use-bmuf cannot be used with {half}.*leave one of them out"):
        check_config(runs.configuration(flags))


def test_a_checkpoint_is_copied_whole(tmp_path, monkeypatch):
    """Killed in the middle of a copy, the file of before is still there."""
    import shutil

    from fairseq.file_io import PathManager

    new, last = tmp_path / "checkpoint_1_5.pt", tmp_path / "checkpoint_last.pt"
    new.write_bytes(b"new" * 1000)
    last.write_bytes(b"old" * 1000)
    original = shutil.copyfile

    def killed(source, target):
        original(source, target)
        with open(target, "r+b") as file:
            file.truncate(10)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == b"old" * 1000
    assert PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == b"new" * 1000


@pytest.mark.parametrize("update", [4, 6])
def test_a_finished_run_stays_finished(translation_data, tmp_path, caplog, update):
    """In the middle of an epoch and at its end; with more updates to do it goes on."""
    flags = [*runs.TRANSLATION, "--optimizer", "sam", "--update-freq", "2"]
    first = runs.train(translation_data, tmp_path, *flags, "--max-update", str(update))
    written = (tmp_path / "checkpoint_last.pt").stat().st_mtime_ns
    again = runs.train(translation_data, tmp_path, *flags, "--max-update", str(update))
    assert (tmp_path / "checkpoint_last.pt").stat().st_mtime_ns == written
    assert runs.same_bits(first["model"], again["model"])
    more = runs.train(translation_data, tmp_path, *flags, "--max-update", str(update + 1))
    assert more["optimizer_history"][-1]["num_updates"] == update + 1
