"""Registry, cards, test cases and README agree; the README's commands exist."""

import re
from pathlib import Path

import pytest

from fairseq_sam import PRESETS
from fairseq_sam import __doc__ as table_of_contents
from fairseq_sam.__main__ import cost
from fairseq_sam.core.guidance import WHEN_TO_USE
from fairseq_sam.core.method import SUMMARIES
from fairseq_sam.core.scales import SCALES
from scripts import make_docs
from tests.core.models import SETTINGS
from tests.pages import LINKED

ROOT = Path(__file__).resolve().parents[1]
CARDS = {path.stem: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
SETTLED = ("sam", "asam", "multistep_defense")  # their papers leave nothing open
SECTIONS = ("How to use", "Suggested settings", "Details", "Where it does not help", "Source")


def test_registry_cards_and_test_cases_agree():
    assert set(CARDS) == set(PRESETS) == set(SETTINGS)
    assert list(SUMMARIES) == list(WHEN_TO_USE) == list(PRESETS)
    for summary in SUMMARIES.values():
        assert re.search(r"\S \([A-Z]\w+ et al\. 20\d\d\)$", summary), "what it is, and its paper"


@pytest.mark.parametrize("name", PRESETS)
def test_card_states_the_preset(name):
    card, method = CARDS[name], PRESETS[name]
    assert all(f"**{section}.**" in card for section in SECTIONS)
    norm = "L∞" if method.norm == float("inf") else "L2"
    assert f"| scale, granularity | `{method.scale}`, `{method.granularity}` |" in card
    found = re.search(r"\| norm, ε, K \| (\S+), (\S+), (\d+) \|", card)
    assert found and (found[1], float(found[2]), int(found[3])) == (norm, method.epsilon, method.steps)
    assert f"| descent | `{method.descent}` |" in card
    assert f"| passes per update | {cost(method)} " in card
    assert f"| memory beside the base optimizer | {method.copies:g} cop" in card
    assert ("*Decided here, not in the paper.*" in " ".join(card.split())) == (name not in SETTLED), (
        "what the paper leaves open"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_card_begins_with_a_formula(name):
    begin, _, _ = CARDS[name].partition("<!-- method")
    spans = re.findall(r"`([^`]+)`", begin.partition("\n")[2])
    assert any(re.search(r"[‖∇Σ]|[=−].*[·/|]", span, re.DOTALL) for span in spans), spans


def test_every_method_is_in_readme_and_table_of_contents():
    readme = (ROOT / "README.md").read_text()
    for name in PRESETS:
        assert f"docs/methods/{name}.md" in readme and f"``{name}``" in table_of_contents


def test_links_point_to_files():
    for page in LINKED:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"


def test_corpora_of_the_recipes_are_explained():
    """Each folder that a recipe's page names is a row of examples/README.md, which the page links to."""
    examples = ROOT / "examples"
    rows = set(re.findall(r"^\| `(\w+)` \|", (examples / "README.md").read_text(), re.M))
    for recipe in examples.glob("*/recipe.yaml"):
        page = recipe.with_name("README.md").read_text()
        named = " ".join(re.findall(r"FOLDER holds ([^;:\n]*)", page))
        corpora = set(re.findall(r"\w+", named)) - {"and", "or", "some", "of", "them", "the", "text", "bart_small"}
        assert "](../README.md#corpora)" in page, recipe.parent.name
        assert corpora and corpora <= rows, recipe.parent.name


@pytest.mark.parametrize("page", make_docs.pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_generated_parts_are_what_the_command_makes(page):
    if page.stem == "flags":
        pytest.importorskip("fairseq", reason="the flags are declared at fairseq's edge")
    assert page.read_text() == make_docs.made(page), f"{page}: run python -m scripts.make_docs"


def test_a_part_that_was_changed_by_hand_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "methods" / "asam.md"
    page.parent.mkdir(parents=True)
    page.write_text(CARDS["asam"].replace("L2, 0.5, 1", "L2, 0.6, 1"))
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    monkeypatch.setattr(make_docs, "pages", lambda: [page])
    assert make_docs.main(["--check"]) == 1 and "0.6" in page.read_text()
    assert capsys.readouterr().out == "differs: docs/methods/asam.md\n"
    assert make_docs.main([]) == 0 and page.read_text() == CARDS["asam"]
    assert make_docs.main(["--check"]) == 0
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"asam\.md: expected the lines <!-- method: made by"):
        make_docs.main([])


def test_the_table_of_methods_has_paper_cost_and_use():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| [`")]
    assert len(rows) == len(PRESETS)
    what = "LookSAM: SAM every n-th update, its sharpness component between"
    price = "2 in 1 of 5 updates, else 1 (mean 1.2) | 3"
    link = "[`look_sam`](docs/methods/look_sam.md)"
    assert f"| {link} | {what} | Liu et al. 2022 | {price} | {WHEN_TO_USE['look_sam']} |" in rows


@pytest.mark.parametrize(
    ("axis", "default"),
    [
        ("epsilon", "the method's"), ("steps", "the method's"), ("interval", "the method's"), ("gradient", "`mean`"),
        ("max_scale", "1000"), ("asam_eta", "0"), ("sparsity", "0.9 (`fisher`), 0.5 (`random`)"),
        ("delta_eta", "1e-4 (`weighted`)"), ("end_epoch", "none"), ("exclude", "none"), ("gradient_log", "none"),
    ],
)  # fmt: skip
def test_defaults_of_axes(axis, default):
    assert make_docs.default_of(axis) == default


def test_every_flag_is_documented():
    pytest.importorskip("fairseq", reason="the flags are declared at fairseq's edge")
    from fairseq_sam.adapter.flags import SAM_FLAGS, base_names
    from fairseq_sam.adapter.help import flags_help
    from fairseq_sam.analysis.epsilon import FRACTION

    page, shown = (ROOT / "docs" / "flags.md").read_text(), "".join(flags_help().split())
    for name, _, text in SAM_FLAGS:
        assert f"| `--sam-{name.replace('_', '-')}` |" in page
        assert "".join(text.split()) in shown, "the page and the help have one text"
    assert f"| `--base-optimizer` | {', '.join(base_names())} |" in page
    assert f"| `--sam-rise` | a number | {FRACTION} |" in page and f">0(default:{FRACTION})" in shown
    assert all(f"| `{scale}` |" in page for scale in SCALES), "the formulas of T"
