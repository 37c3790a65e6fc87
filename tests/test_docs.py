"""Registry, cards, test cases and README agree; the README's commands exist."""

import re
from pathlib import Path

import pytest

from fairseq_sam import PRESETS
from fairseq_sam import __doc__ as table_of_contents
from fairseq_sam.__main__ import cost
from tests.core.models import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
CARDS = {path.stem: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
SETTLED = ("sam", "asam", "multistep_defense")  # their papers leave nothing open
SECTIONS = ("How to use", "Suggested settings", "Details", "Where it does not help", "Source")


def test_registry_cards_and_test_cases_agree():
    assert set(CARDS) == set(PRESETS) == set(SETTINGS)


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


def test_every_method_is_in_readme_and_table_of_contents():
    readme = (ROOT / "README.md").read_text()
    for name in PRESETS:
        assert f"docs/methods/{name}.md" in readme and f"``{name}``" in table_of_contents


def test_links_point_to_files():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]:
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


def test_every_flag_is_documented():
    pytest.importorskip("fairseq", reason="the flags are declared at fairseq's edge")
    from fairseq_sam.adapter.optimizers import SAM_FLAGS, base_names

    flags = (ROOT / "docs" / "flags.md").read_text()
    for name, _, _ in SAM_FLAGS:
        assert f"`--sam-{name.replace('_', '-')}`" in flags
    assert f"| `--base-optimizer` | {', '.join(base_names())} |" in flags
