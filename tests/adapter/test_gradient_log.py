"""``--sam-gradient-log``: what fairseq-train writes beside its checkpoints."""

import json
import math

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq_sam.adapter.gradient_log import FILE, gradient_norms
from fairseq_sam.analysis.gradients import norms_by_layer, read_gradients
from tests.adapter import runs
from tests.adapter.test_workers import SGD, UPDATES, run_pair
from tests.core.models import batch as data_batch
from tests.core.models import closure_of, mlp

FLAGS = [*runs.TRANSLATION, "--optimizer", "sam", "--sam-epsilon", "0", "--sam-gradient-log", "2"]


def logged_norms(log):
    return {gradient.update: gradient.norm for gradient in read_gradients(log)}


@pytest.fixture(scope="module")
def run(translation_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    runs.train(
        translation_data, folder, *FLAGS, "--max-update", "7", "--save-interval-updates", "4", "--clip-norm", "0.1"
    )
    return folder


def test_every_second_update(run):
    gradients = read_gradients(run / FILE)
    assert [gradient.update for gradient in gradients] == [2, 4, 6]
    for gradient in gradients:
        assert gradient.norm > 0.1, "that of before clipping"
        assert math.hypot(*gradient.norms.values()) == pytest.approx(gradient.norm, rel=1e-6)
        assert "encoder.layers.0.fc1.weight" in gradient.norms and "decoder.embed_tokens.weight" in gradient.norms
    assert set(norms_by_layer(gradients)) == {"encoder", "decoder"}


def test_the_base_optimizer_before_the_start_epoch(run, translation_data, tmp_path):
    """The same numbers as with a radius of 0, at the cost of the base optimizer."""
    flags = [*runs.TRANSLATION, "--optimizer", "sam", "--sam-start-epoch", "10000", "--sam-gradient-log", "2"]
    runs.train(translation_data, tmp_path, *flags, "--max-update", "6", "--clip-norm", "0.1")
    assert (tmp_path / FILE).read_text().splitlines() == (run / FILE).read_text().splitlines()[:3]


def test_a_resumed_run_goes_on_with_the_file(run, translation_data):
    before = logged_norms(run / FILE)
    (run / "checkpoint_1_4.pt").replace(run / "checkpoint_last.pt")
    with (run / FILE).open("a") as file:
        file.write('{"epoch": 1, "upda')  # cut off by a kill
    runs.train(translation_data, run, *FLAGS, "--max-update", "8", "--clip-norm", "0.1")
    after = logged_norms(run / FILE)
    assert list(after) == [2, 4, 6, 8] and {u: after[u] for u in before} == before
    assert all(json.loads(line) for line in (run / FILE).read_text().splitlines())


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: AMP and flat fp16 need one")


@pytest.mark.parametrize(
    "mode",
    [
        ["--fp16", "--fp16-no-flatten-grads"],
        ["--fp16", "--memory-efficient-fp16"],
        ["--bf16"],
        pytest.param(["--fp16"], marks=[pytest.mark.gpu, NEEDS_GPU]),
        pytest.param(["--amp"], marks=[pytest.mark.gpu, NEEDS_GPU]),
    ],
    ids=" ".join,
)
def test_half_precision_has_the_same_unit(translation_data, tmp_path, monkeypatch, mode):
    if mode in (["--fp16"], ["--amp"]):
        monkeypatch.setattr(runs, "COMMON", runs.COMMON.replace(" --cpu", ""))
    flags = [*FLAGS, "--sam-gradient-log", "1", "--clip-norm", "0.1", "--dropout", "0", "--fp16-init-scale", "16"]
    norms = []
    for number, precision in enumerate([[], mode]):
        folder = str(tmp_path / str(number))
        trainer, batches = runs.build_trainer(translation_data, *flags, *precision, "--save-dir", folder)
        trainer.train_step(batches[:1])
        norms += read_gradients(tmp_path / str(number) / FILE)
    expected, found = norms
    assert found.norm == pytest.approx(expected.norm, rel=0.05)
    large = [name for name, norm in expected.norms.items() if norm > 0.1 * expected.norm]
    assert large and all(found.norms[name] == pytest.approx(expected.norms[name], rel=0.1) for name in large)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_workers_log_the_gradient_of_the_whole_update(translation_data, tmp_path, backend):
    """One of them writes, and the norms are those of one process with all micro-batches of the update."""
    flags = ["--optimizer", "sam", "--sam-epsilon", "0", *SGD, "--sam-gradient-log", "1", "--save-dir"]
    run_pair(translation_data, tmp_path / "pair", backend, {"case": [*flags, str(tmp_path / "two")]})
    trainer, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, *flags, str(tmp_path / "one"))
    for numbers in UPDATES:
        trainer.train_step([batches[number] for number in numbers])
    expected, found = (read_gradients(tmp_path / name / FILE) for name in ("one", "two"))
    assert [gradient.update for gradient in found] == [gradient.update for gradient in expected] == [1, 2, 3]
    for one, two in zip(expected, found, strict=True):
        assert two.norm == pytest.approx(one.norm, rel=1e-4)
        assert two.norms == pytest.approx(dict(one.norms), rel=1e-3, abs=1e-4 * one.norm)


def test_norms_of_scaled_gradients():
    model = mlp()
    closure_of(model, data_batch(1))()
    expected = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    total = math.hypot(*expected.values())
    for parameter in model.parameters():
        parameter.grad *= 128.0
    assert gradient_norms(model, total) == pytest.approx(expected, rel=1e-12)
    model[0].weight.grad = None
    assert "0.weight" not in gradient_norms(model, total)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert set(gradient_norms(model, 0.0).values()) == {0.0}


def test_no_log_without_the_flag(translation_data, tmp_path):
    runs.train(translation_data, tmp_path, *runs.TRANSLATION, "--optimizer", "sam", "--max-update", "2")
    assert not (tmp_path / FILE).exists()


def test_bad_number():
    with pytest.raises(ValueError, match=r"gradient_log \(--sam-gradient-log\) must be an integer >= 1, got 0"):
        from fairseq_sam.adapter.choices import gradient_log_of

        gradient_log_of(type("Config", (), {"sam_gradient_log": 0}))
