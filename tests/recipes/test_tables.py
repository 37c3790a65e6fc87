"""Tables of obtained scores."""

import math
import sys
from dataclasses import replace

import pytest
from scipy import stats

from scripts.make_table import table as table_of
from scripts.recipes.obtained import COLUMNS
from scripts.recipes.recipe import EXAMPLES, ROOT, column_names, read_recipe
from scripts.recipes.significance import paired_t_test
from scripts.recipes.tables import average_rows, cells, latex, markdown, table_rows, tsv
from tests import in_process

SCORES = {"Baseline": [80.0, 81.0, 80.5], "SAM": [81.0, 82.5, 81.25], "ASAM": [79.0]}


def write_rows(path, scores, size="mini", p_values=None):
    lines = ["\t".join(COLUMNS)]
    for method, values in scores.items():
        for seed, value in enumerate(values, start=1):
            row = dict.fromkeys(COLUMNS, "") | {
                "size": size, "method": method, "seed": str(seed), "metric": "accuracy", "value": str(value),
                "passes": "1.5", "seconds": "300", "p_value": str((p_values or {}).get((method, seed), "")),
            }  # fmt: skip
            lines.append("\t".join(row[column] for column in COLUMNS))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def table(tmp_path):
    recipe = read_recipe("ga_sam_table1_imdb", "mini")
    obtained = write_rows(tmp_path / "obtained.tsv", SCORES)
    return cells(table_rows(recipe, obtained, recipe.folder / "expected.tsv"), recipe.metric)


def test_mean_deviation_difference_and_p_value(table):
    by_method = {row[0]: row for row in table[1:]}
    expected_p = stats.ttest_rel(SCORES["SAM"], SCORES["Baseline"]).pvalue
    assert by_method["Baseline"] == ["Baseline", "80.50 ± 0.50", "", "", "3", "1.50", "5 min", "84.42 ± 0.12", ""]
    assert by_method["SAM"] == [
        "SAM", "81.58 ± 0.80", "+1.08 ↑", f"{expected_p:.3f}", "3", "1.50", "5 min", "84.75 ± 0.31", "+0.33",
    ]  # fmt: skip
    assert by_method["ASAM"][1:4] == ["79.00", "-1.50 ↓", ""]
    assert by_method["GA-SAM"][1:7] == ["", "", "", "0", "", ""] and by_method["GA-SAM"][7] == "86.11 ± 0.22"


def test_lower_can_be_better(tmp_path):
    recipe = read_recipe("ga_sam_table1_ptb", "mini")
    path = write_rows(tmp_path / "obtained.tsv", {"Baseline": [90.0], "SAM": [95.0], "GA-SAM": [85.0]})
    path.write_text(path.read_text().replace("accuracy", "perplexity"))
    by_method = {row[0]: row for row in cells(table_rows(recipe, path, tmp_path / "none.tsv"), recipe.metric)}
    assert by_method["SAM"][2] == "+5.00 ↓" and by_method["GA-SAM"][2] == "-5.00 ↑" and by_method["SAM"][7] == ""


def test_other_sizes_do_not_count_and_a_bootstrap_goes_first(tmp_path):
    recipe = read_recipe("ga_sam_table1_imdb", "paper")
    p_values = {("SAM", 1): 0.04, ("SAM", 2): 0.25, ("SAM", 3): 0.01}
    path = write_rows(tmp_path / "obtained.tsv", SCORES, size="paper", p_values=p_values)
    rows = {row.method: row for row in table_rows(recipe, path, tmp_path / "none.tsv")}
    assert rows["SAM"].p_value == 0.25, "the largest over seeds"
    assert rows["SAM"].values == {1: 81.0, 2: 82.5, 3: 81.25}
    mini = table_rows(read_recipe("ga_sam_table1_imdb", "mini"), path, tmp_path / "none.tsv")
    assert all(not row.values and math.isnan(row.mean) for row in mini)


def test_columns_have_tables_of_their_own(tmp_path):
    recipe = replace(read_recipe("ga_sam_table1_imdb", "mini"), column="RTE")
    path = write_rows(tmp_path / "obtained.tsv", SCORES)
    assert not any(row.values for row in table_rows(recipe, path, recipe.folder / "expected.tsv"))
    lines = path.read_text().splitlines()
    place = COLUMNS.index("column")
    rows = [line.split("\t") for line in lines]
    for row in rows[1:]:
        row[place] = "RTE"
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    (tmp_path / "expected.tsv").write_text(
        "column\tmethod\tmean\tstd\tsource\nRTE\tSAM\t70.5\t\tx:1\nCB\tSAM\t1\t\tx:1\n"
    )
    found = {row.method: row for row in table_rows(recipe, path, tmp_path / "expected.tsv")}
    assert len(found["SAM"].values) == 3 and found["SAM"].expected[0] == 70.5


def test_averages_over_columns(tmp_path):
    """Of the seeds that all columns have; what the paper leaves out stays empty."""
    recipe = read_recipe("ga_sam_table1_imdb", "mini")
    recipe = replace(recipe, methods={name: recipe.methods[name] for name in SCORES})
    other = {"Baseline": [60.0, 62.0], "SAM": [64.0, 64.0], "ASAM": []}
    (tmp_path / "expected.tsv").write_text(
        "column\tmethod\tmean\tstd\tsource\naverage\tBaseline\t70.5\t\tx:1\naverage\tSAM\t\t\tx:2\n"
    )
    columns = [
        table_rows(recipe, write_rows(tmp_path / f"{number}.tsv", scores), tmp_path / "expected.tsv")
        for number, scores in enumerate((SCORES, other))
    ]
    found = {row.method: row for row in average_rows(columns, tmp_path / "expected.tsv")}
    assert found["Baseline"].values == {1: 70.0, 2: 71.5} and found["SAM"].values == {1: 72.5, 2: 73.25}
    assert found["ASAM"].values == {} and math.isnan(found["ASAM"].mean)
    assert found["SAM"].p_value == pytest.approx(stats.ttest_rel([72.5, 73.25], [70.0, 71.5]).pvalue)
    assert math.isnan(found["Baseline"].p_value)
    assert found["Baseline"].expected[0] == 70.5 and math.isnan(found["SAM"].expected[0])


