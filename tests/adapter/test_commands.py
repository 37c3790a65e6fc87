"""fairseq's own commands, as a user types them: train, hydra-train, generate, eval-lm, validate, resume, the logs."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from fairseq_sam import PRESETS
from tests.adapter import runs

pytestmark = pytest.mark.slow


def fairseq(command, *arguments, cwd=None):
    done = subprocess.run(
        [sys.executable, "-m", f"fairseq_cli.{command}", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def records(output, tag):
    found = (re.search(rf"\| {tag} \| (\{{.*\}})", line) for line in output.splitlines())
    return [json.loads(match.group(1)) for match in found if match]


def flags_of(folder):
    return [
        "--user-dir", runs.PLUGIN, "--cpu", "--num-workers", "0", *runs.TRANSLATION,
        "--optimizer", "ga_sam", "--base-optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--sam-epsilon", "0.9",
        "--sam-norm", "linf", "--sam-steps", "2", "--sam-gradient", "sum", "--sam-start-epoch", "2", "--lr", "0.003",
        "--max-tokens", "400", "--max-epoch", "4", "--save-dir", folder, "--log-format", "json", "--log-interval", "2",
        "--seed", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(translation_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fairseq("train", translation_data, *flags_of(folder))


def test_train_logs_what_the_architecture_promises(trained):
    _, output = trained
    epochs = records(output, "train")
    assert [epoch["train_sam_passes"] for epoch in epochs] == ["1", "3", "3", "3"]
    for key in ("sam_gnorm", "sam_eps", "sam_sharp", "sam_skipped", "sam_capped"):
        assert f"train_{key}" not in epochs[0] and float(epochs[1][f"train_{key}"]) >= 0
    assert float(epochs[1]["train_sam_eps"]) > 0 and float(epochs[1]["train_sam_sharp"]) > 0
    assert "sam_sharp" in records(output, "train_inner")[-1]
    losses = [float(epoch["train_loss"]) for epoch in epochs]
    assert losses[-1] < losses[0]


def test_resume_from_the_command_line(trained, translation_data, tmp_path):
    """A new process continues from the checkpoint under the safe loader, and ends with the weights of the whole run."""
    folder, _ = trained
    shutil.copy(folder / "checkpoint2.pt", tmp_path / "checkpoint_last.pt")
    fairseq("train", translation_data, *flags_of(tmp_path))
    whole, resumed = (torch.load(path / "checkpoint_last.pt") for path in (folder, tmp_path))
    assert runs.same_bits(whole["model"], resumed["model"])
    assert runs.same_state(whole["last_optimizer_state"], resumed["last_optimizer_state"])


def test_generate_with_the_averaged_model(trained, translation_data):
    folder, _ = trained
    script = str(runs.ROOT / "scripts" / "average_checkpoints.py")
    average = folder / "average.pt"
    subprocess.run(
        [sys.executable, script, "--inputs", str(folder), "--num-epoch-checkpoints", "2", "--output", str(average)],
        check=True,
    )
    output = fairseq(
        "generate", translation_data, "--user-dir", runs.PLUGIN, "--path", average, "--beam", 2, "--cpu",
        # fairseq drops a last batch that is no multiple of this (8 by default): six of the 30 sentences.
        "--required-batch-size-multiple", 1,
    )  # fmt: skip
    assert len(re.findall(r"^H-\d+\t", output, re.M)) == 30
    assert "Generate test with beam=2: BLEU4" in output


def test_validate(trained, translation_data):
    folder, _ = trained
    output = fairseq(
        "validate", translation_data, "--user-dir", runs.PLUGIN, "--path", folder / "checkpoint_last.pt", "--cpu",
        "--valid-subset", "valid", "--max-tokens", 400, "--task", "translation",
    )  # fmt: skip
    assert "loss" in output


def test_language_model_train_and_eval_lm(language_model_data, tmp_path):
    fairseq(
        "train", language_model_data, "--user-dir", runs.PLUGIN, "--cpu", "--num-workers", "0", "--task",
        "language_modeling", "--tokens-per-sample", "32", "--arch", "lstm_lm", "--decoder-embed-dim", "16",
        "--decoder-hidden-size", "16", "--decoder-out-embed-dim", "16", "--optimizer", "multistep_defense",
        "--base-optimizer", "sgd", "--momentum", "0.5", "--lr", "1.0", "--clip-norm", "0.25", "--max-tokens", "400",
        "--max-epoch", "2", "--save-dir", tmp_path, "--sam-epsilon", "1e-3",
    )  # fmt: skip
    output = fairseq(
        "eval_lm", language_model_data, "--user-dir", runs.PLUGIN, "--path", tmp_path / "checkpoint_last.pt", "--cpu",
        "--gen-subset", "test", "--max-tokens", 400,
    )  # fmt: skip
    assert re.search(r"Perplexity: \d+", output)


YAML = (
    runs.YAML_RECIPE
    + """\
