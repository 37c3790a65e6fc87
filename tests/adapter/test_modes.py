"""The gradient that reaches the base optimizer in each mode of fairseq, for every preset."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch

from fairseq_sam import PRESETS, InstanceBatch, SharpnessAware
from fairseq_sam.adapter.config import check_config
from fairseq_sam.adapter.embeddings import word_embeddings
from fairseq_sam.adapter.optimizers import SharpnessAwareOptimizer, unwrap
from fairseq_sam.adapter.precision import loss_scale
from fairseq_sam.core.axes import TENSOR_GRANULARITIES
from fairseq_sam.core.random_state import RandomState
from tests.adapter import runs

PRESET = pytest.mark.parametrize("preset", PRESETS)
# Perturbations so large that their gradient is far from the plain one, next to which rounding is small.
RADIUS = {
    "sam": 0.5, "asam": 2.0, "layer_sam": 0.05, "multistep_defense": 0.02, "ga_sam": 0.1, "efficient_sam": 0.5,
    "msam": 0.5, "fisher_sam": 1.0, "esam": 0.5, "gsam": 0.5, "delta_sam": 2.5, "instance_sam": 0.3, "random_sam": 6.0,
    "model_perturbation": 0.5, "awp": 0.3, "look_sam": 0.5, "freelb": 0.5,
}  # fmt: skip
BASE = [*runs.TRANSLATION, "--dropout", "0", "--max-tokens", "100"]
SGD = ["--base-optimizer", "sgd", "--lr", "0.1"]
# Flattened: no tensors, so nothing that is made of them.
FLAT = [p for p in PRESETS if not (PRESETS[p].has_groups and PRESETS[p].granularity in TENSOR_GRANULARITIES)]


def options(preset):
    more = {"fisher_sam": ["--sam-fisher-samples", "1000"], "model_perturbation": ["--sam-step-size", "1.0"]}
    return ["--optimizer", preset, "--sam-epsilon", str(RADIUS[preset]), *more.get(preset, []), *SGD]


@pytest.fixture(autouse=True)
def cuda_stand_ins(monkeypatch):
    """What fairseq asks of CUDA in modes that would run without it."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # as of a tensor on CPU
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args: self)
        monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda **kwargs: torch.amp.GradScaler("cpu", **kwargs))


@pytest.fixture
def same_choices(monkeypatch):
    """Random directions and masks do not depend on the place in the run."""
    original = RandomState.__init__
    monkeypatch.setattr(RandomState, "__init__", lambda self, devices, salt="": original(self, devices, ""))


