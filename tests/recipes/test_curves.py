"""Curves over a sampling rate and over a flag of the methods; points over what methods cost."""

import math
import sys

import pytest

from scripts.recipes.curves import Point, draw, panels
from scripts.recipes.obtained import COLUMNS
from scripts.recipes.recipe import ROOT, RecipeError, column_names, read_recipe
from tests import in_process

SCORES = {1: 80.0, 2: 82.0}  # by seed, to which what a row is of is added


def columns(name):
    return [read_recipe(name, "mini", column) for column in column_names(name, "mini")]


def write_rows(path, recipes, value, methods=None, passes=None):
    lines = ["\t".join(COLUMNS)]
    for recipe in recipes:
        for method in methods or recipe.methods:
            for seed, score in SCORES.items():
                row = dict.fromkeys(COLUMNS, "") | {
                    "size": "mini", "column": recipe.column, "method": method, "seed": str(seed),
                    "passes": str((passes or {}).get(method, 1)),
                    "metric": recipe.metric.name, "value": str(score + value(recipe, method)), "seconds": "1",
                }  # fmt: skip
                lines.append("\t".join(row[column] for column in COLUMNS))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_over_the_sampling_rate(tmp_path):
    """A plot for each score with a curve for each method, in the order of the rates."""
    recipes = columns("fsam_figure2_roberta_large")
    path = write_rows(tmp_path / "obtained.tsv", recipes, lambda recipe, method: 10 * recipe.options["rate"])
    found = panels(recipes[::-1], path)
    assert [(panel.title, panel.metric.name) for panel in found] == [
        ("STS-B Spearman", "spearman"),
        ("STS-B", "pearson"),
    ]
    for panel in found:
        assert list(panel.curves) == ["Adam", "SAM", "FSAM"] and not panel.levels
        expected = [(10, 82), (20, 83), (50, 86), (90, 90)]
        for points in panel.curves.values():
            assert [point[:2] for point in points] == [pytest.approx(place) for place in expected]
            assert all(point.std == pytest.approx(math.sqrt(2)) for point in points)


def test_over_rates_of_a_mixture(tmp_path):
    """Columns that are rates alone are one curve for each method."""
    recipes = columns("sam_language_models_figure1")
    path = write_rows(tmp_path / "obtained.tsv", recipes, lambda recipe, method: 10 * recipe.options["rate"])
    (panel,) = panels(recipes, path)
    assert panel.title == recipes[0].title and list(panel.curves) == ["Adafactor", "SAM"]
    assert [point.x for point in panel.curves["SAM"]] == [2, 5, 10, 20, 40, 80]


def test_over_a_flag_of_the_methods(tmp_path):
    """One curve through the methods that have it; the others are levels."""
    recipes = columns("fsam_figure1")
    path = write_rows(
        tmp_path / "obtained.tsv",
        recipes,
        lambda recipe, method: float(recipe.methods[method].get("sam-sparsity", -1)),
        ["s = 0.99", "Adam", "s = 0.5"],
    )
    found = panels(recipes, path, "sam-sparsity")
    assert [panel.title for panel in found] == ["MRPC", "MRPC F1"]
    (points,) = found[0].curves.values()
    assert list(found[0].curves) == ["fisher_sam"] and points[0] == Point(0.5, 81.5, math.sqrt(2))
    assert points[1][:2] == pytest.approx((0.99, 81.99))
    assert list(found[0].levels) == ["Adam"] and found[0].levels["Adam"].mean == 80.0


def test_over_what_the_methods_cost(tmp_path):
    """A point for each method, at its mean number of passes."""
    recipes = columns("cheaper_imdb")
    passes = {"Baseline": 1.0, "quarter": 1.25}
    path = write_rows(tmp_path / "obtained.tsv", recipes, lambda recipe, method: 0.0, passes, passes)
    (panel,) = panels(recipes, path, "passes")
    assert {name: [point.x for point in points] for name, points in panel.curves.items()} == {
        name: [number] for name, number in passes.items()
    }
    assert not panel.levels


def test_nothing_to_draw(tmp_path):
    with pytest.raises(RecipeError, match="a flag of some methods of the recipe, or passes, got 'rates'"):
        panels(columns("fsam_figure1"), tmp_path / "none.tsv", "rates")
    with pytest.raises(RecipeError, match=r"none\.tsv has no scores of fsam_figure1 at --size mini; run it first"):
        panels(columns("fsam_figure1"), tmp_path / "none.tsv", "sam-sparsity")


def test_the_command_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    recipes = columns("fsam_figure1")
    obtained = write_rows(tmp_path / "obtained.tsv", recipes, lambda recipe, method: 0.0)
    command = [sys.executable, ROOT / "scripts" / "plot_curve.py", "fsam_figure1", "--obtained", obtained]
    out = tmp_path / "plots" / "curve.png"
    done = in_process.run([*command, "--x", "sam-sparsity", "--out", out])
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 5000
    done = in_process.run([*command, "--x", "sam-sparsity", "--y-range", "90", "80", "--out", out])
    assert done.returncode == 2 and "the lower one first, got 90 80" in done.stderr
    done = in_process.run([*command, "--x", "size", "--out", out])
    assert done.returncode == 1 and done.stderr.startswith("error: --x must be")


def test_a_mean_outside_the_range_is_an_arrow_with_its_number(tmp_path, monkeypatch):
    plots = pytest.importorskip("fairseq_sam.analysis.plots")
    recipes, drawn = columns("cheaper_imdb"), []
    passes = {"Baseline": 1.0, "quarter": 1.25, "GA-SAM": 2.0}
    scores = {"Baseline": 80.0, "quarter": 50.3, "GA-SAM": 99.0}
    path = write_rows(tmp_path / "obtained.tsv", recipes, lambda recipe, method: scores[method] - 80, passes, passes)
    monkeypatch.setattr(plots, "save", lambda made, out: drawn.append(made))
    draw(panels(recipes, path, "passes"), "passes", "long title " * 20, tmp_path / "x.png", (79.0, 83.0))
    (axes,) = drawn[0].axes
    middles = {each.get_text(): each.xy for each in axes.texts}
    assert sorted(middles.values()) == [(1.25, 79.0), (2.0, 83.0)] and axes.get_ylim() == (79.0, 83.0)
    drawn[0].canvas.draw()
    title = drawn[0]._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= drawn[0].bbox.width, "the title is in the picture"
