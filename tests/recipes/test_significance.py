"""p-values of translations: sacreBLEU's own, of a method's run and the baseline's with the same seed."""

import pytest

pytest.importorskip("fairseq", reason="jobs are fairseq's runs")

from sacrebleu import BLEU
from sacrebleu.significance import PairedTest

from scripts.recipes.jobs import Job
from scripts.recipes.obtained import COLUMNS, read_rows, write_significance
from scripts.recipes.recipe import read_recipe
from scripts.recipes.significance import HYPOTHESES, REFERENCES, compare

RIGHT = [f"the cat number {n} sat on the old mat today ." for n in range(30)]


def translated(errors):
    """Translations of which one in so many is wrong."""
    return [line.replace("old mat", "new hat") if n % errors == 0 else line for n, line in enumerate(RIGHT)]


# By method and seed; every comparison has another p-value.
TEXTS = {
    ("Baseline", 1): translated(2), ("SAM", 1): translated(3), ("GA-SAM", 1): translated(7),
    ("Baseline", 2): translated(4), ("SAM", 2): translated(5), ("GA-SAM", 2): RIGHT,
}  # fmt: skip


def p_value(first, second):
    systems = [("baseline", second), ("system", first)]
    _, results = PairedTest(systems, {"BLEU": BLEU()}, references=[RIGHT], test_type="bs", n_samples=1000)()
    return results["BLEU"][1].p_value


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    out, recipe = tmp_path_factory.mktemp("out"), read_recipe("ga_sam_table1_envi", "mini")
    made = {key: Job(recipe, *key, out) for key in TEXTS}
    for key, job in made.items():
        job.write_settings()
        for name, lines in ((HYPOTHESES, TEXTS[key]), (REFERENCES, RIGHT)):
            (job.run / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return made


def test_a_run_is_compared_with_another(jobs, tmp_path):
    expected = p_value(TEXTS["SAM", 1], TEXTS["Baseline", 1])
    assert 0 < expected < 0.2
    assert compare(jobs["SAM", 1], jobs["Baseline", 1]) == pytest.approx(expected)
    assert compare(jobs["SAM", 1], jobs["SAM", 1]) == 1.0
    assert compare(jobs["SAM", 1], Job(jobs["SAM", 1].recipe, "Baseline", 1, tmp_path)) is None


def test_each_seed_is_compared_with_the_baseline_s(jobs, tmp_path):
    table, recipe = tmp_path / "obtained.tsv", jobs["SAM", 1].recipe
    lines = ["\t".join(COLUMNS)]
    for method, seed in TEXTS:
        row = {"size": "mini", "method": method, "seed": str(seed), "metric": recipe.metric.name, "value": "30"}
        row |= {"seconds": "9", "passes": "1"}
        lines.append("\t".join(row.get(name, "") for name in COLUMNS))
    table.write_text("\n".join(lines) + "\n")
    write_significance(list(jobs.values()), [table])
    found = {(row["method"], int(row["seed"])): row["p_value"] for row in read_rows(table)}
    assert found.pop(("Baseline", 1)) == found.pop(("Baseline", 2)) == ""
    expected = {key: p_value(TEXTS[key], TEXTS["Baseline", key[1]]) for key in found}
    assert len(set(expected.values())) > 2
    assert {key: float(value) for key, value in found.items()} == pytest.approx(expected, rel=1e-3)