class Stepped:
    """A trainer, and the gradients with which its base optimizer was stepped, as flat float32 vectors."""

    def __init__(self, data, *flags):
        self._begin(*runs.build_trainer(data, *BASE, *flags))

    @classmethod
    def of(cls, trainer, batches):
        stepped = cls.__new__(cls)
        stepped._begin(trainer, batches)
        return stepped

    def _begin(self, trainer, batches):
        self.trainer = trainer
        self.batches = sorted(batches, key=lambda sample: len(sample["id"]))[-4:]
        trainer.reset_dummy_batch(self.batches[0])

    def gradient(self, monkeypatch, samples):
        """Of one update, in the order of the model's parameters."""
        found, original = [], SharpnessAwareOptimizer.step

        def step(optimizer, *args, **kwargs):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            scale = float(kwargs.get("scale", 1.0))
            found.append(torch.cat([p.grad.detach().float().reshape(-1) / scale for p in params]))
            return original(optimizer, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(SharpnessAwareOptimizer, "step", step)
            self.trainer.train_step(samples)
        assert len(found) == 1, "one step of the base optimizer"
        return found[0]


def gradient(data, monkeypatch, *flags, numbers=(0,)):
    stepped = Stepped(data, *flags)
    return stepped.gradient(monkeypatch, [stepped.batches[number] for number in numbers])


def distance(first, second):
    """Relative to the second."""
    return float((first - second).norm() / second.norm())


def assert_right(found, expected, plain, tolerance=1e-4):
    """As expected, and not by being the plain gradient."""
    assert torch.isfinite(found).all()
    assert distance(expected, plain) > 100 * tolerance, "the perturbation shows"
    assert distance(found, expected) < tolerance


@pytest.fixture(scope="module")
def fp32(translation_data):
    """Gradients in fp32 by preset and micro-batches, and the plain one; computed once."""
    kept = {}

    def of(monkeypatch, preset, numbers=(0,)):
        for name in (preset, None):
            if (name, numbers) not in kept:
                flags = options(name) if name else [*options("sam"), "--sam-epsilon", "0"]
                kept[name, numbers] = gradient(translation_data, monkeypatch, *flags, numbers=numbers)
        return kept[preset, numbers], kept[None, numbers]

    return of


# -- fp32: against the engine without fairseq's trainer ----------------------------------------------------------------


class Rows:
    """A sample as rows that can be chosen: what `InstanceBatch` takes, with fairseq's model and criterion."""

    def __init__(self, trainer, sample):
        self.model, self.criterion, self.sample = trainer.model.train(), trainer.criterion, sample

    def losses(self, rows):
        net = self.sample["net_input"]
        inputs = {key: net[key][rows] for key in ("src_tokens", "src_lengths", "prev_output_tokens")}
        target = self.sample["target"][rows]
        log_p = self.model.get_normalized_probs(self.model(**inputs), log_probs=True)
        keep = target != self.criterion.padding_idx
        nll = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        share = self.criterion.eps / (log_p.size(-1) - 1)
        smoothed = (1.0 - self.criterion.eps - share) * nll - share * log_p.sum(-1)
        return (smoothed * keep).sum(1)


@PRESET
@pytest.mark.mode("fp32")
def test_fp32_is_the_engine(translation_data, monkeypatch, same_choices, preset):
    """The engine in a plain loop, with a loss written here: same gradient. Its unit is the token, as fairseq's."""
    found = gradient(translation_data, monkeypatch, *options(preset))
    plain = gradient(translation_data, monkeypatch, *options("sam"), "--sam-epsilon", "0")
    stepped = Stepped(translation_data, *options(preset))
    trainer, sample = stepped.trainer, stepped.batches[0]
    trainer._set_seed()
    method = unwrap(trainer.optimizer).method
    axes = {name: getattr(method, name) for name in ("epsilon", "step_size", "fisher_samples") if getattr(method, name)}
    embeddings = word_embeddings(trainer.model, trainer.task) if method.where == "embeddings" else None
    sgd = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    sam = SharpnessAware(sgd, trainer.model, preset, embeddings=embeddings, **axes)
    rows, size = Rows(trainer, sample), int(sample["ntokens"])
    number = len(sample["id"])
    sam.zero_grad()
    if method.needs_instances:
        sam.accumulate(InstanceBatch(lambda r: rows.losses(r) * number / size, torch.arange(number)))
    else:

        def closure():
            loss = rows.losses(torch.arange(number)).sum()
            loss.backward()
            return loss

        sam.accumulate(closure, sample_size=size)
    scale = 1.0 if method.needs_instances else 1.0 / size
    expected = torch.cat([p.grad.reshape(-1) * scale for p in trainer.model.parameters()])
    if preset == "esam":  # the mean over the chosen instances here, over their tokens there
        expected *= found.norm() / expected.norm()
    assert_right(found, expected, plain)


# -- precision ---------------------------------------------------------------------------------------------------------

HALF = {
    "fp16": (["--fp16"], 0.03),
    "fp16 not flat": (["--fp16", "--fp16-no-flatten-grads"], 0.03),
    "memory-efficient fp16": (["--fp16", "--memory-efficient-fp16"], 0.03),
    "bf16": (["--bf16"], 0.15),
    "memory-efficient bf16": (["--bf16", "--memory-efficient-bf16"], 0.15),
    "amp": (["--amp"], 1e-4),  # the scaler; on CPU fairseq's autocast does nothing
}


def in_half(mode, presets=PRESETS):
    return [pytest.param(mode, preset, marks=pytest.mark.mode(mode), id=f"{mode}-{preset}") for preset in presets]


@pytest.mark.parametrize(
    ("mode", "preset"), [case for mode in HALF for case in in_half(mode, FLAT if mode == "fp16" else PRESETS)]
)
def test_half_precision(translation_data, monkeypatch, fp32, mode, preset):
    """The gradient of fp32 up to rounding: T, norms and the update see unscaled gradients."""
    flags, tolerance = HALF[mode]
    expected, plain = fp32(monkeypatch, preset)
    base = ["--base-optimizer", "adam"] if "memory" in mode else []  # fairseq refuses SGD there
    found = gradient(translation_data, monkeypatch, *options(preset), *base, *flags, "--fp16-init-scale", "16")
    if preset == "delta_sam" and mode != "amp":  # weighs instances by second differences, which rounding changes
        assert torch.isfinite(found).all() and distance(found, expected) < distance(plain, expected)
        return
    assert distance(expected, plain) > 2 * tolerance, "the perturbation shows"
    assert distance(found, expected) < tolerance


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in FLAT])
@pytest.mark.mode("fp16", refused=True)
def test_flat_fp16_is_refused_where_tensors_are_needed(preset):
    flags = ["/nowhere", *runs.common_flags(), *runs.TRANSLATION, "--optimizer", preset, "--fp16"]
    with pytest.raises(ValueError, match=r"--fp16 flattens .* --fp16-no-flatten-grads, or use --amp"):
        check_config(runs.configuration(flags))


