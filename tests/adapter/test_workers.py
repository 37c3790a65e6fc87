"""Two workers on CPU: replicas stay equal, epsilon 0 is the base run, the ascent communicates as little as it says."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from tests.adapter import runs

pytestmark = pytest.mark.slow
GA_SAM = ("--optimizer", "ga_sam", "--sam-norm", "linf", "--sam-steps", "2")


def run_two(data, out, backend, *flags):
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.adapter.worker"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(data), str(out), backend, *runs.TRANSLATION, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=runs.ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs[0][-2000:] + outputs[1][-2000:]
    reductions = [json.loads((out / f"{rank}.json").read_text())["reductions"] for rank in range(2)]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)], reductions


SGD = ("--base-optimizer", "sgd", "--lr", "0.5", "--dropout", "0.0")
UPDATES = ((0, 2, 1, 3), (4, 6, 5, 7), (8, 10))  # micro-batches of both workers; the second ends with dummies


def run_one(data, *flags):
    trainer, batches = runs.build_trainer(data, *runs.TRANSLATION, *flags)
    for numbers in UPDATES:
        trainer.train_step([batches[number] for number in numbers])
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_two_workers_equal_one_with_all_their_micro_batches(translation_data, tmp_path, scope):
    """The same updates, perturbations included; a dummy batch does not count."""
    flags = (*GA_SAM, *SGD, "--sam-scope", scope, "--sam-epsilon", "2e-3")
    expected = run_one(translation_data, *flags)
    without = run_one(translation_data, *flags, "--sam-epsilon", "0")
    assert max(float((expected[name] - without[name]).abs().max()) for name in expected) > 1e-4
    for backend in ("legacy_ddp", "pytorch_ddp"):
        (found, _), _ = run_two(translation_data, tmp_path / backend, backend, *flags)
        for name, weights in found.items():
            torch.testing.assert_close(weights, expected[name], rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_two_workers(translation_data, tmp_path, backend, scope):
    plain, _ = run_two(translation_data, tmp_path / "plain", backend, "--optimizer", "adam")
    zero, _ = run_two(translation_data, tmp_path / "zero", backend, *GA_SAM, "--sam-epsilon", "0", "--sam-scope", scope)
    moved, reductions = run_two(
        translation_data, tmp_path / "moved", backend, *GA_SAM, "--sam-epsilon", "1e-3", "--sam-scope", scope
    )
    assert runs.same_bits(plain[0], plain[1]) and runs.same_bits(zero[0], zero[1]) and runs.same_bits(*moved)
    assert runs.same_bits(plain[0], zero[0])
    assert not runs.same_bits(plain[0], moved[0])
    expected = 0 if scope == "microbatch" else 3 * 2  # one reduction per ascent step of each of three updates
    assert reductions == [expected, expected]
