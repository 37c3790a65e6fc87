"""``--sam-epsilon auto``: what the run finds, when, and that nothing else is changed by it."""

import dataclasses
import math
import statistics

import pytest
import torch
from torch import nn

pytest.importorskip("fairseq")

from fairseq.logging import metrics

from fairseq_sam import PRESETS, Method
from fairseq_sam.adapter import radius, train_step
from fairseq_sam.adapter.choices import AUTO
from fairseq_sam.adapter.errors import CheckpointError, ConfigurationError
from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.adapter.radius import search, settings_of
from fairseq_sam.adapter.state import checked_state
from fairseq_sam.core.memory import Memory
from tests.adapter import runs

FLAGS = [*runs.TRANSLATION, "--dropout", "0.1", "--update-freq", "2"]
UPDATES = 2  # in place of 8


@pytest.fixture(autouse=True)
def few_updates(monkeypatch):
    assert radius.UPDATES == 8
    monkeypatch.setattr(radius, "UPDATES", UPDATES)


def state_of(checkpoint):
    return checkpoint["last_optimizer_state"]["sharpness_aware"]


@pytest.mark.parametrize(("preset", "scope"), runs.SCOPED)
def test_as_if_the_user_had_given_what_was_found(translation_data, tmp_path, preset, scope):
    """Plain updates in which it measures; from then on bit for bit the run with that radius."""
    flags = [*FLAGS, "--optimizer", preset, "--sam-scope", scope, "--max-update", "4"]
    if preset == "fisher_sam":
        flags += ["--sam-mask-interval", "100"]
    if preset == "model_perturbation":  # else a step is too short for such a rise
        flags += ["--sam-step-size", "100"]
    if preset == "look_sam":
        flags += ["--sam-interval", "1"]
    found = runs.train(translation_data, tmp_path / "auto", *flags, "--sam-epsilon", AUTO)
    state = state_of(found)["search"]
    assert len(state["radii"]) == UPDATES and all(0 < each < math.inf for each in state["radii"])
    assert state["epsilon"] == pytest.approx(math.exp(statistics.median(map(math.log, state["radii"]))), rel=1e-9)
    if preset == "fisher_sam":
        return  # its mask is collected while it measures: from other batches than those of a later start
    given = runs.train(
        translation_data, tmp_path / "given", *flags, "--sam-epsilon", repr(state["epsilon"]), "--sam-start-update",
        str(UPDATES),
    )  # fmt: skip
    assert runs.same_bits(found["model"], given["model"])
    assert state_of(found)["num_ascents"] == state_of(given)["num_ascents"] > 0


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_is_exact(translation_data, tmp_path, stop):
    flags = [*FLAGS, "--optimizer", "ga_sam", "--sam-epsilon", AUTO, "--sam-rise", "0.3"]
    whole = runs.train(translation_data, tmp_path / "whole", *flags, "--max-update", "4")
    parts = runs.train(translation_data, tmp_path / "parts", *flags, "--max-update", str(stop))
    assert len(state_of(parts)["search"]["radii"]) == min(stop, UPDATES)
    assert (state_of(parts)["search"]["epsilon"] is None) == (stop < UPDATES)
    resumed = runs.train(translation_data, tmp_path / "parts", *flags, "--max-update", "4")
    assert runs.same_bits(whole["model"], resumed["model"])
    assert runs.same_state(whole["last_optimizer_state"], resumed["last_optimizer_state"])


@pytest.mark.parametrize("scope", ["microbatch", "update"])
@pytest.mark.parametrize("rise", ["0.05", "0.5"])
def test_the_loss_rises_as_wanted(translation_data, monkeypatch, scope, rise):
    """The first perturbed step on the batch that was measured raises its loss by the wanted fraction."""
    monkeypatch.setattr(radius, "UPDATES", 1)
    trainer, batches = runs.build_trainer(
        translation_data, *FLAGS, "--dropout", "0", "--lr", "1e-30", "--optimizer", "sam", "--sam-epsilon", AUTO,
        "--sam-rise", rise, "--sam-scope", scope,
    )  # fmt: skip
    with runs.quiet():
        trainer.train_step(batches[:2])
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        with metrics.aggregate(new_root=True) as found:
            trainer.train_step(batches[:2])
    logged = found.get_smoothed_values()
    assert unwrap(trainer.optimizer).method.epsilon == unwrap(trainer.optimizer).memory.epsilon
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-20)
    assert float(logged["sam_sharp"]) / float(logged["loss"]) == pytest.approx(float(rise), rel=0.2)


