"""``fairseq-sam landscape``: real interrupts, and which rows of a stopped command are kept."""

import os
import shutil
import signal
import time

import pytest

from fairseq_sam.__main__ import main
from tests.adapter import runs
from tests.adapter.test_analyses import column, mean_loss, model_and_valid, rows_of

pytestmark = pytest.mark.slow


def in_a_child(words):
    """Start the command in a process of its own."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with runs.quiet():
            status = main(words)
    finally:
        os._exit(status)


def wait_until_rows(table, number, child):
    for _ in range(2000):
        if table.exists() and len(rows_of(table)) >= number:
            return
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the command ended before it was stopped"
        time.sleep(0.01)
    raise AssertionError(f"{table} has no {number} rows after 20 seconds")


def test_a_stopped_command_goes_on(checkpoints, tmp_path):
    """After a SIGTERM and a SIGINT the table is there; in the end it is byte for byte that of a whole run."""
    words = ["landscape", checkpoints[1], "--before", checkpoints[0], "--points", "401"]
    words += ["--num-batches", "2", "--max-tokens", "150", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    table, number = tmp_path / "stopped" / "line.tsv", 1
    for sent, status in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)):
        child = in_a_child([*words, str(table.parent)])
        wait_until_rows(table, number, child)
        os.kill(child, sent)
        _, ended = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(ended) == status
        assert number <= len(rows_of(table)) < 401
        number = len(rows_of(table)) + 1
    assert main([*words, str(table.parent)]) == 0
    assert table.read_bytes() == (tmp_path / "whole" / "line.tsv").read_bytes()
