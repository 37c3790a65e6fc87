"""Two workers on CPU: replicas stay equal, epsilon 0 is the base run, the ascent communicates as little as it says."""

import atexit
import functools
import json
import socket
import subprocess
import sys

import pytest
import torch

from fairseq_sam import PRESETS
from fairseq_sam.adapter.optimizers import unwrap
from tests.adapter import runs

pytestmark = pytest.mark.slow
GA_SAM = ("--optimizer", "ga_sam", "--sam-norm", "linf", "--sam-steps", "2")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def server():
    """The process whose forks are the workers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.adapter.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=runs.ROOT,
    )  # fmt: skip
    atexit.register(process.kill)
    return process


def run_pair(data, out, backend, cases, failures=None, ends_badly=False, limit=500):
    """Run cases, flags by name, on two workers; returns what each worker has at the end of each case.

    `failures`: by case, pairs of a worker and the number of a pass of its that runs out of memory, or a word for what
    else does. With `ends_badly` both must fail; returns the ends of their logs.
    """
    out.mkdir()
    logs = [str(out / f"log.{rank}") for rank in range(2)]
    flags = json.dumps({name: [*runs.TRANSLATION, *case] for name, case in cases.items()})
    more = [str(free_port()), str(data), str(out), backend, flags, json.dumps(failures or {})]
    request = {"workers": [[str(rank), *more] for rank in range(2)], "logs": logs, "limit": limit}
    process = server()
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    statuses = json.loads(process.stdout.readline())
    ends = [(out / f"log.{rank}").read_text()[-3000:] for rank in range(2)]
    if ends_badly:
        assert all(statuses) and not list(out.glob("*.pt")), "both workers end, with an error"
        return ends
    assert not any(statuses), ends[0] + ends[1]
    return {name: [torch.load(out / f"{name}.{rank}.pt") for rank in range(2)] for name in cases}


def run_two(data, out, backend, *flags):
    states = run_pair(data, out, backend, {"case": flags})["case"]
    reductions = [json.loads((out / f"case.{rank}.json").read_text())["reductions"] for rank in range(2)]
    return [state["weights"] for state in states], reductions


SGD = ("--base-optimizer", "sgd", "--lr", "0.5", "--dropout", "0.0")
UPDATES = ((0, 2, 1, 3), (4, 6, 5, 7), (8, 10))  # micro-batches of both workers; the second ends with dummies


@functools.cache
def run_one(data, *flags):
    """One process with the micro-batches of both workers; remembered, since all backends are compared with it."""
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


def all_presets(mode):
    return pytest.mark.mode(mode, presets=list(PRESETS))


# Flags for a backend; those of SlowMo average weights after every update, or gradients within a node of two workers.
BACKENDS = {
    "legacy_ddp": ("legacy_ddp", []),
    "pytorch_ddp": ("pytorch_ddp", []),
    "zero": ("legacy_ddp", ["--zero-sharding", "os"]),
    "slowmo": ("slowmo", ["--nprocs-per-node", "1", "--localsgd-frequency", "1"]),
    "slowmo node": ("slowmo", ["--nprocs-per-node", "2"]),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=all_presets(name.partition(" ")[0])) for name in BACKENDS])
def test_every_preset_on_two_workers(translation_data, tmp_path, name):
    """Replicas end bit-equal, masks and components included; where nothing is random, as one process would."""
    assert {*ALIKE, "delta_sam", "random_sam"} == set(PRESETS)
    backend, more = BACKENDS[name]
    options = {**ALIKE, **RANDOM}
    if name not in ("legacy_ddp", "pytorch_ddp"):  # every preset, without the variants
        options = {key: value for key, value in options.items() if key in PRESETS}
    cases = {key: [*case_flags(key, value), *more] for key, value in options.items()}
    apart = backend == "slowmo"  # each worker has a mask and a component of its own, and shares no perturbation
    found = run_pair(translation_data, tmp_path / "pair", backend, cases)
    for key, flags in cases.items():
        first, second = found[key]
        assert runs.same_bits(first["weights"], second["weights"]), f"{key}: replicas diverge"
        assert apart or runs.same_state(first["method"], second["method"]), f"{key}: the method's state diverges"
        assert all(torch.isfinite(w).all() for w in first["weights"].values())
        equal = key in ALIKE or key in ("gsam_update", "look_update", "quarter_ga_sam")
        if equal and not (apart and key in ("fisher_sam", "look_sam", "gsam")):
            flags = case_flags(key, options[key])
            expected, plain = run_one(translation_data, *flags), run_one(translation_data, *flags, "--sam-epsilon", "0")
            moved = max(float((expected[n] - plain[n]).abs().max()) for n in expected)
            off = max(float((expected[n] - first["weights"][n]).abs().max()) for n in expected)
            assert moved > 2e-5 and off < 5e-6 + 0.02 * moved, f"{key}: moved {moved}, off by {off}"


SHARED = {name: options for name, options in ALIKE.items() if runs.shares_a_perturbation(name)}


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
@pytest.mark.mode("workers, update", presets=[p for p in PRESETS if runs.shares_a_perturbation(p)])
def test_one_perturbation_for_two_workers(translation_data, tmp_path, backend):
    """The same as one process with all their micro-batches; of a part of the instances, each worker takes its own."""
    cases = {name: [*case_flags(name, options), "--sam-scope", "update"] for name, options in SHARED.items()}
    cases |= {name: [*case_flags(name, []), "--sam-scope", "update"] for name in ("delta_sam", "random_sam")}
    found = run_pair(translation_data, tmp_path / "pair", backend, cases)
    for name, flags in cases.items():
        first, second = found[name]
        assert runs.same_bits(first["weights"], second["weights"]), f"{name}: replicas diverge"
        assert runs.same_state(first["method"], second["method"]), f"{name}: the method's state diverges"
        if name in SHARED and name != "efficient_sam":
            expected, plain = run_one(translation_data, *flags), run_one(translation_data, *flags, "--sam-epsilon", "0")
            moved = max(float((expected[n] - plain[n]).abs().max()) for n in expected)
            off = max(float((expected[n] - first["weights"][n]).abs().max()) for n in expected)
            assert moved > 2e-5 and off < 5e-6 + 0.02 * moved, f"{name}: moved {moved}, off by {off}"


# Where nobody can go on: the stand-in for the lost micro-batch does not fit either, or the engine's own arithmetic.
LOST = {
    "dummy too": (("--optimizer", "sam"), [(0, 1), (0, 2)]),
    "backward of the last pass": (("--optimizer", "sam"), [(0, "backward 4")]),
    "reduction of a shared ascent": (("--optimizer", "ga_sam", "--sam-scope", "update"), [(0, "reduction")]),
    "step of a shared ascent": (("--optimizer", "ga_sam", "--sam-scope", "update", "--sam-steps", "2"), [(1, "step")]),
}


@pytest.mark.parametrize("case", LOST)
def test_a_worker_that_cannot_go_on_ends_the_run(translation_data, tmp_path, case):
    """With an error that says where and what to do: never with replicas that go apart."""
    flags, failing = LOST[case]
    rank = failing[0][0]
    ends = run_pair(
        translation_data,
        tmp_path / "pair",
        "pytorch_ddp",
        {case: (*flags, *SGD)},
        {case: failing},
        ends_badly=True,
        limit=120,
    )
    assert f"worker {rank} ran short of memory where the others wait for it" in ends[rank]
    assert "--max-tokens" in ends[rank]


HALF = {
    "bf16": ["--bf16"],
    "memory-efficient fp16": ["--memory-efficient-fp16", "--fp16-init-scale", "4"],
    "fp16 not flat": ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"],
}


@pytest.mark.parametrize("name", ["legacy_ddp", "pytorch_ddp", "zero"])
def test_half_precision_on_two_workers(translation_data, tmp_path, name):
    """Replicas stay bit-equal, in both scopes; fp32 weights are near."""
    backend, more = BACKENDS[name]
    steps = ["--dropout", "0", "--sam-epsilon", "0.3", "--lr", "0.001", *more]
    cases = {"fp32": ["--optimizer", "sam", *steps]}
    for precision, flags in HALF.items():
        cases[precision] = ["--optimizer", "sam", *steps, *flags]
        cases[f"{precision} update"] = ["--optimizer", "gsam", "--sam-scope", "update", *steps, *flags]
    found = run_pair(translation_data, tmp_path / "pair", backend, cases)
    for key, (first, second) in found.items():
        assert runs.same_bits(first["weights"], second["weights"]), key
        assert all(torch.isfinite(w).all() for w in first["weights"].values()), key
        if key in HALF:
            for weight, exact in zip(first["weights"].values(), found["fp32"][0]["weights"].values(), strict=True):
                torch.testing.assert_close(weight.float(), exact, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["--bf16", "--memory-efficient-bf16", "--memory-efficient-fp16"])
def test_half_precision_through_fairseq_s_own_start(translation_data, tmp_path, precision):
    """Two processes of fairseq-train that find each other: --bf16 is not taken for a TPU on the way either."""
    flags = [
        str(translation_data), *runs.common_flags(), *runs.TRANSLATION, "--optimizer", "sam", precision,
        "--save-dir", str(tmp_path), "--max-update", "2", "--distributed-world-size", "2", "--distributed-no-spawn",
        "--distributed-init-method", f"tcp://127.0.0.1:{free_port()}", "--distributed-backend", "gloo",
        "--ddp-backend", "legacy_ddp",
    ]  # fmt: skip
    logs = [(tmp_path / f"log.{rank}").open("w+") for rank in range(2)]
    workers = [
        subprocess.Popen([sys.executable, "-m", "fairseq_cli.train", *flags, "--distributed-rank", str(rank)],
                         stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    statuses = [worker.wait(timeout=120) for worker in workers]
    assert statuses == [0, 0], "".join((tmp_path / f"log.{rank}").read_text()[-2000:] for rank in range(2))
    assert runs.load(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 2


COUNTED = ("sam", "ga_sam", "esam", "delta_sam", "msam", "instance_sam", "random_sam", "freelb", "efficient_sam")


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_communication(translation_data, tmp_path, backend):
    """By micro-batch none beyond plain training's; shared, exactly one reduction for each ascent step.

    Beyond these: the methods that combine the gradients of all workers reduce two for it, where it is one gradient, and
    what a method remembers is exchanged when it is made anew (two of three updates here).
    """
    cases = {"plain": ["--optimizer", "adam"]}
    for name in COUNTED:
        cases[name] = ["--optimizer", name]
        if runs.shares_a_perturbation(name) and name != "random_sam":
            steps = runs.steps_flag(name, 2)
            cases[f"{name} update"] = ["--optimizer", name, *steps, "--sam-scope", "update"]
    cases["gsam"], cases["gsam update"] = (["--optimizer", "gsam", "--sam-scope", s] for s in ("microbatch", "update"))
    cases["look_sam"], cases["look_sam update"] = (
        ["--optimizer", "look_sam", "--sam-interval", "2", "--sam-scope", s] for s in ("microbatch", "update")
    )
    run_pair(translation_data, tmp_path / "pair", backend, cases)

    def counted(name, rank):
        return json.loads((tmp_path / "pair" / f"{name}.{rank}.json").read_text())["collectives"]

    plain = counted("plain", 0)
    for name in [case for case in cases if case.partition(" ")[0] in COUNTED]:
        expected = plain + (3 * 2 if name.endswith(" update") else 0)  # two steps of three updates
        assert counted(name, 0) == counted(name, 1) == expected, name
    if backend == "legacy_ddp":  # torch's DDP reduces the combined gradient in place of the last pass's
        assert counted("gsam", 0) == plain and counted("look_sam", 0) == plain + 2
        assert counted("gsam update", 0) == plain + 3 * (1 + 2)
        assert counted("look_sam update", 0) == plain + 2 * (1 + 2) + 1  # the plain update measures its gradient


@pytest.mark.mode("bmuf", presets=list(PRESETS))
def test_bmuf(translation_data, tmp_path):
    """Between synchronisations each worker is a run of its own; a synchronisation makes the weights equal."""
    apart = ["--use-bmuf", "--global-sync-iter", "100"]
    together = ["--use-bmuf", "--global-sync-iter", "3", "--warmup-iterations", "1"]
    options = {key: case_flags(key, value) for key, value in {**ALIKE, **RANDOM}.items() if key in PRESETS}
    cases = {key: [*flags, *apart] for key, flags in options.items()}
    cases |= {f"{key} together": [*flags, *together] for key, flags in options.items()}
    found = run_pair(translation_data, tmp_path / "pair", "legacy_ddp", cases)  # fairseq wraps no model with it
    for key, flags in options.items():
        assert runs.same_bits(*(state["weights"] for state in found[f"{key} together"])), key
        assert not runs.same_bits(*(state["weights"] for state in found[key])), key
        if key in ALIKE:
            trainer, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, *flags)
            for numbers in ((0, 2), (4, 6), (8, 10)):  # those of the first worker
                trainer.train_step([batches[number] for number in numbers])
            expected = {n: p.detach() for n, p in trainer.model.named_parameters()}
            assert all(torch.allclose(found[key][0]["weights"][n], w, rtol=0, atol=1e-6) for n, w in expected.items())


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_the_radius_that_is_searched_for_is_that_of_all(translation_data, tmp_path, backend):
    """Both workers find what one finds with all their micro-batches; with BMUF, where weights differ, the same too."""
    flags = [*GA_SAM, *SGD, "--sam-epsilon", "auto", "--sam-rise", "0.05"]
    cases = {scope: [*flags, "--sam-scope", scope] for scope in ("microbatch", "update")}
    together = ["--use-bmuf", "--global-sync-iter", "100"] if backend == "legacy_ddp" else []
    found = run_pair(translation_data, tmp_path / "pair", backend, {**cases, "more": [*flags, *together]})
    for name, states in found.items():
        first, second = (state["method"]["search"]["radii"] for state in states)
        assert first == second and len(first) == len(UPDATES), name
    for scope, case in cases.items():
        trainer, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, *case)
        for numbers in UPDATES:
            trainer.train_step([batches[number] for number in numbers])
        assert found[scope][0]["method"]["search"]["radii"] == pytest.approx(
            unwrap(trainer.optimizer).memory.radii, 1e-3
        )


RESUMED = {
    "ga_sam": [], "look_sam": ["--sam-interval", "2"], "gsam": [],
    "fisher_sam": ["--sam-fisher-samples", "50", "--sam-sparsity", "0.5"],
}  # fmt: skip


@pytest.mark.parametrize("name", ["legacy_ddp", "pytorch_ddp", "zero"])
def test_two_workers_resume_exactly(translation_data, tmp_path, name):
    """After two updates both workers load the first one's checkpoint; the third is that of the uninterrupted run."""
    backend, more = BACKENDS[name]
    flags = {key: ["--optimizer", key, *options, *more, "--clip-norm", "1.0"] for key, options in RESUMED.items()}
    save = ["--save-dir", str(tmp_path)]
    cases = {**flags, **{f"{key} resumed": [*case, *save, "--resume"] for key, case in flags.items()}}
    found = run_pair(translation_data, tmp_path / "pair", backend, cases)
    for key in flags:
        for rank in range(2):
            whole, parts = found[key][rank], found[f"{key} resumed"][rank]
            assert runs.same_bits(whole["weights"], parts["weights"]), key
            assert runs.same_state(whole["method"], parts["method"]), key


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_two_workers(translation_data, tmp_path, backend, scope):
    """At epsilon 0 the base run bit for bit."""
    scope_flags = ("--sam-scope", scope)
    cases = {
        "plain": ("--optimizer", "adam"),
        "zero": (*GA_SAM, "--sam-epsilon", "0", *scope_flags),
        "moved": (*GA_SAM, "--sam-epsilon", "1e-3", *scope_flags),
    }
    found = run_pair(translation_data, tmp_path / "pair", backend, cases)
    plain, zero, moved = ([state["weights"] for state in found[name]] for name in cases)
    assert runs.same_bits(*plain) and runs.same_bits(*zero) and runs.same_bits(*moved)
    assert runs.same_bits(plain[0], zero[0]) and not runs.same_bits(plain[0], moved[0])


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
