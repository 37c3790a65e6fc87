"""Recipes run: data prepared once, methods × seeds trained, scored, recorded; again from where it stopped."""

import shlex
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

pytest.importorskip("fairseq", reason="recipes run fairseq's commands")

from scripts.recipes import obtained, runner
from scripts.recipes.jobs import LOG, SCORES, SETTINGS, Job, data_folder, log_lines, progress_of, training_summary
from scripts.recipes.obtained import read_rows
from scripts.recipes.recipe import EXAMPLES, ROOT, Metric, read_recipe
from scripts.recipes.runner import RunError, run_table
from tests import in_process
from tests.adapter import runs
from tests.recipes import corpora

SMALL = {
    "ga_sam_table1_imdb": "{num_words: 60, num_train: 40, num_valid: 16, num_test: 20}",
    "ga_sam_table1_ptb": "{num_lines: 40}",
    "ga_sam_table1_envi": "{num_train: 100}",
}
SIZES = {
    "ga_sam_table1_imdb": "{embed-dim: 8, num-filters: 4, max-epoch: 2, batch-size: 10}",
    "ga_sam_table1_ptb": (
        "{decoder-embed-dim: 8, decoder-hidden-size: 8, decoder-out-embed-dim: 8, max-epoch: 2, tokens-per-sample: 16}"
    ),
    "ga_sam_table1_envi": (
        "{encoder-layers: 1, decoder-layers: 1, encoder-embed-dim: 8, decoder-embed-dim: 8, encoder-ffn-embed-dim: 8, "
        "decoder-ffn-embed-dim: 8, encoder-attention-heads: 2, decoder-attention-heads: 2, max-tokens: 300, "
        "max-epoch: 4, keep-last-epochs: 2}, evaluation: {average: 2}"
    ),
}


def small(tmp_path, name, methods):
    """The recipe with little data and a small model, and the folder of generated corpora."""
    data = tmp_path / "corpora"
    corpora.write_imdb(data)
    corpora.write_ptb(data)
    corpora.write_envi(data)
    folder = tmp_path / f"small_{name}"
    folder.mkdir()
    rows = "\n".join(f"  {method}: {flags}" for method, flags in methods.items())
    (folder / "recipe.yaml").write_text(
        f"extends: {EXAMPLES / name}\nseeds: [1, 2]\nmethods:\n{rows}\n"
        f"sizes: {{mini: {{options: {SMALL[name]}, flags: {SIZES[name]}}}}}\n"
    )
    return read_recipe(folder, "mini"), data


IMDB = {
    "Baseline": "{optimizer: adam}",
    "GA-SAM": "{optimizer: ga_sam, base-optimizer: adam, sam-norm: linf, sam-epsilon: 1e-3, sam-steps: 2}",
}


@pytest.mark.slow
def test_a_table_from_data_to_rows(tmp_path, capsys, monkeypatch, in_this_process):
    recipe, data = small(tmp_path, "ga_sam_table1_imdb", IMDB)
    out = tmp_path / "out"
    run_table([recipe], data=data, out=out, cpu=True, num_jobs=2)
    table = out / recipe.name / "mini" / "obtained.tsv"
    rows = read_rows(table)
    assert [(row["method"], row["seed"]) for row in rows if row["method"] == "GA-SAM"] == [
        ("GA-SAM", "1"),
        ("GA-SAM", "2"),
    ]
    assert len(rows) == 4 and {row["metric"] for row in rows} == {"accuracy"}
    for row in rows:
        assert 0 <= float(row["value"]) <= 100 and 0 <= float(row["valid"]) <= 100
        assert (row["updates"], row["epochs"]) == ("8", "2")
        assert row["passes"] == ("3.000" if row["method"] == "GA-SAM" else "1.000")
        assert "torch" in row["versions"] and row["hardware"].startswith("CPU")
    assert rows[0]["flags"] == "" and "--sam-epsilon 1e-3" in next(r["flags"] for r in rows if r["method"] == "GA-SAM")
    assert "4 runs, 0 of them done" in capsys.readouterr().out

    content = table.read_text()
    monkeypatch.setattr(runner, "subprocess", None)  # nothing is run again
    run_table([recipe], data=data, out=out, cpu=True)
    assert table.read_text() == content and "4 runs, 4 of them done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_a_failed_one_is_named(tmp_path, in_this_process):
    runner.subprocess.Popen = subprocess.Popen  # at first in processes of their own
    methods = {"Baseline": "{optimizer: adam}", "Wrong": "{optimizer: sam, sam-norm: l0}"}
    recipe, data = small(tmp_path, "ga_sam_table1_imdb", methods)
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"(?s)1 of 2 .*Wrong, seed 1: status 2: .*\(--sam-norm\) must be l2"):
        run_table([recipe], data=data, out=out, cpu=True, seeds=[1])
    job = Job(recipe, "Baseline", 1, out, cpu=True)
    whole = training_summary(job.run)
    assert job.scores is not None and whole["updates"] == 8
    again = Job(recipe, "Baseline", 2, out, cpu=True)
    again.write_settings()
    in_process.run([*again.training(), "--max-epoch", "1"], check=True)
    runner.subprocess.Popen = in_process.Process
    first = (again.run / LOG).read_text()
    share, text = progress_of(again.run, again.flags)
    assert share == 0.5 and text.startswith("epoch 1/2, loss ")
    run_table([recipe], data=data, out=out, cpu=True, methods=["Baseline"], seeds=[2])
    assert (again.run / LOG).read_text().startswith(first), "the log goes on"
    assert [line["epoch"] for line in log_lines(again.run) if "train_loss" in line] == [1, 2], "no epoch runs twice"
    assert training_summary(again.run)["updates"] == 8


