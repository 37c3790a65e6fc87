"""One update through fairseq's trainer against the formulas, epsilon 0, scopes, and what survives an error."""

import gc
import math

import pytest
import torch

from fairseq_sam import PRESETS, InstanceBatch, SharpnessAware
from fairseq_sam.adapter.batches import UpdateBatch
from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.core.backup import has_own_memory
from fairseq_sam.core.step import SharpnessAwareStep
from tests.adapter import runs

SGD = ["--base-optimizer", "sgd", "--lr", "0.5"]
NO_DROPOUT = ["--dropout", "0.0"]


def flags(preset, *more):
    return [*runs.TRANSLATION, "--optimizer", preset, *more]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def gradient_at(trainer, at, batches):
    """Summed gradient and sample size of micro-batches at other weights, without p.grad and without the seam."""
    model, criterion = trainer.model.train(), trainer.criterion
    total, size = {name: torch.zeros_like(w) for name, w in at.items()}, 0

    class Proxy(torch.nn.Module):
        get_normalized_probs = model.get_normalized_probs
        get_targets = model.get_targets

        def forward(self, **inputs):
            return torch.func.functional_call(model, leaves, (), inputs)

    for sample in batches:
        leaves = {name: w.clone().requires_grad_(True) for name, w in at.items()}
        loss, sample_size, _ = criterion(Proxy(), sample)
        for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True):
            total[name] += 0 if g is None else g
        size += sample_size
    return total, size


def ga_sam_update(trainer, before, groups_of_batches, epsilon, unit, lr):
    """GA-SAM, L-infinity, K = 1: w - lr mean_g / sample size, one perturbation for each group of micro-batches."""
    total, sizes = {name: torch.zeros_like(w) for name, w in before.items()}, 0
    for batches in groups_of_batches:
        g, size = gradient_at(trainer, before, batches)
        scale = 1.0 / size if unit == "mean" else 1.0
        layers = {}
        for name in g:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        n = sum(w.numel() for w in before.values())
        norm = scale * math.sqrt(sum(float(x.double().square().sum()) for x in g.values()))
        moved = {}
        for names in layers.values():
            n_i = sum(before[name].numel() for name in names)
            g_i = scale * math.sqrt(sum(float(g[name].double().square().sum()) for name in names))
            T = min(math.sqrt(n_i) / (g_i * math.sqrt(n)), 1000.0 / norm)
            for name in names:
                moved[name] = before[name] + epsilon * T * g[name].sign()
        g1, _ = gradient_at(trainer, moved, batches)
        for name in total:
            total[name] += (g[name] + g1[name]) / 2
        sizes += size
    return {name: before[name] - lr * total[name] / sizes for name in before}


@pytest.mark.parametrize("unit", ["mean", "sum"])
@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_ga_sam_update_equals_the_formula(translation_data, scope, unit):
    """Two micro-batches: each with its own perturbation, or both with one."""
    epsilon = 1e-3 if unit == "mean" else 1e-3 * 200
    trainer, batches = runs.build_trainer(
        translation_data, *flags("ga_sam", *SGD, *NO_DROPOUT), "--sam-epsilon", str(epsilon), "--sam-norm", "linf",
        "--sam-scope", scope, "--sam-gradient", unit, "--update-freq", "2",
    )  # fmt: skip
    before = weights(trainer)
    micro = batches[:2]
    trainer.train_step(micro)
    groups = [[micro[0]], [micro[1]]] if scope == "microbatch" else [micro]
    expected = ga_sam_update(trainer, before, groups, epsilon, unit, lr=0.5)
    plain = {name: w.clone() for name, w in before.items()}
    g, size = gradient_at(trainer, before, micro)
    largest = max(float((g[name] * 0.5 / size + expected[name] - plain[name]).abs().max()) for name in plain)
    assert largest > 1e-4, "the perturbation makes a difference that the tolerance does not hide"
    for name, found in weights(trainer).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-6)


