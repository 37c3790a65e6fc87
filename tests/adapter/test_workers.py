"""Two workers on CPU: replicas stay equal, epsilon 0 is the base run, the ascent communicates as little as it says."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from fairseq_sam import PRESETS
from tests.adapter import runs

pytestmark = pytest.mark.slow
GA_SAM = ("--optimizer", "ga_sam", "--sam-norm", "linf", "--sam-steps", "2")


def run_pair(data, out, backend, cases, failures=None):
    """Run cases, flags by name, on two workers; returns what each worker has at the end of each case.

    `failures`: by case, pairs of a worker and the number of a pass of its that runs out of memory.
    """
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.adapter.worker"]
    flags = json.dumps({name: [*runs.TRANSLATION, *case] for name, case in cases.items()})
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(data), str(out), backend, flags, json.dumps(failures or {})],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=runs.ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=500)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), outputs[0][-3000:] + outputs[1][-3000:]
    return {name: [torch.load(out / f"{name}.{rank}.pt") for rank in range(2)] for name in cases}


def run_two(data, out, backend, *flags):
    states = run_pair(data, out, backend, {"case": flags})["case"]
    reductions = [json.loads((out / f"case.{rank}.json").read_text())["reductions"] for rank in range(2)]
    return [state["weights"] for state in states], reductions


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


# Settings without random choices, so that one process with all micro-batches is the same run.
ALIKE = {
    "sam": [], "asam": [], "layer_sam": ["--sam-epsilon", "1e-3"], "multistep_defense": [], "ga_sam": [],
    "efficient_sam": [], "msam": [], "gsam": ["--sam-epsilon", "0.3"], "instance_sam": [],
    "awp": ["--sam-epsilon", "0.1"],
    "model_perturbation": ["--sam-step-size", "0.1"],
    "esam": ["--sam-mask", "none"],
    "look_sam": ["--sam-interval", "2", "--sam-epsilon", "0.3"],
    "freelb": ["--sam-init", "zero", "--sam-epsilon", "0.3"],
    "fisher_sam": ["--sam-fisher-samples", "1000", "--sam-mask-interval", "1", "--sam-epsilon", "0.3"],
}  # fmt: skip
RANDOM = {
    "delta_sam": [], "random_sam": [], "swp": ["--optimizer", "esam"], "noise": ["--optimizer", "freelb"],
    "some_instances": ["--optimizer", "fisher_sam", "--sam-fisher-samples", "5", "--sam-sparsity", "0.5"],
    "gsam_update": ["--optimizer", "gsam", "--sam-scope", "update", "--sam-epsilon", "0.3"],
    "look_update": ["--optimizer", "look_sam", "--sam-scope", "update", "--sam-interval", "2", "--sam-epsilon", "0.3"],
    "quarter_ga_sam": ["--optimizer", "ga_sam", "--sam-ascent-fraction", "0.25"],
    "delta_update": ["--optimizer", "delta_sam", "--sam-scope", "update"],
}  # fmt: skip


def case_flags(name, options):
    preset = [] if "--optimizer" in options else ["--optimizer", name]
    return [*preset, *options, *SGD]


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_every_preset_on_two_workers(translation_data, tmp_path, backend):
    """Replicas end bit-equal, masks and components included; where nothing is random, as one process would."""
    assert {*ALIKE, "delta_sam", "random_sam"} == set(PRESETS)
    cases = {name: case_flags(name, options) for name, options in {**ALIKE, **RANDOM}.items()}
    found = run_pair(translation_data, tmp_path / "pair", backend, cases)
    for name, flags in cases.items():
        first, second = found[name]
        assert runs.same_bits(first["weights"], second["weights"]), f"{name}: replicas diverge"
        assert runs.same_state(first["method"], second["method"]), f"{name}: the method's state diverges"
        assert all(torch.isfinite(w).all() for w in first["weights"].values())
        if name in ALIKE or name in ("gsam_update", "look_update", "quarter_ga_sam"):
            expected, plain = run_one(translation_data, *flags), run_one(translation_data, *flags, "--sam-epsilon", "0")
            moved = max(float((expected[key] - plain[key]).abs().max()) for key in expected)
            off = max(float((expected[key] - first["weights"][key]).abs().max()) for key in expected)
            assert moved > 2e-5 and off < 5e-6 + 0.02 * moved, f"{name}: moved {moved}, off by {off}"


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


LAYERDROP = ("--encoder-layers", "3", "--encoder-layerdrop", "0.5", "--find-unused-parameters")


def test_parameters_that_only_some_passes_use(translation_data, tmp_path):
    """LayerDrop under torch's DDP: a layer that the ascent used and the last pass did not, in both micro-batches."""
    plain = ("--optimizer", "adam", *LAYERDROP)
    cases = {
        "adam": plain,
        "zero": ("--optimizer", "ga_sam", "--sam-epsilon", "0", *LAYERDROP),
        "sam": ("--optimizer", "sam", *LAYERDROP),
        "fresh": ("--optimizer", "sam", "--sam-dropout", "fresh", *LAYERDROP),
        "update": ("--optimizer", "ga_sam", "--sam-scope", "update", *LAYERDROP),
        "between": ("--optimizer", "gsam", "--sam-interval", "2", *LAYERDROP),
        "msam": ("--optimizer", "msam", *LAYERDROP),
        "fisher": ("--optimizer", "fisher_sam", "--sam-fisher-samples", "8", *LAYERDROP),
    }
    found = run_pair(translation_data, tmp_path / "pair", "pytorch_ddp", cases)
    for name, (first, second) in found.items():
        assert runs.same_bits(first["weights"], second["weights"]), f"{name}: replicas diverge"
        assert all(torch.isfinite(w).all() for w in first["weights"].values())
    adam, zero = found["adam"][0]["weights"], found["zero"][0]["weights"]
    assert all(torch.allclose(adam[key], zero[key], rtol=0, atol=1e-6) for key in adam)
    assert not runs.same_bits(adam, found["sam"][0]["weights"])


