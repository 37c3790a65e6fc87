"""The README's line for each recipe: the paper's gain, ours, and the word for it."""

import math
import shutil

import pytest
from scipy import stats

from scripts.recipes import verdicts as module
from scripts.recipes.recipe import EXAMPLES
from scripts.recipes.verdicts import HEAD, comparisons, verdict, verdicts
from tests.recipes.test_tables import write_rows


def recipe_with(tmp_path, name, scores, metric):
    """A copy of a recipe of the repository with other runs."""
    folder = tmp_path / name
    folder.mkdir()
    for file in ("recipe.yaml", "expected.tsv"):
        shutil.copy(EXAMPLES / name / file, folder)
    path = write_rows(folder / "obtained.tsv", scores)
    path.write_text(path.read_text().replace("accuracy", metric))
    return folder


@pytest.mark.parametrize(
    ("gain", "p_value", "word"),
    [
        (1.0, 0.049, "gain"), (-1.0, 0.049, "loss"), (1.0, 0.05, "no gain"), (-1.0, 0.05, "no gain"),
        (9.0, math.nan, "undecided"), (0.0, 1.0, "no gain"),
    ],
)  # fmt: skip
def test_a_word_for_a_difference(gain, p_value, word):
    assert verdict(gain, p_value) == word


def test_gains_are_positive_where_a_lower_score_is_better(tmp_path, monkeypatch):
    """Perplexities: the paper's GA-SAM has 84.52 against 86.70; ours loses 5, 6 and 5.5."""
    scores = {"Baseline": [90.0, 91.0, 92.0], "SAM": [80.0, 80.5, 82.0], "GA-SAM": [95.0, 97.0, 97.5]}
    folder = recipe_with(tmp_path, "ga_sam_table1_ptb", scores, "perplexity")
    (found,) = comparisons(folder, "mini")
    assert found.method == "GA-SAM", "SAM gains here, but GA-SAM in the paper"
    assert found.paper == pytest.approx(2.18) and found.ours == pytest.approx(-5.5) and found.seeds == 3
    assert found.p_value == pytest.approx(stats.ttest_1samp([5.0, 6.0, 5.5], 0.0).pvalue)
    monkeypatch.setattr(module, "recipe_folders", lambda: [folder])
    head, row = verdicts()
    assert head == HEAD
    assert row[0] == "[GA-SAM, Table 1](examples/ga_sam_table1_ptb/README.md)"
    assert row[2:] == ["GA-SAM", "+2.18", "-5.50", f"{found.p_value:.3f}", "3", "loss"]


def test_a_method_that_was_not_run_is_not_chosen_and_one_seed_decides_nothing(tmp_path, monkeypatch):
    folder = recipe_with(tmp_path, "ga_sam_table1_imdb", {"Baseline": [80.0, 81.0], "SAM": [82.0]}, "accuracy")
    monkeypatch.setattr(module, "recipe_folders", lambda: [folder])
    assert verdicts()[1][2:] == ["SAM", "+0.33", "+1.50", "", "1", "undecided"]


def test_a_recipe_that_was_not_run_has_no_line(tmp_path, monkeypatch):
    folder = recipe_with(tmp_path, "ga_sam_table1_imdb", {"Baseline": [80.0]}, "accuracy")
    monkeypatch.setattr(module, "recipe_folders", lambda: [folder])
    assert comparisons(folder, "mini") == [] and verdicts() == [HEAD]


def test_columns_are_put_together():
    """En-Vi of GA-SAM's Table 4 has seven columns, of which the paper gains least in that of L∞ 0.0001 (0.42 BLEU)."""
    found = comparisons(EXAMPLES / "ga_sam_table4_envi", "mini")
    assert len(found) == 7 and {each.method for each in found} == {"GA-SAM"}
    (row,) = [row for row in verdicts() if "ga_sam_table4_envi" in row[0]]
    assert row[1].endswith("(7 columns)") and row[3] == "+0.42 to +23.81"
    words = [verdict(each.ours, each.p_value) for each in found]
    assert all(f"{word} in {words.count(word)}" in row[-1] for word in words) or row[-1] == words[0]


def test_times_of_training_are_no_gains():
    assert not [row for row in verdicts() if "delta_sam_table6" in row[0]]
