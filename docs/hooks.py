"""Lets links of the pages that leave docs/ work on the site of mkdocs as they do on GitHub and on the disk.

Markdown files and pictures outside of docs/ that a page links to, such as ../README.md and the recipes' pages, become
pages of the site under repository/. Links to anything else outside, such as source files, go to the repository where
`repo_url` is set, and are plain text where it is not.
"""

import os.path
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = "repository"  # folder of the site for what is not in docs/
FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<before>!?\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\()(?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
ROW = re.compile(r"^\|.*$", re.MULTILINE)
SHOWN = (".md", ".png", ".svg")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures outside of docs/ that are linked to, and those that these link to."""
    waiting = sorted(path for path in DOCS.rglob("*.md"))
    known = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            if target in known or target.suffix not in SHOWN or target.is_relative_to(DOCS):
                continue
            known.add(target)
            uri = f"{OUTSIDE}/{target.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite a page's links to what is elsewhere on the site than on the disk."""
    source = _on_disk(page.file.src_uri)

    def place(found: re.Match[str]) -> str:
        target = _target(source, found["target"])
        if target is None:
            return found[0]
        uri = _on_site(target)
        if uri is not None and files.get_file_from_path(uri) is not None:
            relative = os.path.relpath(uri, os.path.dirname(page.file.src_uri)).replace(os.sep, "/")
            return f"{found['before']}{relative}{found['anchor'] or ''})"
        if config.repo_url:
            return f"{found['before']}{config.repo_url.rstrip('/')}/blob/HEAD/{target.relative_to(ROOT).as_posix()})"
        return found["text"]

    return _outside_code(markdown, lambda text: ROW.sub(_bars, LINK.sub(place, text)))


def _on_disk(uri: str) -> Path:
    inside = uri.removeprefix(f"{OUTSIDE}/")
    return DOCS / uri if inside == uri else ROOT / inside


def _on_site(path: Path) -> str | None:
    """The site's address of a file, None if only the repository has it."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}" if path.suffix in SHOWN else None


def _targets(page: Path) -> Iterator[Path]:
    for text in FENCE.split(page.read_text(encoding="utf-8"))[::2]:
        for found in LINK.finditer(text):
            target = _target(page, found["target"])
            if target is not None:
                yield target


def _target(page: Path, link: str) -> Path | None:
    """What a page's link names, for a folder its README; None for an address, and for what is not there."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = Path(os.path.normpath(page.parent / unquote(link)))
    path = path / "README.md" if (path / "README.md").is_file() else path
    return path if path.exists() and path.is_relative_to(ROOT) else None


def _bars(row: re.Match[str]) -> str:
    """Write the bars in a row's code as mkdocs wants them; GitHub wants a backslash before each."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), row[0])


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = FENCE.split(markdown)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))
