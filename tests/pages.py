"""The README and the pages of docs/ that are written by hand, as tests read them."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ("README", "index", "choosing", "your-command", "checkpoints", "multi-gpu", "plain-pytorch", "adding-a-method",
         "troubleshooting", "watching", "gallery")  # fmt: skip
TEXT = {name: next(each / f"{name}.md" for each in (DOCS, ROOT) if (each / f"{name}.md").is_file()).read_text("utf-8")
        for name in PAGES}  # fmt: skip
LINKED = [page for folder in ("", "docs/**/", "examples/**/", "benchmarks/") for page in ROOT.glob(f"{folder}*.md")]
needs_fairseq = pytest.mark.skipif(importlib.util.find_spec("fairseq") is None, reason="fairseq is not installed")


def blocks(name: str, language: str) -> list[str]:
    """Fenced code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT[name], re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