def test_it_begins_with_the_method(translation_data, tmp_path):
    """Not before the start epoch, nor in the updates that the interval leaves plain."""
    flags = [*FLAGS, "--optimizer", "look_sam", "--sam-interval", "2", "--sam-epsilon", AUTO]
    flags += ["--sam-start-epoch", "2", "--max-update"]
    counts = []
    for number, updates in enumerate(("6", "8", "9")):
        found = state_of(runs.train(translation_data, tmp_path / str(number), *flags, updates))
        counts.append(len(found.get("search", {"radii": []})["radii"]))
    assert counts == [0, 1, 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sam-epsilon", "Auto"], r"--sam-epsilon.*a number >= 0, or auto, got 'Auto'"),
        (["--sam-epsilon", AUTO, "--sam-rise", "0"], "--sam-rise.*finite number > 0, got 0.0"),
        (["--sam-epsilon", AUTO, "--sam-rise", "inf"], "--sam-rise.*finite number > 0, got inf"),
        (["--sam-epsilon", "0.1", "--sam-rise", "0.2"], "--sam-rise.* 0.2 is only used with --sam-epsilon auto"),
        (["--sam-epsilon", AUTO, "--sam-step-size", "0.1"], "--sam-step-size.* 0.1 is a length beside a radius"),
        (["--sam-epsilon", AUTO, "--sam-epsilon-min", "0.1"], "--sam-epsilon-min.* 0.1 is a length beside a radius"),
    ],
)
def test_bad_flags(translation_data, tmp_path, flags, words):
    with pytest.raises(ConfigurationError, match=words):
        runs.train(translation_data, tmp_path, *FLAGS, "--optimizer", "sam", *flags, "--max-update", "1")


def test_a_ball_that_the_radius_of_the_preset_is_a_part_of():
    """GSAM's smallest radius keeps its share; a rate of gradient steps is no length."""
    method = PRESETS["gsam"].with_radius(0.5)
    assert (method.epsilon, method.epsilon_min) == (0.5, pytest.approx(0.1))
    assert PRESETS["sam"].with_radius(0.5).epsilon_min is None


SETTINGS = settings_of(PRESETS["sam"], 0.1)
STEPS = settings_of(PRESETS["model_perturbation"], 0.1)


def test_updates_that_find_nothing(monkeypatch, caplog):
    """Half of them may; where more find no radius the run ends at once and says what to change."""
    monkeypatch.setattr(radius, "UPDATES", 4)
    memory = Memory()
    search(memory, lambda epsilon: (math.nan, 1.0), SETTINGS)
    search(memory, lambda epsilon: (1.0, 1.0), SETTINGS)
    assert len(memory.radii) == 2 and all(map(math.isnan, memory.radii)) and memory.epsilon is None
    for _ in range(2):
        search(memory, lambda epsilon: (1.0, 1.0 + epsilon), SETTINGS)
    assert memory.epsilon == pytest.approx(0.1)
    for settings, words in ((SETTINGS, r"--sam-rise, a later"), (STEPS, r"--sam-rise, a larger --sam-step-size")):
        lost = Memory()
        search(lost, lambda epsilon: (1.0, 1.0 + epsilon), settings)
        with pytest.raises(ConfigurationError, match=rf"from 1e-07 to 100 .* rises by 0.1 .* only 1 of 4 .*{words}"):
            for _ in range(3):
                search(lost, lambda epsilon: (1.0, 1.0), settings)
        assert len(lost.radii) == 4
    early = Memory()
    with pytest.raises(ConfigurationError, match="only 0 of 3"):
        for _ in range(4):
            search(early, lambda epsilon: (1.0, 1.0), SETTINGS)
    assert "the loss rises by 0 of it at 1e-07 and by 0 at 100" in caplog.text


