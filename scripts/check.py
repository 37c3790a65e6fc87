#!/usr/bin/env python3
"""Run what CI runs. The one list of steps: ``make``, ``.ci/run``, pre-commit and ``user_dir_setup.py test`` call it.

    python -m scripts.check               # all of them, as CI
    python -m scripts.check fast          # those of `make fast`: less than two minutes
    python -m scripts.check lint types    # those that are named

It goes on after a step that failed, and ends with the list of those.
"""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ON_ALL_CORES = ("-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")
# Their tests that are not slow need neither fairseq's data nor its trainer.
FAST_TESTS = ("tests/core", "tests/analysis", "tests/test_docs.py", "tests/test_habits.py", "tests/test_setup.py")


class Step(NamedTuple):
    """One thing that is checked.

    Attributes:
        what: it is for.
        words: module of Python and its arguments.
    """

    what: str
    words: tuple[str, ...]


STEPS = {
    "lint": Step("code and docstrings", ("ruff", "check", ".")),
    "format": Step("layout of the code", ("ruff", "format", "--check", ".")),
    "types": Step("types, strictly", ("mypy",)),
    "tests": Step("all tests, links of the pages among them", ("pytest", *ON_ALL_CORES)),
    "kills": Step("a run that is killed at random and goes on", ("pytest", "tests/kill_loop.py", "-s")),
    "docs": Step("the pages; a warning is an error", ("mkdocs", "build", "--strict")),
    "quick": Step("the tests that are quick", ("pytest", "-m", "not slow", *ON_ALL_CORES, *FAST_TESTS)),
}
ALL = ("lint", "format", "types", "tests", "kills", "docs")
FAST = ("lint", "format", "types", "quick")
OPTIONAL = "mkdocs"  # its step is left out where it is not installed, unless it was named


def main(arguments: Sequence[str]) -> int:
    """Run the steps that the command line names; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"fast, or some of: {', '.join(STEPS)}; default all")
    named = parser.parse_args(arguments).steps
    unknown = [name for name in named if name not in STEPS]
    if unknown and named != ["fast"]:
        parser.error(f"expected fast, or some of {', '.join(STEPS)}, got {unknown[0]!r}")
    names = FAST if named == ["fast"] else tuple(named) or ALL
    if not named and importlib.util.find_spec(OPTIONAL) is None:
        print(f"The pages are not built: pip install -r docs/requirements.txt brings {OPTIONAL}.", flush=True)
        names = tuple(name for name in names if STEPS[name].words[0] != OPTIONAL)
    failed = [text for text in map(_failure, names) if text]
    if failed:
        print("Failed: " + "; ".join(failed))
    return 1 if failed else 0


def _failure(name: str) -> str:
    """Run a step; say how it failed, or nothing."""
    words = STEPS[name].words
    print("$ " + " ".join(words), flush=True)
    status = subprocess.call([sys.executable, "-m", *words], cwd=ROOT)
    return f"{name}: {' '.join(words)} (exit status {status})" if status else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