@pytest.mark.slow
def test_perplexity(tmp_path, in_this_process):
    recipe, data = small(tmp_path, "ga_sam_table1_ptb", {"Baseline": "{optimizer: sgd}"})
    run_table([recipe], data=data, out=tmp_path / "out", cpu=True, seeds=[1])
    (row,) = read_rows(tmp_path / "out" / recipe.name / "mini" / "obtained.tsv")
    assert row["metric"] == "perplexity" and 1 < float(row["value"]) < 100
    assert (data_folder(recipe, tmp_path / "out") / "data-bin" / "dict.txt").exists()


@pytest.mark.slow
def test_a_shared_beginning_changes_nothing(tmp_path, in_this_process):
    """The epochs before the start epoch run once; the end is that of a run from its own beginning, bit for bit."""
    method = "{optimizer: ga_sam, base-optimizer: adam, sam-epsilon: 1e-3, sam-start-epoch: 3}"
    recipe, data = small(tmp_path, "ga_sam_table1_envi", {"Baseline": "{optimizer: adam}", "GA-SAM": method})
    out = tmp_path / "out"
    run_table([recipe], data=data, out=out, cpu=True, num_jobs=2, seeds=[1])
    rows = {row["method"]: row for row in read_rows(out / recipe.name / "mini" / "obtained.tsv")}
    assert {row["metric"] for row in rows.values()} == {"bleu"} and rows["GA-SAM"]["p_value"]
    assert {row["epochs"] for row in rows.values()} == {"4"} and rows["Baseline"]["passes"] == "1.000"
    assert rows["GA-SAM"]["passes"] == "1.500"  # two in the last half of the epochs
    for name in recipe.methods:
        job = Job(recipe, name, 1, out, cpu=True)
        if name == "GA-SAM":
            assert job.start.until == 2
            assert sorted(path.name for path in job.start.run.glob("*.json")) == [SCORES, SETTINGS]
        alone = ["--save-dir", str(tmp_path / name), "--log-file", str(tmp_path / f"{name}.log")]
        in_process.run([*job.training(), *alone], check=True)
        found, expected = (runs.load(path / "checkpoint4.pt")["model"] for path in (job.run, tmp_path / name))
        assert runs.same_bits(found, expected), name


class FakeProcess:
    """Stands in for a command: writes down on which device it runs, then what the evaluation would write."""

    seen: ClassVar[list] = []
    running: ClassVar[list] = []

    def __init__(self, command, env, **_):
        self._device = env.get("CUDA_VISIBLE_DEVICES")
        assert self._device not in self.running, "one job on a device at a time"
        self.seen.append((command[2], self._device, "--cpu" in command, env["OMP_NUM_THREADS"]))
        self.running.append(self._device)
        if command[2].endswith("evaluations"):
            Path(command[3], SCORES).write_text('{"accuracy": 50.0, "f1": 60.0, "valid_f1": 70.0, "valid": 80.0}')

    def wait(self):
        time.sleep(0.05)
        self.running.remove(self._device)
        return 0


