"""Rows of runs that several tables have: recorded for one, entered into the others."""

import pytest

pytest.importorskip("fairseq", reason="recipes run fairseq's commands")

from scripts.recipes import shared_rows
from scripts.recipes.obtained import COLUMNS, put_row, read_rows
from scripts.recipes.recipe import RecipeError, read_recipe
from scripts.recipes.shared_rows import share_rows

TABLES = {
    "first": "Baseline: {optimizer: adam}, SAM: {optimizer: sam, sam-epsilon: 0.1}, ASAM: {optimizer: asam}",
    "other": "Plain: {optimizer: adam}, ρ = 0.1: {optimizer: sam, sam-epsilon: 0.1}, ρ = 0.2: {optimizer: sam, "
    "sam-epsilon: 0.2}",
    "third": "SAM: {optimizer: sam, sam-epsilon: 0.1}, Plain: {optimizer: adam}",
    "times": "SAM: {optimizer: sam, sam-epsilon: 0.1}",
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Four tables with runs in common: the third has another baseline, the last shows times."""
    for name, methods in TABLES.items():
        (tmp_path / name).mkdir()
        metric = "{name: minutes, better: lower}" if name == "times" else "{name: accuracy}"
        (tmp_path / name / "prepare.py").touch()
        prepare = "prepare.py" if name == "first" else "../first/prepare.py"
        (tmp_path / name / "recipe.yaml").write_text(
            f"title: t\npaper: P, Table 1\nprepare: {prepare}\nevaluate: accuracy\nmetric: {metric}\nseeds: [1, 2]\n"
            f"methods: {{{methods}}}\nsizes: {{mini: {{}}}}\n"
        )
    folders = [tmp_path / name for name in TABLES]
    monkeypatch.setattr(shared_rows, "recipe_folders", lambda: folders)
    return dict(zip(TABLES, folders, strict=True))


def row(method, value, seed="1", **others):
    fixed = {"size": "mini", "metric": "accuracy", "passes": "1", "seconds": "120", "p_value": "0.5", "commit": "abc"}
    return dict.fromkeys(COLUMNS, "") | fixed | {"method": method, "seed": seed, "value": value} | others


def entered(folder):
    rows = read_rows(folder / "obtained.tsv")
    return [(row["method"], row["seed"], row["metric"], row["value"], row["p_value"]) for row in rows]


def test_rows_are_entered_where_there_are_none(folders):
    order = list(read_recipe(folders["first"], "mini").methods)
    recorded = [row("Baseline", "80", p_value=""), row("SAM", "81"), row("SAM", "82", "2"), row("ASAM", "83")]
    for each in recorded:
        put_row(folders["first"] / "obtained.tsv", each, order)
    put_row(folders["other"] / "obtained.tsv", row("ρ = 0.1", "70"), ["Plain", "ρ = 0.1"])
    before = entered(folders["first"])
    assert share_rows(list(folders.values())) == 7 and entered(folders["first"]) == before
    assert entered(folders["other"]) == [
        ("Plain", "1", "accuracy", "80", ""),
        ("ρ = 0.1", "1", "accuracy", "70", "0.5"),  # its own
        ("ρ = 0.1", "2", "accuracy", "82", "0.5"),
    ]
    found = read_rows(folders["other"] / "obtained.tsv")
    assert [each["flags"] for each in found if each["seed"] == "2"] == ["--optimizer sam --sam-epsilon 0.1"]
    assert {each["commit"] for each in found} == {"abc"}
    # Compared with another run, so that the p-values are not those.
    assert {each[0]: each[-1] for each in entered(folders["third"])} == {"SAM": "", "Plain": ""}
    assert [each[:4] for each in entered(folders["times"])] == [
        ("SAM", "1", "minutes", "2"),
        ("SAM", "2", "minutes", "2"),
    ]
    assert share_rows(list(folders.values())) == 0


@pytest.mark.parametrize(("name", "value"), [("seed", "one"), ("seconds", ""), ("passes", None)])
def test_damaged_tables(folders, name, value):
    path = folders["first"] / "obtained.tsv"
    put_row(path, row("SAM", "81"), ["SAM"])
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    place = lines[0].index(name)
    lines[1] = lines[1][:place] if value is None else [*lines[1][:place], value, *lines[1][place + 1 :]]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    with pytest.raises(
        RecipeError, match=f"obtained.tsv, line 2: {name} must be a number, got .*; the line is damaged"
    ):
        share_rows([])