common: {{user_dir: {plugin}, cpu: true, seed: 1, log_format: json, log_interval: 2}}
optimizer:
  _name: ga_sam
  base_optimizer: {base}
  {own}
  sam_epsilon: 1e-3
  sam_norm: linf
  sam_steps: 2
lr_scheduler: {{_name: fixed}}
dataset: {{max_tokens: 400, num_workers: 0}}
optimization: {{lr: [0.003], max_epoch: 1}}
checkpoint: {{save_dir: {save}}}
distributed_training: {{distributed_world_size: 1}}
"""
)


@pytest.mark.parametrize(
    ("base", "own", "group"),
    [
        ("adam", "adam_betas: '(0.9, 0.98)'", {"betas": (0.9, 0.98)}),
        ("adam", "adam_betas: [0.9, 0.98]", {"betas": (0.9, 0.98)}),
        ("sgd", "momentum: 0.7", {"momentum": 0.7}),
    ],
)
def test_hydra_train_from_yaml(translation_data, tmp_path, base, own, group):
    values = {"plugin": runs.PLUGIN, "data": translation_data, "save": tmp_path / "save", "base": base, "own": own}
    (tmp_path / "translate.yaml").write_text(YAML.format(**values))
    output = fairseq("hydra_train", "--config-dir", tmp_path, "--config-name", "translate", cwd=tmp_path)
    log = output + "".join(path.read_text() for path in tmp_path.rglob("hydra_train.log"))
    assert "train_sam_passes" in log
    state = torch.load(tmp_path / "save" / "checkpoint_last.pt")
    assert state["cfg"]["optimizer"]["_name"] == "ga_sam" and state["cfg"]["optimizer"]["sam_epsilon"] == 1e-3
    found = state["last_optimizer_state"]["param_groups"][0]
    assert all(tuple(found[key]) == value if isinstance(value, tuple) else found[key] == value
               for key, value in group.items())  # fmt: skip


def test_hydra_train_on_the_composite_optimizer(translation_data, tmp_path):
    """Its groups exist in YAML only; they refer to other sections of the configuration."""
    own = """groups:
    default:
      lr_float: 0.001
      optimizer: {_name: adam, adam_betas: [0.9, 0.98], lr: [0.001]}
      lr_scheduler: {_name: fixed, warmup_updates: 0, lr: [0.001]}"""
    values = {
        "plugin": runs.PLUGIN, "data": translation_data, "save": tmp_path / "save", "base": "composite", "own": own,
    }  # fmt: skip
    text = YAML.format(**values).replace("{_name: fixed}\ndataset", "{_name: pass_through}\ndataset")
    (tmp_path / "translate.yaml").write_text(text)
    fairseq("hydra_train", "--config-dir", tmp_path, "--config-name", "translate", cwd=tmp_path)
    state = torch.load(tmp_path / "save" / "checkpoint_last.pt")
    assert state["last_optimizer_state"]["sharpness_aware"]["num_ascents"] > 0


def test_hydra_train_refuses_bad_values_before_data(tmp_path):
    values = {"plugin": runs.PLUGIN, "data": "/nowhere", "save": tmp_path, "base": "adam", "own": "sam_interval: 0"}
    (tmp_path / "translate.yaml").write_text(YAML.format(**values))
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(tmp_path), "--config-name", "translate"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    assert "interval (--sam-interval) must be an integer >= 1, got 0" in done.stderr + done.stdout


def test_help_lists_methods_and_flags_by_axis():
    from fairseq_sam.adapter.flags import FLAGS_BY_AXIS

    shown = fairseq("train", "--user-dir", runs.PLUGIN, "--help")
    assert "--max-tokens" in shown, "fairseq's own flags are still there"
    assert all(re.search(rf"--optimizer {name}\s", shown) for name in PRESETS) and "--base-optimizer" in shown
    rest = shown
    for axis, flags in FLAGS_BY_AXIS.items():
        _, heading, rest = rest.partition(f"sharpness-aware: {axis} ")
        assert heading, f"{axis} comes in its order"
        assert all(re.search(rf"^  --sam-{flag.name.replace('_', '-')} ", rest, re.MULTILINE) for flag in flags)


def test_the_list_of_methods_from_the_command_line():
    done = subprocess.run([sys.executable, "-m", "fairseq_sam"], capture_output=True, text=True, cwd=runs.ROOT)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].split() == ["method", "passes", "copies"]
    assert [line.partition(" ")[0] for line in lines[1:-2]] == list(PRESETS)
    done = subprocess.run([sys.executable, "-m", "fairseq_sam", "sam2"], capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 2 and "ga_sam" in done.stderr and "Traceback" not in done.stderr
