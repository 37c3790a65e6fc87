"""Recipes are read, checked, and turned into commands."""

import re
from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="recipes run fairseq's commands")

import fairseq_sam.models.textcnn  # noqa: F401
from fairseq_sam.adapter.config import check_config
from scripts.recipes.evaluations import EVALUATIONS
from scripts.recipes.jobs import Job, data_folder, needed_jobs
from scripts.recipes.recipe import (
    EXAMPLES,
    RecipeError,
    column_names,
    command_line,
    read_recipe,
    size_names,
)
from tests.adapter import runs
from tests.recipes.papers import RECIPES, WITH_FIGURES

TEXT = """
title: a title
paper: a paper
prepare: prepare.py
evaluate: classification
metric: {name: accuracy}
options: {length: 5}
flags: {arch: textcnn, lr: 1e-3, dropout: 0.5}
methods:
  Baseline: {optimizer: adam}
  SAM: {optimizer: sam, sam-epsilon: 0.1}
sizes:
  mini: {options: {length: 3}, flags: {dropout: 0.1, share-all-embeddings: true}, methods: {SAM: {sam-epsilon: 0.2}}}
  paper: {}
"""


def write(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    return folder


def test_sizes_change_options_flags_and_methods(tmp_path):
    mini, paper = (read_recipe(write(tmp_path / "one", TEXT), size) for size in ("mini", "paper"))
    assert (mini.options, paper.options) == ({"length": 3}, {"length": 5})
    assert mini.baseline == "Baseline" and mini.seeds == [1]
    assert mini.methods["SAM"] == {
        "arch": "textcnn", "lr": "1e-3", "dropout": 0.1, "share-all-embeddings": True, "optimizer": "sam",
        "sam-epsilon": 0.2,
    }  # fmt: skip
    assert paper.methods["SAM"]["sam-epsilon"] == 0.1 and paper.methods["Baseline"]["dropout"] == 0.5


COLUMNS = """
columns:
  One: {options: {task: one}, metric: {name: f1}}
  Two: {options: {task: two}, flags: {lr: 5e-4}, methods: {SAM: {sam-epsilon: 0.7}}}
"""


def test_columns_differ_from_what_is_shared(tmp_path):
    text = TEXT.replace("paper: {}", "paper: {columns: {Two: {flags: {lr: 9e-9}}}}") + COLUMNS
    folder = write(tmp_path, text)
    assert column_names(folder, "mini") == ["One", "Two"] and column_names(folder, "paper") == ["Two"]
    one, two, paper = (read_recipe(folder, *which) for which in (("mini", "One"), ("mini", "Two"), ("paper",)))
    assert (one.column, one.options, one.metric.name) == ("One", {"length": 3, "task": "one"}, "f1")
    assert (two.options["task"], two.metric.name, two.methods["SAM"]["sam-epsilon"]) == ("two", "accuracy", 0.7)
    assert (two.methods["SAM"]["lr"], paper.methods["SAM"]["lr"], paper.column) == ("5e-4", "9e-9", "Two")
    assert data_folder(one, tmp_path) != data_folder(two, tmp_path)
    with pytest.raises(RecipeError, match="--columns must be among One, Two, got 'Three'"):
        read_recipe(folder, "mini", "Three")
    with pytest.raises(RecipeError, match=r"sizes\.paper\.columns has 'Six', which is no column"):
        read_recipe(write(tmp_path, text.replace("{Two: {flags", "{Six: {flags")), "paper")


def test_another_table_on_the_same_data_shares_runs(tmp_path):
    first = write(tmp_path / "one", TEXT)
    other = write(
        tmp_path / "two",
        "extends: ../one\npaper: Table 2\n"
        "methods:\n  Base: {optimizer: adam}\n  Wide: {optimizer: sam, sam-epsilon: 9}\n"
        "sizes: {mini: {flags: {max-epoch: 2}}}",
    )
    one, two = read_recipe(first, "paper"), read_recipe(other, "paper")
    assert two.paper == "Table 2" and two.title == "a title" and list(two.methods) == ["Base", "Wide"]
    assert data_folder(one, tmp_path) == data_folder(two, tmp_path)
    assert data_folder(one, tmp_path) != data_folder(read_recipe(first, "mini"), tmp_path)
    job, same = Job(one, "Baseline", 1, tmp_path), Job(two, "Base", 1, tmp_path)
    job.write_settings()
    assert same.run == job.run and Job(two, "Wide", 1, tmp_path).run != job.run
    assert same.key == job.key and same.folder != job.folder
    assert Job(one, "Baseline", 2, tmp_path).run != job.run


RATES = """
extends: ../one
paper: Figure 1
rates: [0.1, 0.25]
sizes:
  mini: {rates: [0.5], columns: {Two: {flags: {lr: 1}}}}
"""


def test_a_column_for_each_sampling_rate(tmp_path):
    """Columns and methods are the other recipe's; what a size says of them adds up."""
    size = "paper: {methods: {SAM: {sam-epsilon: 0.3}}, columns: {Two: {flags: {momentum: 0.5}}}}"
    write(tmp_path / "one", TEXT.replace("paper: {}", size) + COLUMNS)
    folder = write(tmp_path / "two", RATES)
    assert column_names(folder, "paper") == ["Two 10%", "Two 25%"] and column_names(folder, "mini") == ["Two 50%"]
    paper, mini = read_recipe(folder, "paper", "Two 25%"), read_recipe(folder, "mini", "Two 50%")
    assert (paper.options["rate"], paper.options["task"], mini.options["rate"]) == (0.25, "two", 0.5)
    assert paper.methods["SAM"] | {"lr": "5e-4", "momentum": 0.5} == paper.methods["SAM"]
    assert paper.methods["SAM"]["sam-epsilon"] == 0.7 and mini.methods["Baseline"]["lr"] == 1
    assert read_recipe(folder, "paper", "Two 10%", {"rate": "0.2"}).options["rate"] == "0.2"
    with pytest.raises(RecipeError, match=r"sizes\.mini\.columns has 'Three'"):
        column_names(write(tmp_path / "three", RATES.replace("Two", "Three")), "mini")


def test_a_needed_model_is_a_recipe(tmp_path):
    """Read at the same size, also where another recipe has the key; a model that is named takes its place."""
    write(tmp_path / "model", TEXT)
    needs = TEXT.replace("paper: {}", "paper: {needs: {model: ../model}}").replace("{length: 5}", "{model: null}")
    first = write(tmp_path / "one", needs)
    other = write(tmp_path / "two", "extends: ../one\nmethods: {Base: {optimizer: adam}}\nsizes: {mini: {seeds: [2]}}")
    one, two, mini = read_recipe(first, "paper"), read_recipe(other, "paper"), read_recipe(first, "mini")
    assert [recipe.needs["model"].folder.name for recipe in (one, two)] == ["model", "model"] and not mini.needs
    (name, job), *others = needed_jobs(one, tmp_path).items()
    assert (name, job.method, job.recipe.size, others) == ("model", "Baseline", "paper", [])
    named = read_recipe(first, "paper", changed={"model": "here"})
    assert not named.needs and named.options["model"] == "here"
    folders = {data_folder(recipe, tmp_path) for recipe in (one, two)}
    assert len(folders) == 1 and data_folder(named, tmp_path) not in folders
    write(tmp_path / "model", TEXT.replace("lr: 1e-3", "lr: 1e-4"))
    assert data_folder(read_recipe(first, "paper"), tmp_path) not in folders, "another model, other data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title:", "titel:"), "has 'titel'; the keys are"),
        (("prepare: prepare.py\n", ""), "needs the key 'prepare'"),
        (("{name: accuracy}", "{name: accuracy, better: larger}"), "higher or lower, got 'larger'"),
        (("{options: {length: 3}", "{option: {length: 3}"), "has 'option'; it may have"),
        (("methods: {SAM: {", "methods: {SMA: {"), "has the method 'SMA', which the recipe has not"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_recipe(write(tmp_path, TEXT.replace(*change)), "mini")


def test_unknown_size_and_folder(tmp_path):
    with pytest.raises(RecipeError, match="--size must be one of mini, paper, got 'large'"):
        read_recipe(write(tmp_path, TEXT), "large")
    with pytest.raises(RecipeError, match=r"holds no recipe\.yaml; the recipes are .*ga_sam_table1_imdb"):
        read_recipe("nowhere", "mini")


def test_command_lines():
    flags = {
        "lr": "1e-3",
        "share-all-embeddings": True,
        "cpu": None,
        "fp16": False,
        "eval-bleu-args": "{}",
        "valid": ["a", 2],
    }
    assert command_line(flags) == [
        "--lr",
        "1e-3",
        "--share-all-embeddings",
        "--eval-bleu-args",
        "{}",
        "--valid",
        "a",
        "2",
    ]


# -- the recipes of the examples -------------------------------------------------------------------------------------

CHECKED = []  # settings that several tables have


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in RECIPES for size in size_names(name)])
def test_fairseq_takes_every_setting(name, size, tmp_path):
    """fairseq-train's own parser and the plugin's checks, for each method of a column and one of each other column."""
    for number, column in enumerate(column_names(name, size)):
        recipe = read_recipe(name, size, column)
        assert recipe.evaluate in EVALUATIONS and recipe.prepare.is_file() and recipe.seeds
        for method in list(recipe.methods)[-1 if number else 0 :]:
            job = Job(recipe, method, 1, tmp_path, cpu=True)
            if job.flags not in CHECKED:
                command = job.training()
                check_config(runs.configuration(command[command.index("fairseq_cli.train") + 1 :]))
                CHECKED.append(job.flags)


@pytest.mark.parametrize("name", RECIPES)
def test_the_folder_is_complete(name):
    files = {"README.md", "recipe.yaml", "run.sh", *(["expected.tsv"] if name in WITH_FIGURES else [])}
    assert files <= {path.name for path in (EXAMPLES / name).iterdir()}


def test_there_are_recipes():
    assert {"ga_sam_table1_imdb", "ga_sam_table1_ptb"} <= set(RECIPES)
    assert all(Path(EXAMPLES / name / "recipe.yaml").is_file() for name in RECIPES)