SCALERS = ["fp16", "fp16 not flat", "memory-efficient fp16", "amp"]


@pytest.mark.parametrize("failing", ["ascent", "last pass", "both"])
@pytest.mark.parametrize("scope", ["microbatch", "update"])
@pytest.mark.parametrize("mode", SCALERS)
def test_the_loss_scaler_learns_once(translation_data, monkeypatch, mode, scope, failing):
    """Of an overflow anywhere in K + 1 passes of two micro-batches: one halving, one retry, weights as before."""
    flags = [*HALF[mode][0], "--fp16-init-scale", "64", "--sam-scope", scope, "--amp-batch-retries", "2"]
    preset = "asam" if mode == "fp16" else "multistep_defense"
    base = ["--base-optimizer", "adam"] if "memory" in mode else []
    stepped = Stepped(translation_data, *options(preset), *base, *flags)
    trainer, task = stepped.trainer, type(stepped.trainer.task)
    original, calls = task.train_step, []
    steps = PRESETS[preset].num_ascents
    num_passes = 2 * (steps + 1)

    def train_step(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(1)
        is_last = len(calls) % (steps + 1) == 0 if scope == "microbatch" else len(calls) > 2 * steps
        if len(calls) <= num_passes and (failing == "both" or (failing == "last pass") == is_last):
            next(p for p in trainer.model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
        return result

    monkeypatch.setattr(task, "train_step", train_step)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step(stepped.batches[:2])
    assert loss_scale(trainer.optimizer) == 32.0
    optimizer = unwrap(trainer.optimizer)
    if mode == "amp":  # tries the batch again at once
        assert trainer.get_num_updates() == 1 and len(calls) == 2 * num_passes
        trainer.set_num_updates(0)
    else:
        assert trainer.get_num_updates() == 0 and len(calls) == num_passes
        assert runs.same_bits(before, {name: p.detach() for name, p in trainer.model.named_parameters()})
    assert optimizer.num_skipped == (0 if failing == "last pass" else steps * (2 if scope == "microbatch" else 1))
    trainer.train_step(stepped.batches[:2])
    assert loss_scale(trainer.optimizer) == 32.0 and trainer.get_num_updates() == 1


# -- accumulation, clipping, averages, memory --------------------------------------------------------------------------

SHARED = [p for p in PRESETS if runs.shares_a_perturbation(p)]
ALONE = [p for p in PRESETS if p not in SHARED]


# ESAM chooses instances of each micro-batch, and their tokens alone count: here all of them.
WHOLE = {"esam": ["--sam-esam-gamma", "1"]}


@PRESET
@pytest.mark.mode("update-freq")
def test_update_freq_by_micro_batch(translation_data, monkeypatch, same_choices, preset):
    """The sum of what each micro-batch gives alone. One that is missing (a dummy) adds nothing."""
    flags = [*options(preset), *WHOLE.get(preset, []), "--update-freq", "2"]
    if preset == "fisher_sam":  # the mask of an update comes from all its micro-batches
        instances = sum(len(sample["id"]) for sample in Stepped(translation_data, *flags).batches[:2])
        flags += ["--sam-fisher-samples", str(instances), "--sam-mask-interval", "1000"]
    stepped = Stepped(translation_data, *flags)
    found = stepped.gradient(monkeypatch, stepped.batches[:2])
    memory = unwrap(stepped.trainer.optimizer).memory.state_dict()
    sizes = [int(sample["ntokens"]) for sample in stepped.batches[:2]]
    alone = []
    for number in range(2):
        stepped = Stepped(translation_data, *flags)
        if preset == "fisher_sam":
            unwrap(stepped.trainer.optimizer).memory.load_state_dict(memory)
        alone.append(stepped.gradient(monkeypatch, [stepped.batches[number]]))
    expected = (alone[0] * sizes[0] + alone[1] * sizes[1]) / sum(sizes)
    plain = gradient(translation_data, monkeypatch, *options("sam"), "--sam-epsilon", "0", numbers=(0, 1))
    assert_right(found, expected, plain)
    first = gradient(translation_data, monkeypatch, *flags)
    stepped = Stepped(translation_data, *flags)
    assert torch.equal(first, stepped.gradient(monkeypatch, [{}, stepped.batches[0]]))


@pytest.mark.parametrize("preset", SHARED)
@pytest.mark.mode("update-freq, update")
def test_update_freq_as_a_whole(translation_data, monkeypatch, same_choices, preset):
    """What one batch of all their sentences gives: the perturbation is that of the whole update."""
    flags = [*options(preset), *WHOLE.get(preset, [])]
    stepped = Stepped(translation_data, *flags)
    dataset = stepped.trainer.task.dataset("train")
    rows = [dataset[int(i)] for sample in stepped.batches[:2] for i in sample["id"]]
    joined = dataset.collater(rows)
    order = joined["id"].tolist()
    plain = gradient(translation_data, monkeypatch, *options("sam"), "--sam-epsilon", "0", numbers=(0, 1))
    expected = stepped.gradient(monkeypatch, [joined])
    chosen = [dataset.collater([dataset[i] for i in part]) for part in (order[:3], order[3:])]
    shared = Stepped(translation_data, *flags, "--sam-scope", "update", "--update-freq", "2")
    assert_right(shared.gradient(monkeypatch, chosen), expected, plain)


@pytest.mark.parametrize("preset", ALONE)
@pytest.mark.mode("update-freq, update", "workers, update", "local weights, update", refused=True)
def test_presets_that_cannot_share_a_perturbation_are_refused(preset):
    flags = ["/nowhere", *runs.common_flags(), *runs.TRANSLATION, "--optimizer", preset, "--sam-scope", "update"]
    with pytest.raises(ValueError, match=r"\(--sam-(m|ascent|where)\).*scope \(--sam-scope\)|--sam-scope"):
        check_config(runs.configuration(flags))


@PRESET
@pytest.mark.mode("clip-norm")
def test_clip_norm(translation_data, monkeypatch, fp32, preset):
    """The final gradient is clipped, once; the ascent sees none of it."""
    expected, plain = fp32(monkeypatch, preset)
    found = gradient(translation_data, monkeypatch, *options(preset), "--clip-norm", "0.01")
    assert float(found.norm()) == pytest.approx(0.01, rel=1e-3) and float(expected.norm()) > 0.1
    assert_right(found, expected * (found.norm() / expected.norm()), plain)


@PRESET
@pytest.mark.mode("checkpoint-activations")
def test_checkpoint_activations(translation_data, monkeypatch, preset):
    """The same gradient, dropout included, though parts of the forward pass run again in each backward pass."""
    flags = [*options(preset), "--dropout", "0.2"]
    expected = gradient(translation_data, monkeypatch, *flags)
    found = gradient(translation_data, monkeypatch, *flags, "--checkpoint-activations")
    plain = gradient(translation_data, monkeypatch, *options("sam"), "--dropout", "0.2", "--sam-epsilon", "0")
    assert_right(found, expected, plain)


@PRESET
@pytest.mark.mode("ema")
def test_ema_is_the_average_of_unperturbed_weights(translation_data, preset):
    """fairseq's own average of copies that are made between updates, bit for bit."""
    from fairseq.models.ema import EMA

    stepped = Stepped(translation_data, *options(preset), "--store-ema", "--ema-decay", "0.5", "--ema-fp32")
    trainer = stepped.trainer
    assert trainer.ema.get_model() is not trainer.model  # made when it is first asked for
    expected = EMA(copy.deepcopy(trainer.model), trainer.cfg.ema)
    for number in range(3):
        trainer.train_step(stepped.batches[number : number + 1])
        expected.step(copy.deepcopy(trainer.model), number + 1)
    weights = trainer.model.state_dict()
    found, average = trainer.ema.get_model().state_dict(), expected.get_model().state_dict()
    assert runs.same_bits(found, average)
    assert not any(torch.equal(found[name], weights[name]) for name in weights if weights[name].dim() > 1)


# -- tasks, front ends, base optimizers --------------------------------------------------------------------------------


@PRESET
@pytest.mark.mode("own train_step")
def test_a_task_with_its_own_train_step(translation_data, monkeypatch, fp32, preset):
    """It runs backward twice in a pass, half of the loss each.

    Once where losses of instances take the loss's place, and where each reading of the words has its perturbation.
    """
    expected, plain = fp32(monkeypatch, preset)
    stepped = Stepped(translation_data, *options(preset))
    once = PRESETS[preset].ascent == "weighted" or PRESETS[preset].where == "embeddings"
    halves = 1 if once else 2
    calls = []

    class OwnTask(type(stepped.trainer.task)):
        def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
            calls.append(update_num)
            model.train()
            for _ in range(halves):
                loss, sample_size, logging_output = criterion(model, sample)
                optimizer.backward(loss * (0.0 if ignore_grad else 1.0 / halves))
            return loss, sample_size, logging_output

    stepped.trainer.task.__class__ = OwnTask
    assert_right(stepped.gradient(monkeypatch, stepped.batches[:1]), expected, plain)
    assert calls


YAML = (
    runs.YAML_RECIPE
    + """\
common: {{user_dir: {plugin}, cpu: true, seed: 3}}
optimizer: {optimizer}
lr_scheduler: {{_name: fixed}}
dataset: {{max_tokens: 100, num_workers: 0}}
optimization: {{lr: [0.1]}}
distributed_training: {{distributed_world_size: 1}}
"""
)
# In a process of its own: once hydra has begun in one, fairseq's command line is read differently there.
FROM_YAML = """
import sys, torch, pytest, fairseq_sam
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import omegaconf_no_object_check
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests.adapter import runs
from tests.adapter.test_modes import Stepped

for name in sys.argv[2:]:
    hydra_init(name)
    with initialize_config_dir(sys.argv[1], version_base="1.1"):
        cfg = compose(name)
    add_defaults(cfg)
    with omegaconf_no_object_check():
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    stepped = Stepped.of(*runs.trainer_of(cfg))
    torch.save(stepped.gradient(pytest.MonkeyPatch(), stepped.batches[:1]), f"{sys.argv[1]}/{name}.pt")
"""


@pytest.mark.mode("hydra", presets=list(PRESETS))
def test_hydra(translation_data, monkeypatch, fp32, tmp_path):
    """Keys of YAML give the gradient of the flags; test_commands.py runs fairseq-hydra-train itself."""
    for preset in PRESETS:
        flags = options(preset)
        keys = {"_name": preset}
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            if flag not in ("--optimizer", "--lr"):
                keys[flag[2:].replace("-", "_")] = value if flag == "--base-optimizer" else float(value)
        text = YAML.format(plugin=runs.PLUGIN, data=translation_data, optimizer=json.dumps(keys))
        (tmp_path / f"{preset}.yaml").write_text(text.replace("1000.0", "1000"))
    command = [sys.executable, "-c", FROM_YAML, str(tmp_path), *PRESETS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for preset in PRESETS:
        expected, plain = fp32(monkeypatch, preset)
        assert_right(torch.load(tmp_path / f"{preset}.pt"), expected, plain)


BASES = ["adam", "adamax", "adadelta", "adagrad", "nag", "sgd", "adafactor"]


@PRESET
@pytest.mark.mode("base optimizers")
def test_the_gradient_is_the_same_for_every_base(translation_data, monkeypatch, fp32, preset):
    """What a base does with it is its own; test_update.py compares each with fairseq's. Three bases per preset."""
    expected, plain = fp32(monkeypatch, preset)
    place = list(PRESETS).index(preset)
    for base in {"adafactor", BASES[place % len(BASES)], BASES[(place + 3) % len(BASES)]}:
        found = gradient(translation_data, monkeypatch, *options(preset), "--base-optimizer", base)
        assert_right(found, expected, plain)


@pytest.mark.parametrize(("base", "package"), [("lamb", "apex"), ("cpu_adam", "deepspeed")])
def test_bases_that_need_another_package_say_so(translation_data, base, package):
    """As plain fairseq does; neither builds on CPU."""
    with pytest.raises(ImportError, match=f"(?i)please install {package}"):
        runs.build_trainer(translation_data, *runs.TRANSLATION, "--optimizer", "sam", "--base-optimizer", base)


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "fully_sharded": (["--ddp-backend", "fully_sharded"], r"--ddp-backend fully_sharded .* pytorch_ddp or legacy_ddp"),
    "half bmuf": (["--use-bmuf", "--fp16", "--fp16-no-flatten-grads"], r"--use-bmuf .* --fp16.*leave one of them out"),
    "pipeline": (["--pipeline-model-parallel"], r"--pipeline-model-parallel .* leave it out"),
}


@pytest.mark.parametrize(
    ("mode", "preset"),
    [pytest.param(mode, p, marks=pytest.mark.mode(mode, refused=True)) for mode in REFUSED for p in PRESETS],
)
def test_what_cannot_work_is_refused_with_the_reason(mode, preset):
    flags, message = REFUSED[mode]
    with pytest.raises(ValueError, match=message):
        check_config(
            runs.configuration(["/nowhere", *runs.common_flags(), *runs.TRANSLATION, "--optimizer", preset, *flags])
        )


@pytest.mark.parametrize("preset", SHARED)
@pytest.mark.parametrize("apart", [["--use-bmuf"], ["--ddp-backend", "slowmo"]], ids=["bmuf", "slowmo"])
@pytest.mark.mode("local weights, update", refused=True)
def test_workers_with_weights_of_their_own_share_no_perturbation(preset, apart):
    flags = [*runs.TRANSLATION, "--optimizer", preset, "--sam-scope", "update", *apart]
    with pytest.raises(ValueError, match=rf"--sam-scope update cannot be used with {' '.join(apart)}.*microbatch"):
        check_config(runs.configuration(["/nowhere", *runs.common_flags(), *flags]))


def test_the_algorithm_of_slowmo_that_rewrites_weights_is_refused():
    flags = [*runs.TRANSLATION, "--optimizer", "sam", "--ddp-backend", "slowmo", "--slowmo-base-algorithm", "sgp"]
    with pytest.raises(ValueError, match=r"--slowmo-base-algorithm sgp .* localsgd"):
        check_config(runs.configuration(["/nowhere", *runs.common_flags(), *flags]))
