"""Every preset through fairseq-train on a translation and on sentence-prediction tasks: it trains, logs, validates."""

import math

import pytest
from fairseq.logging import progress_bar
from fairseq_cli import train as fairseq_train

from fairseq_sam import PRESETS, Method
from tests.adapter import runs
from tests.adapter.test_tasks import RECIPES, data_of  # noqa: F401

TASKS = {
    "translation": ("translation", runs.TRANSLATION),
    "classification": RECIPES["sentence_prediction"],
    "regression": RECIPES["sentence_prediction_regression"],
}
FEW = {"fisher_samples": 30}
# Where the defaults need a whole run to show: schedules and intervals of a run of a dozen updates.
SETTINGS = {
    "fisher_sam": {**FEW, "mask_interval": 3},
    "gsam": {"scope": "update"},
    "look_sam": {"interval": 3},
    "esam": {"scope": "update"},
}
COMPOSED = {
    "F_ESAM": ("esam", {"mask": "fisher", **FEW}),
    "F_GSAM": ("gsam", {"mask": "fisher", **FEW}),
    "masked quarter-batch GA-SAM": ("ga_sam", {"mask": "fisher", **FEW, "ascent_fraction": 0.25}),
    "masked delta-SAM": ("delta_sam", {"mask": "fisher", **FEW}),
}


@pytest.fixture
def train(data_of, tmp_path, monkeypatch):  # noqa: F811
    """Runs fairseq-train for four epochs; returns its last checkpoint and what it would print after each epoch."""

    def run(task, preset, options):
        kind, recipe = TASKS[task]
        printed = {"train": [], "valid": []}
        monkeypatch.setattr(
            progress_bar.NoopProgressBar,
            "print",
            lambda bar, stats, tag=None, step=None: printed[tag].append(dict(stats)),
        )
        common = [flag for flag in runs.common_flags() if flag != "--disable-validation"]
        given = [text for axis, value in options.items() for text in (f"--sam-{axis.replace('_', '-')}", str(value))]
        flags = [
            str(data_of[kind]), *common, "--save-dir", str(tmp_path), *recipe, "--lr-scheduler", "inverse_sqrt",
            "--warmup-updates", "2", "--max-epoch", "4", "--lr", "0.01", "--update-freq", "2", "--clip-norm", "5.0",
            "--optimizer", preset, *given, "--valid-subset", "valid",
        ]  # fmt: skip
        with runs.quiet():
            fairseq_train.main(runs.configuration(flags))
        return runs.load(tmp_path / "checkpoint_last.pt"), printed["train"], printed["valid"]

    return run


def check(run, preset, options):
    state, train, valid = run
    method = Method.from_preset(preset, **options)
    assert state["optimizer_history"][-1]["num_updates"] >= 12 and len(train) == len(valid) == 4
    assert state["last_optimizer_state"]["sharpness_aware"]["num_skipped"] == 0
    assert all(math.isfinite(float(log["loss"])) for log in (*train, *valid))
    assert float(train[-1]["loss"]) < float(train[0]["loss"]), "it learns"
    assert all(float(log["sam_eps"]) > 0 for log in train)
    expected = 1 + (method.passes - 1) / method.interval
    if method.mask == "fisher":  # an epoch's share of the instances that the mask was made from
        assert float(train[0]["sam_passes"]) > expected
        expected = max(expected, float(train[-1]["sam_passes"]))
        assert expected < 1 + method.passes
    assert float(train[-1]["sam_passes"]) == pytest.approx(expected, abs=0.25 if method.interval > 1 else 0.1)
    if method.forwards:
        assert float(train[-1]["sam_forwards"]) == pytest.approx(method.forwards)
    else:
        assert "sam_forwards" not in train[-1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset(train, task, preset):
    options = SETTINGS.get(preset, {})
    check(train(task, preset, options), preset, options)


@pytest.mark.parametrize("task", ["translation", "classification"])
@pytest.mark.parametrize("name", COMPOSED)
def test_composed(train, task, name):
    preset, options = COMPOSED[name]
    check(train(task, preset, options), preset, options)
