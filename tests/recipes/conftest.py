"""How the recipes' commands run in tests."""

import subprocess
from types import SimpleNamespace

import pytest

from tests import in_process


@pytest.fixture
def in_this_process(monkeypatch):
    """Commands run in this process: those that prepare, and those of a table's runs."""
    from scripts.recipes import runner

    monkeypatch.setattr(subprocess, "run", in_process.run)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(run=in_process.run, Popen=in_process.Process))
