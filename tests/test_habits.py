"""Habits that a reader relies on: short files, one list of checks, a contributing page that says what is so."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from scripts import check
from tests.files import ROOT, repository_files

LONGEST = 400
# Files that are longer, and why each is in one piece.
LONG = {
    "user_dir_setup.py": "runs before anything is installed, so that it can import nothing of ours",
    "tests/adapter/test_analyses.py": "every command on the same two trained models, which take long to make",
    "tests/adapter/test_encoders.py": "conversion and its refusals, on the same small encoders",
    "tests/adapter/test_modes.py": "one table of training modes, a test each",
    "tests/adapter/test_sentence_embedding.py": "task, criterion and recipe on the same corpus",
    "tests/adapter/test_workers.py": "pairs of workers, of which all cases share the start",
    "tests/core/test_invariants.py": "what holds for all methods, by property",
    "tests/recipes/test_evaluations.py": "all evaluations on runs of the same models",
    "tests/test_setup.py": "the cases of one script, on the same pretended machine",
}


def test_no_file_is_long_without_a_reason():
    """A file that is no longer long has no row: what is said of it would be untrue."""
    files = [path for path in repository_files() if path.suffix == ".py"]
    counts = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    assert len(counts) > 200, "they are found"
    assert {name: count for name, count in counts.items() if count > LONGEST and name not in LONG} == {}
    assert {name: counts.get(name, 0) for name in LONG if counts.get(name, 0) <= LONGEST} == {}


def test_contributing_is_a_short_page_that_names_every_command():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(page.splitlines()) < 100
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert targets == ["check", "fast", "docs", "tables"]
    assert set(re.findall(r"`?make ([a-z]+)", page)) == set(targets)


def test_ci_runs_the_command_of_the_readme_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert lines[2:] == ['cd "$(dirname "${BASH_SOURCE[0]}")/.."', "python3 user_dir_setup.py test"]
    assert "\npython3 user_dir_setup.py test\n" in (ROOT / "README.md").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("check", ["bash .ci/run"]),
        ("fast", ["PYTHON -m scripts.check fast"]),
        ("docs", ["PYTHON -m scripts.check docs"]),
        ("tables", ["PYTHON scripts/make_table.py --readme", "PYTHON -m scripts.make_docs"]),
    ],
)
def test_make_runs_what_ci_runs(target, commands):
    done = subprocess.run(["make", "-n", target, "PYTHON=PYTHON"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines() == commands, done.stderr


def test_hooks_run_steps_of_the_list():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["entry"] == f"python -m scripts.check {hook['id']}" and hook["language"] == "system"
        assert hook["id"] in check.FAST and hook["pass_filenames"] is False
    assert len(repository["hooks"]) == 3


# -- the list of checks ----------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """The commands that were run; those of mypy fail."""
    calls = []

    def call(command, cwd):
        assert command[:2] == [sys.executable, "-m"] and cwd == ROOT
        calls.append(tuple(command[2:]))
        return 2 if command[2] == "mypy" else 0

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return calls


def test_all_steps_are_run_after_one_that_failed(ran, capsys):
    assert check.main([]) == 1
    assert [words[0] for words in ran] == ["ruff", "ruff", "mypy", "pytest", "pytest", "mkdocs"]
    assert ran[:3] == [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)]
    assert ran[3][1:3] == ("-n", "auto") and not set(ran[3]) & {"-m", "-k"}, "no test is left out"
    assert ran[4][1] == "tests/kill_loop.py" and "--strict" in ran[5]
    assert capsys.readouterr().out.splitlines()[-1] == "Failed: types: mypy (exit status 2)"


def test_some_steps_by_name(ran, capsys):
    assert check.main(["docs", "lint"]) == 0
    assert [words[0] for words in ran] == ["mkdocs", "ruff"]
    assert check.main(["fast"]) == 1
    assert [words[0] for words in ran[2:]] == ["ruff", "ruff", "mypy", "pytest"] and "not slow" in ran[-1]
    for wrong in (["lints"], ["fast", "docs"]):
        with pytest.raises(SystemExit) as ended:
            check.main(wrong)
        assert ended.value.code == 2 and f"got '{wrong[0]}'" in capsys.readouterr().err


def test_pages_are_left_out_where_they_cannot_be_built_unless_they_were_named(ran, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert check.main([]) == 1 and "mkdocs" not in {words[0] for words in ran}
    assert "The pages are not built: pip install -r docs/requirements.txt" in capsys.readouterr().out
    check.main(["docs"])
    assert ran[-1][0] == "mkdocs"


def test_quick_tests_are_there():
    assert all((ROOT / path).exists() for path in check.FAST_TESTS)