def test_scopes_differ(translation_data):
    results = []
    for scope in ("microbatch", "update"):
        trainer, batches = runs.build_trainer(
            translation_data, *flags("sam", *SGD), "--sam-epsilon", "0.5", "--sam-scope", scope
        )
        trainer.train_step(batches[:3])
        results.append(weights(trainer))
    assert not runs.same_bits(*results)


@pytest.mark.parametrize(("preset", "scope"), runs.SCOPED)
@pytest.mark.parametrize("dropout", ["same", "fresh"])
def test_epsilon_zero_equals_the_base_bit_for_bit(translation_data, preset, scope, dropout):
    """Same weights and optimizer state after updates of one and of three micro-batches, with dropout and clipping."""
    states = []
    for optimizer in (
        ["--optimizer", "adam"],
        [
            "--optimizer",
            preset,
            "--sam-epsilon",
            "0",
            *runs.steps_flag(preset, 3),
            "--sam-scope",
            scope,
            "--sam-dropout",
            dropout,
        ],
    ):
        trainer, batches = runs.build_trainer(
            translation_data, *runs.TRANSLATION, *optimizer, "--adam-betas", "(0.9, 0.98)", "--clip-norm", "0.1"
        )
        for number in range(4):
            size = 1 if number % 2 else 3
            trainer.train_step(batches[number : number + size])
        state = trainer.optimizer.state_dict()
        state.pop("sharpness_aware", None)
        states.append((weights(trainer), state))
    assert runs.same_bits(states[0][0], states[1][0])
    assert runs.same_state(states[0][1], states[1][1])


@pytest.mark.parametrize("base", ["adam", "adamax", "adadelta", "adagrad", "nag", "sgd", "adafactor"])
def test_every_base_optimizer(translation_data, base):
    """Bit for bit the base at epsilon 0, with the base's own flags, and a different result with a perturbation."""
    own = {"adam": ["--adam-eps", "1e-6"], "nag": ["--momentum", "0.8"], "sgd": ["--momentum", "0.5"],
           "adafactor": ["--adafactor-eps", "(1e-20, 1e-2)", "--decay-rate", "-0.7"]}.get(base, [])  # fmt: skip
    results = []
    for optimizer in (
        ["--optimizer", base],
        ["--optimizer", "sam", "--base-optimizer", base, "--sam-epsilon", "0"],
        ["--optimizer", "sam", "--base-optimizer", base, "--sam-epsilon", "0.1"],
    ):
        trainer, batches = runs.build_trainer(
            translation_data, *runs.TRANSLATION, *optimizer, *own, "--weight-decay", "0.01"
        )
        for number in range(3):
            trainer.train_step(batches[number : number + 1])
        results.append(weights(trainer))
    assert runs.same_bits(results[0], results[1])
    assert not runs.same_bits(results[0], results[2])


def test_base_defaults_are_the_bases_own(translation_data):
    """nag's momentum is 0.99 and sgd's 0.0, though both have a flag --momentum."""
    for base, momentum in (("nag", 0.99), ("sgd", 0.0)):
        trainer, _ = runs.build_trainer(translation_data, *flags("sam", "--base-optimizer", base))
        assert trainer.optimizer.param_groups[0]["momentum"] == momentum


def test_plain_runs_are_untouched(translation_data, monkeypatch):
    trainer, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, "--optimizer", "adam")
    calls = []
    original = type(trainer.task).train_step
    monkeypatch.setattr(type(trainer.task), "train_step", lambda *a, **k: calls.append(1) or original(*a, **k))
    trainer.train_step(batches[:1])
    assert len(calls) == 1 and "train_step" not in vars(trainer.task)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [3] * 6),
        (["--sam-interval", "2"], [3, 1, 3, 1, 3, 1]),
        (["--sam-start-update", "4"], [1, 1, 1, 1, 3, 3]),
        (["--sam-start-epoch", "2"], [1, 1, 1, 3, 3, 3]),
        (["--sam-start-epoch", "2", "--sam-start-update", "2", "--sam-interval", "3"], [1, 1, 1, 1, 1, 3]),
    ],
)
def test_when(translation_data, monkeypatch, options, expected):
    """Passes of six updates; epoch 2 begins after three. The task's own train_step runs once per pass."""
    trainer, batches = runs.build_trainer(translation_data, *flags("sam", "--sam-steps", "2", *options))
    calls = []
    original = type(trainer.task).train_step
    monkeypatch.setattr(type(trainer.task), "train_step", lambda *a, **k: calls.append(1) or original(*a, **k))
    counts = []
    for number in range(6):
        if number == 3:
            trainer.begin_epoch(2)
        calls.clear()
        trainer.train_step(batches[:1])
        counts.append(len(calls))
    assert counts == expected