def test_the_median_counts(monkeypatch, caplog):
    """An update whose loss hardly rises does not move the radius, but is told of."""
    monkeypatch.setattr(radius, "UPDATES", 3)
    memory = Memory()
    with caplog.at_level("INFO", logger="fairseq_sam"):
        for slope in (1e-3, 2.0, 1.0):
            search(memory, lambda epsilon, slope=slope: (1.0, 1.0 + slope * epsilon), SETTINGS)
    assert memory.radii == pytest.approx((100.0, 0.05, 0.1)) and memory.epsilon == pytest.approx(0.1)
    assert "raises the loss of the last one's batch by 0.1 of it" in caplog.text
    assert "do not agree, they have found radii from 0.05 to 100" in caplog.text
    caplog.clear()
    for _ in range(3):
        search(Memory(), lambda epsilon: (1.0, 1.0 + epsilon), SETTINGS)
    assert "agree" not in caplog.text


@pytest.mark.parametrize("slope", [1.0, 1e-3, 1e3, 1e5])
def test_later_updates_begin_near_earlier_ones(monkeypatch, slope):
    """With fewer probes, and with the same result wherever that is."""
    monkeypatch.setattr(radius, "UPDATES", 9)
    memory = Memory()
    first = search(memory, lambda epsilon: (1.0, 1.0 + epsilon), SETTINGS)
    second = search(memory, lambda epsilon: (1.0, 1.0 + epsilon), SETTINGS)
    third = search(memory, lambda epsilon: (1.0, 1.0 + slope * epsilon), SETTINGS)
    assert second < first and third < 2 * first
    assert memory.radii == pytest.approx((0.1, 0.1, 0.1 / slope), rel=0.05)


def test_what_the_radius_depends_on():
    """Every axis of a method is among them, or has no part in the perturbation or its radius."""
    apart = {
        "name", "epsilon", "epsilon_min", "lr_max", "lr_min", "start_epoch", "start_update", "end_epoch", "end_update",
        "interval", "between", "look_alpha", "gsam_alpha", "esam_gamma", "mask_interval", "fisher_samples",
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(Method)}
    assert set(radius.AXES) | apart == fields and not set(radius.AXES) & apart


@pytest.mark.parametrize(
    ("flags", "anew"),
    [
        ([], False),
        (["--sam-interval", "2"], False),
        (["--sam-norm", "l2"], True),
        (["--sam-rise", "0.2"], True),
        (["--sam-steps", "3"], True),
        (["--sam-scope", "update"], True),
    ],
)
def test_resumed_with_other_flags(translation_data, tmp_path, caplog, flags, anew):
    """A radius that was found for another ball is not used."""
    own = [*FLAGS, "--optimizer", "ga_sam", "--sam-norm", "linf", "--sam-epsilon", AUTO]
    found = runs.train(translation_data, tmp_path, *own, "--max-update", "2")
    trainer, _ = runs.build_trainer(translation_data, *own, *flags)
    unwrap(trainer.optimizer).load_state_dict(found["last_optimizer_state"])
    assert unwrap(trainer.optimizer).searches_radius == anew
    assert ("searched for anew" in caplog.text) == anew
    if flags:
        assert not anew or f"{flags[0]} " in caplog.text


def test_the_passes_of_the_search_are_counted(translation_data, monkeypatch):
    """Each probe is a pass at the weights, then those of a step."""
    probes = []

    def counting(probe_of):
        def made(*args):
            probe = probe_of(*args)
            return lambda epsilon: probes.append(epsilon) or probe(epsilon)

        return made

    monkeypatch.setattr(train_step, "probe_of", counting(train_step.probe_of))
    trainer, batches = runs.build_trainer(
        translation_data, *FLAGS, "--optimizer", "ga_sam", "--sam-epsilon", AUTO, "--sam-steps", "2"
    )
    with runs.quiet(), metrics.aggregate(new_root=True) as logged:
        trainer.train_step(batches[:2])
    assert logged.get_smoothed_values()["sam_passes"] == 1 + 4 * len(probes) > 20


