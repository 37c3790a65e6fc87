"""What jobs share: prepared data, GPUs, files that several processes write."""

import json
import math
import re
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.recipes import runner
from scripts.recipes.jobs import Job, data_folder
from scripts.recipes.locks import locked
from scripts.recipes.recipe import RecipeError, read_recipe
from scripts.recipes.runner import RunError, run_table, visible_device
from scripts.recipes.significance import paired_t_test
from scripts.run_table import changed_options
from tests import in_process

ROOT = Path(__file__).resolve().parents[2]
PREPARE = """
import argparse, pathlib
parser = argparse.ArgumentParser()
for name in ("--data", "--out", "--words"):
    parser.add_argument(name)
args = parser.parse_args()
(pathlib.Path(args.out) / "seen").write_text(f"{args.data} {args.words}")
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "prepare.py").write_text(PREPARE)
    whole = read_recipe("ga_sam_table1_imdb", "mini")
    return replace(whole, prepare=tmp_path / "prepare.py", options={"words": "few"}, corpora=())


def test_prepared_data_stay_with_their_corpora(recipe, tmp_path, monkeypatch):
    first, second = (tmp_path / name for name in ("first", "second"))
    monkeypatch.setattr(runner._Runs, "run", lambda self: None)
    for _ in range(2):
        run_table([recipe], data=first, out=tmp_path / "out", seeds=[1])
    folder = data_folder(recipe, tmp_path / "out")
    assert (folder / "seen").read_text() == f"{first} few"
    with pytest.raises(RunError, match=f"was prepared from --data {first}, now it is {second}; remove"):
        run_table([recipe], data=second, out=tmp_path / "out", seeds=[1])
    (folder / "done").write_text("")  # of an older version, which did not say
    run_table([recipe], data=second, out=tmp_path / "out", seeds=[1])


def test_paths_are_those_of_the_user_s_folder(recipe, tmp_path, monkeypatch):
    (tmp_path / "here" / "corpora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(runner._Runs, "run", lambda self: None)
    run_table([recipe], data=Path("corpora"), out=Path("out"), seeds=[1])
    seen = data_folder(recipe, tmp_path / "here" / "out") / "seen"
    assert seen.read_text() == f"{tmp_path / 'here' / 'corpora'} few"


def test_options_from_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "bert").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["encoder=bert", "other=nothing/there", "package=package:bert", "text=a=b", "empty="]
    assert changed_options(words) == {
        "encoder": str(tmp_path / "bert"),
        "other": "nothing/there",
        "package": "package:bert",
        "text": "a=b",
        "empty": "",
    }
    for word in ("encoder", "=bert"):
        with pytest.raises(RecipeError, match=f"--set takes NAME=VALUE, got '{word}'"):
            changed_options([word])
    tasks = read_recipe("fsam_figure3", "mini", changed={"transfer": "CoLA,MRPC"}).options["transfer"]
    assert tasks == ["CoLA", "MRPC"]


@pytest.mark.parametrize(
    ("own", "expected"), [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])]
)
def test_jobs_take_the_gpus_that_the_user_left_them(monkeypatch, own, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if own is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    assert [visible_device(0), visible_device(1)] == expected


def test_a_shared_beginning_is_for_methods_that_start_late(tmp_path):
    recipe = read_recipe("ga_sam_table5_envi", "mini")
    early = {flag: value for flag, value in recipe.methods["SAM"].items() if flag != "sam-start-epoch"}
    recipe = replace(recipe, methods={**recipe.methods, "early SAM": early})
    starts = {method: Job(recipe, method, 1, tmp_path).start for method in recipe.methods}
    assert starts["GA-SAM"].until == 8 and starts["GA-SAM"].method == "Baseline"
    assert starts["Baseline"] is None and starts["early SAM"] is None


def test_measures_are_made_of_the_runs_of_another_table(tmp_path):
    """One run for both; once it is scored, only the measure is left, and what it found is among its scores."""
    plain, measured = (
        Job(read_recipe(name, "mini"), "GA-SAM", 1, tmp_path) for name in ("ga_sam_table5_envi", "ga_sam_table4_envi")
    )
    assert measured.key == plain.key and len(measured.commands()) == len(plain.commands()) + 1
    plain.write_settings()
    (plain.run / "scores.json").write_text('{"bleu": 20.0}')
    assert plain.scores == {"bleu": 20.0} and plain.commands() == [] and measured.scores is None
    (command,) = measured.commands()
    assert command[2:5] == ["scripts.recipes.measures", str(plain.run), "robustness"]
    assert json.loads(command[5]) == measured.recipe.measures["robustness"]
    Path(command[6]).write_text('{"bleu l2 0.05": 19.0}')
    assert measured.scores == {"bleu": 20.0, "bleu l2 0.05": 19.0} and measured.commands() == []
    assert plain.scores == {"bleu": 20.0}


def test_one_process_at_a_time(tmp_path):
    order = []

    def second():
        with locked(tmp_path / "folder" / "lock"):
            order.append("second")

    with locked(tmp_path / "folder" / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    with pytest.raises(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    with locked(tmp_path / "lock"):
        pass


def test_a_run_that_another_process_has_just_done_is_not_done_again(recipe, tmp_path, monkeypatch):
    job = Job(recipe, "Baseline", 1, tmp_path, cpu=True)
    commands = []
    monkeypatch.setattr(runner._Runs, "_call", lambda self, job, command, *others: commands.append(command))
    runs = runner._Runs([job], 1, 0, [])
    with locked(job.run / "run.lock"):
        thread = threading.Thread(target=runs._run_job, args=[job])
        thread.start()
        time.sleep(0.2)
        assert not commands
        (job.run / "scores.json").write_text('{"accuracy": 80.0}')
    thread.join(10)
    assert not commands and job.scores == {"accuracy": 80.0}


def test_a_child_that_outlives_its_parent_keeps_the_lock(tmp_path):
    """What kill -9 leaves: the next process waits for the training that goes on, and does not start a second one."""
    lock = tmp_path / "lock"
    parent = textwrap.dedent(f"""
        import os, pathlib, signal, subprocess, sys
        from scripts.recipes.locks import locked
        with locked(pathlib.Path({str(lock)!r})) as descriptor:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=(descriptor,))
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT)
    begin = time.monotonic()
    with locked(lock):
        waited = time.monotonic() - begin
    assert done.returncode == -9 and waited > 0.5


