"""The files of the repository, without what builds and runs leave beside them."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "docs", "examples", "fairseq_sam", "scripts", "tests")


def repository_files() -> list[Path]:
    """Those that git keeps or would keep; where there is no git, as in a source distribution, those of its folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        names = done.stdout.splitlines() if done.returncode == 0 else []
    except FileNotFoundError:
        names = []
    if "pyproject.toml" in names:
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return [path for path in (*ROOT.iterdir(), *below) if path.is_file()]