UPDATE = ("--sam-scope", "update")
OUT_OF_MEMORY = {
    # Passes of worker 0: two micro-batches of two passes each in the first update.
    "ascent of the first": (("--optimizer", "sam"), [(0, 1)]),
    "last pass of the first": (("--optimizer", "sam"), [(0, 2)]),
    "ascent of the last": (("--optimizer", "ga_sam"), [(1, 3)]),
    "last pass of the last": (("--optimizer", "ga_sam"), [(1, 4)]),
    "both workers": (("--optimizer", "sam"), [(0, 1), (1, 4)]),
    "shared ascent": (("--optimizer", "ga_sam", *UPDATE), [(0, 1)]),
    "whole shared ascent": (("--optimizer", "sam", *UPDATE), [(0, 1), (0, 2)]),
    "after a shared ascent": (("--optimizer", "ga_sam", *UPDATE), [(0, 4)]),
    "selection in a shared ascent": (("--optimizer", "esam", *UPDATE), [(1, 2)]),
    "decomposition, first": (("--optimizer", "gsam", *UPDATE), [(0, 3)]),
    "decomposition, last": (("--optimizer", "gsam", *UPDATE), [(0, 4)]),
    "decomposition of each": (("--optimizer", "gsam"), [(0, 4)]),
    "component": (("--optimizer", "look_sam", "--sam-interval", "2"), [(1, 4)]),
    "component between": (("--optimizer", "look_sam", "--sam-interval", "2"), [(1, 6)]),
    "shared component": (("--optimizer", "look_sam", "--sam-interval", "2", *UPDATE), [(1, 4), (0, 6)]),
    "Fisher": (("--optimizer", "fisher_sam", "--sam-fisher-samples", "6"), [(0, 2)]),
    "a plain update": (("--optimizer", "sam", "--sam-start-update", "2"), [(0, 1)]),
    "parts": (("--optimizer", "msam"), [(0, 5)]),
}


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_one_worker_runs_out_of_memory(translation_data, tmp_path, backend):
    """Wherever it happens: both workers go on together, without that micro-batch, and their replicas stay equal."""
    cases = {name: (*flags, *SGD) for name, (flags, _) in OUT_OF_MEMORY.items()}
    failures = {name: failing for name, (_, failing) in OUT_OF_MEMORY.items()}
    found = run_pair(translation_data, tmp_path / "pair", backend, cases, failures)
    whole = run_pair(translation_data, tmp_path / "whole", backend, {name: cases[name] for name in list(cases)[:2]})
    for name, (first, second) in found.items():
        assert runs.same_bits(first["weights"], second["weights"]), f"{name}: replicas diverge"
        assert runs.same_state(first["method"], second["method"]), f"{name}: the method's state diverges"
        assert all(torch.isfinite(w).all() for w in first["weights"].values())
    for name, (first, _) in whole.items():
        assert not runs.same_bits(first["weights"], found[name][0]["weights"]), "the micro-batch really fell out"
