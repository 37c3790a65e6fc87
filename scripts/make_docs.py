#!/usr/bin/env python3
"""Write the parts of pages that follow from the code: tables of methods, of flags, of results, of checks.

    python -m scripts.make_docs            # writes them
    python -m scripts.make_docs --check    # only says which pages differ, and ends with status 1 if any does

A page has the part between the lines ``<!-- NAME: made by scripts/make_docs.py -->`` and ``<!-- end of NAME -->``; what
is around them is written by hand. The tables of docs/results.md and of the recipes are scripts/make_table.py's, that of
docs/modes.md is written by the tests.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fairseq_sam.__main__ import cost, own_settings
from fairseq_sam.core.axes import CHOICES, SETTINGS
from fairseq_sam.core.guidance import WHEN_TO_USE
from fairseq_sam.core.method import PRESETS, SUMMARIES, Method
from scripts.check import ALL, FAST, STEPS
from scripts.recipes.marks import put_between
from scripts.recipes.tables import markdown
from scripts.recipes.verdicts import verdicts

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- {}: made by scripts/make_docs.py -->", "<!-- end of {} -->"
KINDS = {int: "an integer", float: "a number", str: "text", Any: "a number or a word"}
IN_FIRST_ROWS = ("--sam-scale", "--sam-granularity", "--sam-norm", "--sam-epsilon", "--sam-steps", "--sam-descent")

Part = Callable[[], str]


def main(arguments: Sequence[str]) -> int:
    """Write all parts, or say which pages are not what they would be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that differ")
    only_check = parser.parse_args(arguments).check
    differing = []
    for path in pages():
        before, after = path.read_text(encoding="utf-8"), made(path)
        if before != after:
            differing.append(path)
            if not only_check:
                path.write_text(after, encoding="utf-8")
    for path in differing:
        print(f"{'differs' if only_check else 'written'}: {path.relative_to(ROOT)}")
    return 1 if only_check and differing else 0


def parts_of(path: Path) -> dict[str, Part]:
    """The parts of a page by name.

    Args:
        path: one of ``pages()``.
    """
    name = path.relative_to(ROOT).as_posix()
    if path.parent.name == "methods":
        return {"method": lambda: method_part(path.stem)}
    return {
        "README.md": {"methods": methods_part, "results": results_part},
        "CONTRIBUTING.md": {"checks": checks_part},
        "docs/flags.md": {"flags": flags_part},
    }[name]


def pages() -> list[Path]:
    """All pages with such parts."""
    cards = [ROOT / "docs" / "methods" / f"{name}.md" for name in PRESETS]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "flags.md", *cards]


def made(path: Path) -> str:
    """A page's text as it should be.

    Args:
        path: one of ``pages()``.

    Raises:
        ValueError: if the page lacks the marks.
    """
    text = path.read_text(encoding="utf-8")
    for name, part in parts_of(path).items():
        try:
            text = put_between(text, BEGIN.format(name), END.format(name), part())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return text


# -- methods ---------------------------------------------------------------------------------------------------------


def methods_part() -> str:
    """The README's table: a row for each preset."""
    rows = [["`--optimizer`", "what it is", "paper", "passes", "memory", "when to use it"]]
    for name, method in PRESETS.items():
        what, _, paper = SUMMARIES[name].removesuffix(")").rpartition(" (")
        link = f"[`{name}`](docs/methods/{name}.md)"
        rows.append([link, _typeset(what), paper, cost(method), f"{method.copies:g}", _typeset(WHEN_TO_USE[name])])
    return markdown(rows)


def method_part(name: str) -> str:
    """The table at the head of a card: a preset's choices and its cost.

    Args:
        name: the preset.
    """
    method = PRESETS[name]
    own = {flag: value for flag, value in own_settings(name).items() if flag not in IN_FIRST_ROWS}
    norm = "L∞" if method.norm == float("inf") else f"L{method.norm:g}"
    copies = "copy" if method.copies == 1 else "copies"
    rows = [
        ["axis", "value"],
        ["scale, granularity", f"`{method.scale}`, `{method.granularity}`"],
        ["norm, ε, K", f"{norm}, {_number(method.epsilon)}, {method.steps}"],
        *([f"`{flag}`", f"`{value}`"] for flag, value in own.items()),
        ["descent", f"`{method.descent}`"],
        ["passes per update", cost(method)],
        ["memory beside the base optimizer", f"{method.copies:g} {copies} of the weights"],
    ]
    return markdown(rows)


# -- flags -----------------------------------------------------------------------------------------------------------


def flags_part() -> str:
    """The tables of flags by axis, with the texts of ``fairseq-train --help``."""
    from fairseq_sam.adapter.flags import FLAGS_BY_AXIS, base_names

    text = "updates the weights; its own flags (`--adam-betas`, `--momentum`, …) and their defaults are unchanged"
    head = ["values", "default", "what it does"]
    tables = [markdown([["flag", *head], ["`--base-optimizer`", ", ".join(base_names()), "adam", text]])]
    for axis, flags in FLAGS_BY_AXIS.items():
        rows = [[axis, *head]]
        for flag in flags:
            what, default = _without_default(flag.help)
            values = ", ".join(f"`{choice}`" for choice in CHOICES.get(flag.name, ())) or KINDS[flag.type]
            shown = f"`--sam-{flag.name.replace('_', '-')}`"
            rows.append([shown, values, _typeset(default) or default_of(flag.name), _typeset(what)])
        tables.append(markdown(rows))
    return "\n".join(tables)


def default_of(name: str) -> str:
    """The value of an axis where its flag is not given, in words.

    Args:
        name: of the axis. One that is none of a method has no value.
    """
    if name in SETTINGS:
        return ", ".join(f"{_number(value)} (`{choice}`)" for choice, value in SETTINGS[name].defaults.items())
    if name not in {field.name for field in fields(Method)}:
        return "none"
    first, *others = {getattr(method, name) for method in PRESETS.values()}
    if others:
        return "the method's"
    return "none" if first in (None, "") else f"`{first}`" if isinstance(first, str) else _number(first)


def _without_default(text: str) -> tuple[str, str]:
    """Cut ``(default: …)`` off a text."""
    found = re.search(r"\s*\(default: (.*?)\)$", text)
    return (text[: found.start()], found[1]) if found else (text, "")


# -- results and checks ----------------------------------------------------------------------------------------------


def results_part() -> str:
    """The README's table of results."""
    return markdown(verdicts())


def checks_part() -> str:
    """The steps of ``make check`` and of ``make fast``."""
    rows = [["step", "command", "what is checked", "part of"]]
    for name, step in STEPS.items():
        targets = [f"`make {target}`" for target, names in (("check", ALL), ("fast", FAST)) if name in names]
        rows.append([name, f"`{shlex.join(step.words)}`", step.what, ", ".join(targets)])
    return markdown(rows)


def _typeset(text: str) -> str:
    """A text of the command line as a page has it: flags in code, signs in place of words."""
    text = re.sub(r"(?<![\w-])(--[a-z][\w-]*)", r"`\1`", text)
    text = re.sub(r"(?<![\w-])epsilon(?![\w-])", "ε", text)
    return text.replace("||", "‖").replace(">=", "≥").replace("delta-SAM", "δ-SAM")


def _number(value: float) -> str:
    """A number without needless zeros: 1000, 0.05, 5e-3, 1e-4."""
    return f"{value:g}" if value == 0 or value >= 0.01 else re.sub(r"\.?0*e-0*", "e-", f"{value:.6e}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