def test_the_command_shows_the_average(tmp_path):
    """After the columns, with the number of those that it is of."""
    command = [sys.executable, ROOT / "scripts" / "make_table.py", "fsam_table4_bert_base"]
    for size, title in (("mini", "average of the 3 above, the paper's of its 6"), ("paper", "average of the 6 above")):
        (column, *_) = column_names("fsam_table4_bert_base", size)
        metric = read_recipe("fsam_table4_bert_base", size, column).metric.name
        obtained = write_rows(tmp_path / f"{size}.tsv", {"Fi = 100": [80.0]}, size)
        head, row = obtained.read_text().splitlines()
        values = dict(zip(COLUMNS, row.split("\t"), strict=True)) | {"column": column, "metric": metric}
        obtained.write_text(f"{head}\n" + "\t".join(values.values()) + "\n")
        done = in_process.run([*command, "--size", size, "--obtained", obtained])
        assert done.returncode == 0 and f"BERT-base, {title} (`--size {size}`)" in done.stdout
        assert "| Fi = 10 |  |  |  | 0 |  |  | 83.90 | -0.40 |" in done.stdout.split("average of")[1]


def test_formats(table):
    assert markdown(table).splitlines()[1] == "|" + "---|" * 9
    assert markdown([["a|b"], ["c"]]).splitlines()[0] == r"| a\|b |"
    text = latex(table)
    assert r"81.58 $\pm$ 0.80 & +1.08 $\uparrow$" in text and r"(\%)" in text and text.count(r"\\") == 7
    assert tsv(table).splitlines()[2].split("\t")[0] == "SAM"


def test_t_test():
    assert math.isnan(paired_t_test([1.0], [2.0])) and paired_t_test([1.0, 2.0], [1.0, 2.0]) == 1.0
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_t_test([1.0, 2.0], [1.0])


def test_the_command(tmp_path):
    obtained = write_rows(tmp_path / "obtained.tsv", SCORES)
    command = [sys.executable, ROOT / "scripts" / "make_table.py", "ga_sam_table1_imdb", "--obtained", obtained]
    done = in_process.run(command)
    assert done.returncode == 0 and done.stdout.startswith("GA-SAM, Table 1: IMDB, TextCNN (`--size mini`)\n\n| method")
    done = in_process.run([*command, "--size", "huge"])
    assert done.returncode == 1 and "--size must be one of mini, paper, got 'huge'" in done.stderr


def test_the_readmes_have_the_tables_of_the_runs():
    """What scripts/make_table.py --readme writes is there, as it is."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_table import RESULTS, results, write_readme

    assert RESULTS.read_text() == results(), f"{RESULTS}: run scripts/make_table.py --readme"
    for path in sorted(EXAMPLES.glob("*/recipe.yaml")):
        readme = path.with_name("README.md")
        before = readme.read_text()
        try:
            write_readme(path.parent)
            assert readme.read_text() == before, f"{readme}: run scripts/make_table.py --readme"
        finally:
            readme.write_text(before)


def test_runs_without_a_score(tmp_path):
    """A run that diverged is in the table; the others' figures are what they are."""
    scores = {"Baseline": [80.0, 81.0, 80.5], "SAM": [81.0, math.nan, 81.25], "GA-SAM": [math.inf, 82.0, 83.0]}
    recipe = read_recipe("ga_sam_table1_imdb", "mini")
    obtained = write_rows(tmp_path / "obtained.tsv", scores)
    rows = {row.method: row for row in table_rows(recipe, obtained, recipe.folder / "expected.tsv")}
    assert math.isnan(rows["SAM"].mean) and math.isnan(rows["SAM"].p_value) and math.isnan(rows["SAM"].std)
    text = markdown(cells(list(rows.values()), recipe.metric))
    assert "| SAM | (1 of 3 diverged) |" in text and "∞ (1 of 3 diverged)" in text


def test_files_that_are_no_runs(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "make_table.py", "ga_sam_table1_imdb", "--obtained"]
    obtained = write_rows(tmp_path / "obtained.tsv", {"Baseline": ["many"]})
    for path, words in (
        (tmp_path, "must be a file of runs"),
        (tmp_path / "none.tsv", "must be a file of runs"),
        (obtained, "has the value 'many', which is no number"),
        (write_rows(tmp_path / "paper.tsv", SCORES, size="paper"), "has no runs of ga_sam_table1_imdb at --size mini"),
    ):
        done = in_process.run([*command, path])
        assert done.returncode == 1 and words in done.stderr


def test_columns_have_their_names_in_every_format():
    for form, mark in (("tsv", "# "), ("latex", "% "), ("markdown", "")):
        text = table_of("fsam_table1_bert_large", "mini", form)
        assert all(f"{mark}FSAM, Table 1: GLUE and SuperGLUE, BERT-large, {name} (" in text for name in ("RTE", "WiC"))