def test_a_method_that_ends_before_it_has_a_radius(translation_data, tmp_path, monkeypatch, caplog):
    flags = [*FLAGS, "--optimizer", "sam", "--sam-epsilon", AUTO, "--max-update", "4"]
    with pytest.raises(ConfigurationError, match=r"--sam-end-update\) 8 leaves no .* at least 9, or give a number"):
        runs.train(translation_data, tmp_path / "a", *flags, "--sam-end-update", "8")
    with pytest.raises(ConfigurationError, match=r"--sam-end-update\) 20 leaves no .* at least 29"):
        runs.train(
            translation_data, tmp_path / "a", *flags, "--sam-end-update", "20", "--sam-start-update", "4",
            "--sam-interval", "3",
        )  # fmt: skip
    monkeypatch.setattr(radius, "UPDATES", 8)
    found = runs.train(translation_data, tmp_path / "b", *flags[:-1], "8", "--sam-end-epoch", "1")
    assert caplog.text.count("came before the radius was found") == 1
    assert 0 < len(state_of(found)["search"]["radii"]) < 8 and state_of(found)["num_ascents"] == 0


@pytest.mark.parametrize(
    "search",
    [
        {"radii": "many"},
        {"radii": [0.1, -1.0]},
        {"radii": [], "epsilon": "x"},
        [0.1],
        {"searched_with": [1]},
        {"searched_with": {"norm": [2]}},
    ],
)
def test_damaged_states(search):
    with pytest.raises(CheckpointError, match=r"search|radii of its search|searched for with"):
        checked_state({"search": search})


def test_another_kind_of_run_goes_on(translation_data, tmp_path):
    """From a checkpoint of a fixed radius it measures anew; a given radius counts more than one that was found."""
    flags = [*FLAGS, "--optimizer", "sam", "--max-update"]
    runs.train(translation_data, tmp_path, *flags, "2", "--sam-epsilon", "0.1")
    found = runs.train(translation_data, tmp_path, *flags, "5", "--sam-epsilon", AUTO)
    assert len(state_of(found)["search"]["radii"]) == UPDATES
    trainer, _ = runs.build_trainer(translation_data, *FLAGS, "--optimizer", "sam", "--sam-epsilon", "0.25")
    unwrap(trainer.optimizer).load_state_dict(found["last_optimizer_state"])
    assert unwrap(trainer.optimizer).method.epsilon == 0.25 and not unwrap(trainer.optimizer).searches_radius


def test_what_is_measured_leaves_no_trace(translation_data, tmp_path):
    """The updates that it measures in are those of the base optimizer, with its random numbers, bit for bit."""
    flags = [*FLAGS, "--max-update", "2"]
    for preset in ("sam", "delta_sam", "freelb", "esam", "look_sam"):
        found = runs.train(translation_data, tmp_path / preset, *flags, "--optimizer", preset, "--sam-epsilon", AUTO)
        plain = runs.train(
            translation_data, tmp_path / f"plain_{preset}", *flags, "--optimizer", preset, "--sam-epsilon", "0"
        )
        assert runs.same_bits(found["model"], plain["model"]), preset
        assert state_of(found)["num_ascents"] == 0


def test_modules_that_count_their_calls(translation_data):
    """Buffers after an update that measures are those after a plain one."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, *args):
            self.count += 1

    trainer, batches = runs.build_trainer(translation_data, *FLAGS, "--optimizer", "sam", "--sam-epsilon", AUTO)
    encoder = trainer.get_model().encoder
    encoder.counting = Counting()
    encoder.register_forward_hook(lambda module, inputs, output: module.counting())
    with runs.quiet():
        trainer.train_step(batches[:2])
    assert encoder.counting.count == 2 and len(unwrap(trainer.optimizer).memory.radii) == 1
