"""What is built and installed: contents of wheel and source distribution, commands, one version. Nothing is fetched."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

from fairseq_sam import __version__
from tests.files import ROOT, repository_files

# The fields of CFF 1.2.0 for software that are used here; its schema is not at hand offline.
CITATION_FIELDS = {
    "cff-version", "type", "title", "message", "abstract", "authors", "version", "date-released", "license", "keywords",
}  # fmt: skip


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository, in which building leaves its files."""
    pytest.importorskip("setuptools", minversion="77", reason="the license's form is that of setuptools 77 and newer")
    folder = tmp_path_factory.mktemp("source")
    for path in repository_files():
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder)
    run(*pip, source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed package; the environment that its commands need."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder, {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = message_from_bytes(archive.read(f"fairseq_sam-{__version__}.dist-info/METADATA"))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fairseq_sam").rglob("*.py")}
    assert len(modules) > 80
    assert {name for name in names if ".dist-info/" not in name} == {*modules, "fairseq_sam/py.typed"}
    assert f"fairseq_sam-{__version__}.dist-info/licenses/LICENSE" in names
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "MIT"
    assert {"docs", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert "torch>=2.6" in metadata.get_all("Requires-Dist")
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    for version in ("3.10", "3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in classifiers


@pytest.mark.slow
def test_the_source_distribution_holds_the_repository(source, tmp_path):
    """Tests, recipes, pages and what CI runs are in it, so that it can be checked as the repository is; it installs."""
    files = {path.relative_to(ROOT).as_posix() for path in repository_files()}
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", program, cwd=source)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert files - packed == set(), "files that the source distribution lacks; MANIFEST.in says what is in it"
    assert {"PKG-INFO", "tests/test_packaging.py", ".ci/run", "examples/demo/run.py", "docs/flags.md"} <= packed
    target = tmp_path / "installed"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
    )
    run(*pip, path)
    kinds = "py.typed", "*.py"
    found = {each.relative_to(target).as_posix() for kind in kinds for each in (target / "fairseq_sam").rglob(kind)}
    assert found == {name for name in files if name.startswith("fairseq_sam/") and name.endswith((".py", "py.typed"))}


@pytest.mark.slow
@pytest.mark.parametrize("command", [("bin/fairseq-sam",), ("-m", "fairseq_sam")], ids=["script", "module"])
def test_the_installed_command_prints_its_folder(installed, tmp_path, command):
    folder, environment = installed
    first = [sys.executable] if command[0] == "-m" else [sys.executable, folder / command[0]]
    words = command if command[0] == "-m" else ()
    shown = run(*first, *words, "path", cwd=tmp_path, env=environment)
    assert shown == f"{(folder / 'fairseq_sam').resolve()}\n"
    assert (Path(shown.strip()) / "py.typed").is_file()


@pytest.mark.slow
def test_path_and_methods_are_shown_without_fairseq(installed, tmp_path):
    folder, environment = installed
    program = """
import sys
sys.modules["fairseq"] = None
from fairseq_sam.__main__ import main
main(["path"])
main(["ga_sam"])
"""
    shown = run(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    assert shown.splitlines()[0] == str((folder / "fairseq_sam").resolve())
    assert "--sam-scale gradient_strength" in shown


@pytest.mark.slow
def test_the_printed_folder_is_a_user_dir(installed, tmp_path):
    pytest.importorskip("fairseq", reason="it reads --user-dir")
    folder, _ = installed
    program = """
import sys
from argparse import Namespace
from fairseq import optim, utils
utils.import_user_module(Namespace(user_dir=sys.argv[1]))
import fairseq_sam
print(fairseq_sam.__file__, "ga_sam" in optim.OPTIMIZER_REGISTRY)
"""
    shown = run(sys.executable, "-c", program, folder / "fairseq_sam", cwd=tmp_path)
    assert shown.split() == [str((folder / "fairseq_sam" / "__init__.py").resolve()), "True"]


def test_versions_agree():
    changelog, citation = (ROOT / "CHANGELOG.md").read_text(), yaml.safe_load((ROOT / "CITATION.cff").read_text())
    number, date = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)[0]
    assert number == citation["version"] == __version__
    assert date == str(citation["date-released"])
    assert f"version = {{{__version__}}}" in (ROOT / "README.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and not re.search(r"^version = \"", project, re.M)


def test_the_citation_has_the_form_of_its_schema():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation) <= CITATION_FIELDS
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["license"] == "MIT"
    assert all(set(author) == {"name"} for author in citation["authors"]), "no persons"


def test_the_changelog_has_the_form_of_keep_a_changelog():
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == "[Unreleased]" and all(re.fullmatch(r"\[[\d.]+\] - [\d-]{10}", head) for head in heads[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}
    assert set(re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)) <= kinds


def test_the_extra_for_pages_is_their_requirement():
    (wanted,) = re.findall(r"^docs = \[\"(.*)\"\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    lines = (ROOT / "docs" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [wanted]