def test_a_term_signal_stops_the_runs(tmp_path):
    """The command ends with its training, and says how to go on."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "prepare.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    (slow / "recipe.yaml").write_text(
        f"extends: {ROOT / 'examples' / 'ga_sam_table1_imdb'}\nprepare: prepare.py\noptions: {{}}\n"
    )
    command = [sys.executable, ROOT / "scripts" / "run_table.py", slow, "--data", tmp_path, "--out", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "here" not in process.stdout.readline():
            assert process.poll() is None
        process.terminate()
        _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "the same command goes on from here" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs must be an integer >= 1, got 0"),
        (["--out", "file"], "--out must be a folder, got file, which is a file"),
        (["--set", "num_train"], "--set takes NAME=VALUE, got 'num_train'"),
        (["--set", "words=1"], r"has no option 'words' \(--set\); it has length, num_test, num_train"),
        (["--columns", "MRPC"], "--columns must be left out, the table has one column, got 'MRPC'"),
        (["--methods", "SGD"], "--methods must be among Baseline, SAM"),
    ],
)
def test_bad_command_lines(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = in_process.run([sys.executable, ROOT / "scripts" / "run_table.py", "ga_sam_table1_imdb", *words])
    assert done.returncode == 1 and re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize("text", ["", "title: [", "- a\n- b\n"])
def test_a_recipe_that_is_none(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe.yaml (is no YAML|must hold keys and values)"):
        read_recipe(tmp_path, "mini")


def test_what_a_failed_command_said(tmp_path):
    (tmp_path / "output.log").write_text("INFO: loading\nValueError: no such word\nINFO: | done\n")
    assert runner.last_words(tmp_path / "output.log") == "ValueError: no such word"
    (tmp_path / "output.log").write_text("killed\n")
    assert runner.last_words(tmp_path / "output.log") == "killed"


def test_a_run_without_its_score_fails_alone(recipe, tmp_path, monkeypatch):
    def fake(self, job, command, *others):
        (job.run / "scores.json").write_text("{}" if job.method == "SAM" else '{"accuracy": 80.0}')

    monkeypatch.setattr(runner._Runs, "_call", fake)
    with pytest.raises(RunError, match=r"(?s)1 of 2 runs failed.*SAM, seed 1: .* has no score 'accuracy'"):
        run_table([recipe], data=tmp_path, out=tmp_path / "out", methods=["Baseline", "SAM"], seeds=[1], cpu=True)
    assert Job(recipe, "Baseline", 1, tmp_path / "out", cpu=True).scores == {"accuracy": 80.0}


def test_equal_differences_say_nothing_of_chance():
    assert math.isnan(paired_t_test([81.0, 82.0], [80.0, 81.0]))
    assert math.isnan(paired_t_test([0.3, 0.4, 0.5], [0.1, 0.2, 0.3]))
    assert paired_t_test([81.0, 82.5], [80.0, 81.0]) < 1.0


def test_all_tables_of_a_size_that_some_recipes_lack():
    command = [sys.executable, ROOT / "scripts" / "make_table.py", "--size", "paper", "--format", "tsv"]
    done = in_process.run(command)
    assert done.returncode == 0 and "84.42" in done.stdout, done.stderr


def test_a_part_of_de_en_is_not_the_paper_s_size(tmp_path):
    (tmp_path / "iwslt14_deen_partial").mkdir()
    recipe = read_recipe("ga_sam_table1_deen", "paper")
    done = in_process.run(runner.preparation(recipe, tmp_path, tmp_path / "out"))
    assert done.returncode == 1 and "this size needs the whole corpus" in done.stderr
