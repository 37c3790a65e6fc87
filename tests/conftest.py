"""One thread for all tests and the commands they start: with tiny models, more threads only wait for each other."""

import os

import pytest
import torch

from tests import mode_table

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seed():
    """Random choices are the same in every run of the tests."""
    torch.manual_seed(0)


# -- the table of training modes: collected from all workers, written on request, else compared ----------------------

RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--write-mode-table", action="store_true", help="write docs/modes.md from what the tests showed")


def pytest_configure(config):
    config.stash[RESULTS] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    skipped_for_gpu = report.when == "setup" and report.skipped and item.get_closest_marker("gpu")
    if skipped_for_gpu or (report.when == "call" and report.passed):
        report.user_properties += mode_table.record(item)


class _Collector:
    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.skipped:
            self.config.stash[RESULTS] += mode_table.results_of(report.user_properties)


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Collector(session.config))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    results = config.stash[RESULTS]
    if hasattr(config, "workerinput") or exitstatus != 0 or config.option.collectonly:
        return
    missing = mode_table.missing(results)
    is_whole = config.args == config.getini("testpaths") and not (config.option.keyword or config.option.markexpr)
    problem = ""
    if config.getoption("--write-mode-table"):
        if missing:
            problem = f"docs/modes.md is not written: nothing shows {missing}"
        else:
            mode_table.DOCUMENT.write_text(mode_table.render(results))
    elif is_whole and missing:
        problem = f"no test shows anything of these modes and presets: {missing}"
    elif is_whole and mode_table.DOCUMENT.read_text() != mode_table.render(results):
        problem = f"docs/modes.md is not what the tests showed: {mode_table.COMMAND}"
    if problem:
        print(f"\n{problem}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
