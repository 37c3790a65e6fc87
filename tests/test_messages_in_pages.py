"""Messages that the pages of docs/ quote are those of the code."""

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, TEXT, blocks, needs_fairseq, prose

HOLE = None  # in a message: what is filled in
FORMATS = re.compile(r"%[-+]?\d*\.?\d*[sdrgf]|%\(\w+\)[rs]|\{[^{}]*\}")


@functools.cache
def templates() -> tuple[tuple[str | None, ...], ...]:
    """Texts in the code of the plugin and of what else is quoted of fairseq, Python and the tests; holes are None."""
    import argparse

    import fairseq

    folder = Path(fairseq.__file__).parent
    sources = [*(ROOT / "fairseq_sam").rglob("*.py"), Path(argparse.__file__)]
    sources += [ROOT / "tests" / "mode_table.py", ROOT / "tests" / "core" / "models.py"]
    sources += [folder / "trainer.py", folder / "logging" / "progress_bar.py", *(folder / "optim").glob("*.py")]
    found = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = _parts(node.left) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else []
            found.add(tuple(_with_holes([*parts, HOLE] if parts else _parts(node))))
    return tuple(parts for parts in found if sum(len(part or "") for part in parts) >= 10)


def _parts(node: ast.AST) -> list[str | None]:
    """A string of the code, with holes for what it is made with; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def _with_holes(parts: Sequence[str | None]) -> Iterator[str | None]:
    for part in parts:
        if part is HOLE:
            yield HOLE
            continue
        texts = FORMATS.split(part)
        for number, text in enumerate(texts):
            if number:
                yield HOLE
            if text:
                yield text.replace("%%", "%")


def fits(parts: Sequence[str | None], text: str, cut: bool) -> bool:
    """Whether a text is a message with its holes filled; if it is cut, whether one begins so."""
    if not parts:
        return not text
    head, rest = parts[0], parts[1:]
    if head is HOLE:
        return (cut and not rest) or any(fits(rest, text[i:], cut) for i in range(len(text) + 1))
    if text.startswith(head):
        return fits(rest, text[len(head) :], cut)
    return cut and bool(text) and head.startswith(text)


def is_a_message(line: str) -> bool:
    text, cut = line.removeprefix("fairseq_sam: error: "), line.endswith("…")
    text = text.removesuffix("…").rstrip()
    single = any(fits(parts, text, cut) for parts in templates())
    joined = [parts for parts in templates() if parts[0] is not HOLE and parts[0].startswith("; ")]
    return single or any(fits((*parts, *more), text, cut) for more in joined for parts in templates() if HOLE in parts)


def messages(name: str) -> list[str]:
    """Quoted messages of a page: fenced text, and longer sentences in code."""
    fenced = [line for block in blocks(name, "text") for line in block.splitlines() if line != "…"]
    spans = re.findall(r"`([^`]+)`", prose(TEXT[name]))
    spans = [" ".join(span.split()) for span in spans if len(span.split()) >= 6]
    commands = ("--", "python", "fairseq-", "pip ", "torchrun")
    return fenced + [span for span in spans if not span.startswith(commands) and " = " not in span]


@needs_fairseq
@pytest.mark.parametrize("name", PAGES)
def test_quoted_messages_are_those_of_the_code(name):
    for line in messages(name):
        for part in line.split(" … ") if " … " in line else [line]:
            assert is_a_message(part) or is_a_message(part + " …"), part


@needs_fairseq
def test_a_changed_message_is_noticed():
    line = "--sam-epsilon auto: 0.0607 in update 1 of 8 that it measures"
    assert is_a_message(line) and not is_a_message(line.replace("measures", "measured"))
    assert not is_a_message(line.removesuffix(" that it measures")) and is_a_message("gradients are Nan/Inf")
    assert sum(len(messages(name)) for name in PAGES) > 30