@pytest.fixture
def fake_commands(tmp_path, monkeypatch):
    """Nothing is prepared, trained and scored, on two GPUs."""

    def begin(recipe):
        done = data_folder(recipe, tmp_path / "out") / "done"
        done.parent.mkdir(parents=True)
        done.touch()

    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(obtained, "hardware", lambda cpu: "a GPU")
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=FakeProcess))
    FakeProcess.seen.clear()
    return begin


def test_jobs_take_turns_on_the_gpus(tmp_path, fake_commands):
    recipe, data = small(tmp_path, "ga_sam_table1_imdb", IMDB)
    fake_commands(recipe)
    run_table([recipe], data=data, out=tmp_path / "out")
    assert len(FakeProcess.seen) == 8 and {device for _, device, _, _ in FakeProcess.seen} == {"0", "1"}
    assert not any(cpu for _, _, cpu, _ in FakeProcess.seen)
    rows = read_rows(tmp_path / "out" / recipe.name / "mini" / "obtained.tsv")
    assert [row["value"] for row in rows] == ["50"] * 4 and {row["hardware"] for row in rows} == {"a GPU"}


def test_changed_options_are_not_the_recipe_s_size(tmp_path, fake_commands, capsys):
    """Their rows are labelled with them, and are not recorded in the recipe's folder."""
    recipe, data = small(tmp_path, "ga_sam_table1_imdb", IMDB)
    other = read_recipe(recipe.folder, "mini", changed={"num_train": "30", "num_words": "60"})
    assert recipe.label == "mini" and other.label == "mini, num_train=30, num_words=60"
    for each in (recipe, other):
        fake_commands(each)
        run_table([each], data=data, out=tmp_path / "out", seeds=[1])
    rows = read_rows(tmp_path / "out" / recipe.name / "mini" / "obtained.tsv")
    assert [row["size"] for row in rows] == 2 * [recipe.label] + 2 * [other.label]
    with pytest.raises(RunError, match="--record writes down the recipe's own runs; leave it out, or --set num_train"):
        run_table([other], data=data, out=tmp_path / "out", seeds=[1], record=True)
    glue = EXAMPLES / "delta_sam_table1_bert_base"
    assert read_recipe(glue, "paper", "RTE", {"encoder": "bert"}).label == "paper"  # the recipe has none of its own


def test_corpora_are_looked_for_first(tmp_path, capsys):
    """Before anything is prepared, or a model trained that the preparation needs; not for what is prepared."""
    recipe = read_recipe("fsam_table2_conll", "mini")
    assert recipe.needs and recipe.corpora == [["jfleg"]]
    with pytest.raises(RunError, match=f"--data {tmp_path}/none has no folder jfleg, which fsam_table2_conll needs"):
        run_table([recipe], data=tmp_path / "none", out=tmp_path / "out", cpu=True)
    assert not (tmp_path / "out").exists() and not capsys.readouterr().out
    german = read_recipe("ga_sam_table1_deen", "mini")
    with pytest.raises(RunError, match="no folder iwslt14_deen or iwslt14_deen_partial"):
        run_table([german], data=tmp_path / "none", out=tmp_path / "out", cpu=True)
    task = read_recipe("delta_sam_table1_bert_base", "mini", "CoLA")
    assert task.corpora == [["glue/CoLA", "superglue/CoLA"]]


def test_minutes_are_a_metric(tmp_path, fake_commands, monkeypatch):
    recipe, data = small(tmp_path, "ga_sam_table1_imdb", IMDB)
    fake_commands(recipe)
    monkeypatch.setattr(obtained, "training_summary", lambda run: {**training_summary(run), "seconds": 90.0})
    run_table([replace(recipe, metric=Metric("minutes", "lower"))], data=data, out=tmp_path / "out", seeds=[1])
    rows = read_rows(tmp_path / "out" / recipe.name / "mini" / "obtained.tsv")
    assert {(row["metric"], row["value"]) for row in rows} == {("minutes", "1.5")}