@pytest.mark.parametrize(("preset", "scope"), runs.SCOPED)
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_weights_are_restored_after_an_error_in_any_pass(translation_data, monkeypatch, preset, scope, error):
    trainer, batches = runs.build_trainer(
        translation_data, *flags(preset), *runs.steps_flag(preset, 2), "--sam-epsilon", "0.01", "--sam-scope", scope,
        *(["--sam-fisher-samples", "2"] if preset == "fisher_sam" else []), "--max-tokens", "60",
    )  # fmt: skip
    sliced = sorted(batches, key=lambda sample: len(sample["id"]))[:2]
    before, calls, failing = weights(trainer), [], 0
    original = type(trainer.task).train_step

    def train_step(*args, **kwargs):
        calls.append(not runs.same_bits(before, weights(trainer)))
        result = original(*args, **kwargs)
        if len(calls) == failing:
            raise error
        return result

    monkeypatch.setattr(type(trainer.task), "train_step", train_step)
    with monkeypatch.context() as no_update:  # the first time through, only count the passes
        no_update.setattr(type(trainer.optimizer), "step", lambda *args, **kwargs: None)
        trainer.train_step(sliced)
    num_calls, seen = len(calls), any(calls)
    assert num_calls >= 2 and (seen or PRESETS[preset].where == "embeddings")
    for failing in sorted({1, 2, 3, num_calls // 2, num_calls - 1, num_calls} & set(range(1, num_calls + 1))):
        calls.clear()
        unwrap(trainer.optimizer).memory.load_state_dict({})
        trainer.set_num_updates(0)
        with pytest.raises(type(error)):
            trainer.train_step(sliced)
        assert len(calls) == failing and runs.same_bits(before, weights(trainer))
        assert "train_step" not in vars(trainer.task), "the seam is gone after an error"
        assert "backward" not in vars(trainer.optimizer), "and so is a shadowed backward"
        trainer.zero_grad()


def test_after_out_of_memory_in_a_shared_ascent_the_next_micro_batch_is_plain(translation_data, monkeypatch):
    """fairseq with several workers goes on with the update's other micro-batches."""
    from fairseq_sam.adapter.seam import SharpnessAwareTrainStep

    trainer, batches = runs.build_trainer(translation_data, *flags("ga_sam"), "--sam-scope", "update")
    step = SharpnessAwareTrainStep(trainer, unwrap(trainer.optimizer), batches[:2])
    original, calls = step._task_train_step, []

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory")
        return original(*args, **kwargs)

    step._task_train_step = train_step
    arguments = (trainer.model, trainer.criterion, trainer.optimizer, 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(batches[0], *arguments)
    before = weights(trainer)
    step(batches[1], *arguments)
    assert len(calls) == 3 and runs.same_bits(before, weights(trainer))


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_out_of_memory_is_left_to_fairseq(translation_data, monkeypatch, failing, scope):
    """fairseq skips the batch; weights are those of before, and the next batch trains."""
    options = ("--sam-steps", "2", "--sam-scope", scope)
    trainer, batches = runs.build_trainer(translation_data, *flags("ga_sam"), *options)
    before, calls = weights(trainer), []
    original = type(trainer.task).train_step

    def train_step(*args, **kwargs):
        calls.append(1)
        result = original(*args, **kwargs)
        if len(calls) == failing:
            raise RuntimeError("CUDA out of memory")
        return result

    monkeypatch.setattr(type(trainer.task), "train_step", train_step)
    assert trainer.train_step(batches[:1]) is None
    assert runs.same_bits(before, weights(trainer))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.train_step(batches[1:2]) is not None
    assert not runs.same_bits(before, weights(trainer))


def test_crash_checkpoint_holds_unperturbed_weights(translation_data, monkeypatch, tmp_path):
    trainer, batches = runs.build_trainer(
        translation_data, *flags("sam"), "--sam-epsilon", "5.0", "--save-dir", str(tmp_path)
    )
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    calls = []
    original = type(trainer.task).train_step

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("in the pass at perturbed weights")
        return original(*args, **kwargs)

    monkeypatch.setattr(type(trainer.task), "train_step", train_step)
    with pytest.raises(ValueError, match="perturbed"):
        trainer.train_step(batches[:1])
    assert runs.same_bits(before, runs.load(tmp_path / "crash.pt")["model"])


def test_skipped_ascents_are_counted_and_saved(translation_data, monkeypatch):
    trainer, batches = runs.build_trainer(translation_data, *flags("sam"))
    optimizer = unwrap(trainer.optimizer)
    monkeypatch.setattr(trainer.criterion, "eps", 0.0)
    original = type(trainer.task).train_step

    def zero_gradient(*args, **kwargs):
        result = original(*args, **kwargs)
        for p in trainer.model.parameters():
            p.grad = torch.zeros_like(p)
        return result

    monkeypatch.setattr(type(trainer.task), "train_step", zero_gradient)
    trainer.train_step(batches[:2])
    assert optimizer.num_skipped == 2
    assert trainer.optimizer.state_dict()["sharpness_aware"]["num_skipped"] == 2


def test_epsilon_zero_with_quant_noise_is_the_base(translation_data):
    """fairseq's quant-noise overwrites weights in the forward pass; passes before the last one leave no trace."""
    found = []
    for options in (["--optimizer", "adam"], ["--optimizer", "multistep_defense", "--sam-epsilon", "0"]):
        trainer, batches = runs.build_trainer(
            translation_data, *runs.TRANSLATION, "--quant-noise-pq", "0.5", "--quant-noise-pq-block-size", "2", *options
        )
        for number in range(3):
            trainer.train_step(batches[number : number + 1])
        found.append(weights(trainer))
    assert runs.same_bits(*found)


@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_an_update_lets_go_of_the_weights_memory(translation_data, scope):
    """While something else has it, the next update copies the weights there and back: right, but slower."""
    trainer, batches = runs.build_trainer(
        translation_data, *flags("ga_sam", "--sam-scope", scope, "--update-freq", "2")
    )
    gc.collect()
    gc.disable()
    try:
        for first in (0, 2):
            trainer.train_step(batches[first : first + 2])
            assert all(has_own_memory(parameter) for parameter in trainer.model.parameters())
    finally:
        gc.enable()


@pytest.mark.parametrize("failing", [(2,), (2, 4), (1, 2, 3, 4)])
def test_instances_without_a_loss_have_no_weight(failing):
    """delta-SAM where a forward pass of a micro-batch, at w + r or w - r, does not fit into memory; its pass does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    weights, calls = [], []

    class Part(InstanceBatch):
        def losses(self):
            calls.append(self)
            if len(calls) in failing:
                raise RuntimeError("CUDA out of memory.")
            return super().losses()

        def run_weighted(self, weigh, *numbers):
            def noted(*each):
                weights.append(weigh(*each))
                return weights[-1]

            return super().run_weighted(noted, *numbers)

    parts = {place: Part(lambda x: model(x).square().sum(1), torch.randn(3, 3).double()) for place in range(2)}
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method="delta_sam")
    step = SharpnessAwareStep(sam.method, sam._space(), scales_loss=False)
    step.ascend(UpdateBatch(parts, spares_memory=True), lambda gradients, result: (gradients, 1.0))
    first, second = (bool((each > 0).all()) for each in weights)
    assert (first, second) == (1 not in failing, False) and float(weights[1].abs().max()) == 0.0
    assert (float(step.measured.gradient_norm) > 0) == (1 not in failing)
