"""``fairseq-sam landscape``: real interrupts, and which rows of a stopped command are kept."""

import os
import shutil
import signal
import time

import pytest

from fairseq_sam.__main__ import main
from tests.adapter import runs
from tests.adapter.test_analyses import column, rows_of

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


def test_rows_of_other_data_are_not_kept(checkpoints, translation_data, tmp_path):
    """What was measured says whether rows fit: not where the data lie, but the sentences and their batches."""
    words = ["landscape", checkpoints[1], "--before", checkpoints[0], "--points", "3", "--out", str(tmp_path)]
    table, data = tmp_path / "line.tsv", tmp_path / "data"
    shutil.copytree(translation_data, data)
    for is_kept, more in (
        (True, ["--data", str(data)]),
        (False, ["--max-tokens", "150"]),
        (False, ["--batch-size", "3"]),
        (False, ["--subset", "test"]),
        (False, ["--num-batches", "1", "--max-tokens", "150"]),
    ):
        assert main(words) == 0
        rows = rows_of(table)
        table.write_text(table.read_text().replace(rows[1]["loss"], "123.456"))
        assert main([*words, *more]) == 0
        assert (rows_of(table)[1]["loss"] == "123.456") == is_kept, more
        table.unlink()
    assert main([*words, "--data", str(data)]) == 0
    before = column(rows_of(table), "loss")
    for file in data.glob("test.*"):
        file.replace(data / file.name.replace("test", "valid"))
    assert main([*words, "--data", str(data)]) == 0
    after = column(rows_of(table), "loss")
    assert all(first != second for first, second in zip(before, after, strict=True))