def test_rows_with_the_same_settings_are_one_run(tmp_path, fake_commands, capsys):
    """Columns that differ by the metric, and a method under two names."""
    methods = {**IMDB, "The same": IMDB["GA-SAM"]}
    recipe, data = small(tmp_path, "ga_sam_table1_imdb", methods)
    columns = [replace(recipe, column=name, metric=Metric(name)) for name in ("accuracy", "f1")]
    fake_commands(recipe)
    run_table(columns, data=data, out=tmp_path / "out", seeds=[1])
    commands = [command for command, *_ in FakeProcess.seen]
    assert sorted(commands) == sorted(2 * ["fairseq_cli.train", "scripts.recipes.evaluations"])
    output = capsys.readouterr().out
    assert "2 runs, 0 of them done" in output and "Baseline, seed 1: accuracy 50, f1 60" in output
    table = tmp_path / "out" / recipe.name / "mini" / "obtained.tsv"
    rows = [(row["column"], row["metric"], row["method"], row["value"], row["valid"]) for row in read_rows(table)]
    assert rows == [
        (name, name, method, value, valid)
        for name, value, valid in (("accuracy", "50", "80"), ("f1", "60", "70"))
        for method in methods
    ]
    content = table.read_text()
    run_table(columns, data=data, out=tmp_path / "out", seeds=[1])
    assert len(FakeProcess.seen) == 4 and table.read_text() == content
    assert "2 runs, 2 of them done" in capsys.readouterr().out
    run_table(columns, data=data, out=tmp_path / "other", seeds=[1], dry_run=True)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 2  # a preparation, two trainings and evaluations
    with pytest.raises(ValueError, match="has no score 'bleu'; it has accuracy, f1"):
        other = replace(recipe, metric=Metric("bleu"))
        run_table([other], data=data, out=tmp_path / "out", seeds=[1])


MODEL_RECIPE = f"""
extends: {EXAMPLES / "bart_small"}
methods: {{Adam: {{optimizer: adam}}, Other: {{optimizer: sgd}}}}
"""
TABLE_RECIPE = f"""
extends: {EXAMPLES / "delta_sam_table3_cnndm"}
methods: {{BART: {{optimizer: adam}}}}
sizes: {{mini: {{needs: {{model: ../tiny_bart}}, seeds: [3]}}}}
"""


def test_a_needed_model_is_trained_first(tmp_path, capsys, monkeypatch):
    """Its baseline with one seed; the folder that its evaluation makes is named to the preparation."""
    for name, text in (("tiny_bart", MODEL_RECIPE), ("table", TABLE_RECIPE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(text)
    recipes = [read_recipe(tmp_path / "table", "mini", column) for column in ("RG-1", "RG-L")]
    for name in ("aeslc", "imdb"):
        (tmp_path / "corpora" / name).mkdir(parents=True)
    run = partial(run_table, recipes, data=tmp_path / "corpora", out=tmp_path / "out", cpu=True)
    run(dry_run=True)
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    called = []

    class Process(FakeProcess):
        def __init__(self, command, **settings):
            called.append(command)
            super().__init__(command, **settings)
            if command[2].endswith("evaluations"):
                Path(command[3], SCORES).write_text('{"loss": 5.0, "rouge1": 30.0, "rougeLsum": 20.0}')

    def prepare(command, cwd):
        called.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=Process, run=prepare))
    run()
    assert called == printed, "a dry run prints what is run, in its order"
    steps = ["prepare.py" if "prepare.py" in command[1] else command[2] for command in called]
    assert steps == ["prepare.py", "fairseq_cli.train", "scripts.recipes.evaluations"] * 2
    pretrained = called[2][3]
    assert called[3][called[3].index("--model") + 1] == f"{pretrained}/model" and pretrained.endswith("-adam/seed1")
    rows = read_rows(tmp_path / "out" / "table" / "mini" / "obtained.tsv")
    found = [(row["column"], row["metric"], row["value"], row["seed"]) for row in rows]
    assert found == [("RG-1", "rouge1", "30", "3"), ("RG-L", "rougeLsum", "20", "3")]
    run()
    assert called == printed, "nothing is run again"


def test_missing_corpus_and_unknown_method(tmp_path):
    recipe, _ = small(tmp_path, "ga_sam_table1_imdb", IMDB)
    with pytest.raises(RunError, match="--methods must be among Baseline, GA-SAM, got 'SAM'"):
        run_table([recipe], data=tmp_path, out=tmp_path / "out", methods=["SAM"], cpu=True)
    command = [sys.executable, ROOT / "scripts/run_table.py", recipe.folder, "--data", tmp_path / "none"]
    done = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1 and "none has no folder imdb, which small_ga_sam_table1_imdb needs" in done.stderr


def test_a_dry_run_prints_commands(tmp_path, capsys):
    recipe, data = small(tmp_path, "ga_sam_table1_imdb", IMDB)
    run_table([recipe], data=data, out=tmp_path / "out", cpu=True, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 4 and "prepare.py" in lines[0] and not (tmp_path / "out").exists()
    assert sum("--optimizer ga_sam" in line for line in lines) == 2
