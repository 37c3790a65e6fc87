"""``fairseq-sam landscape``: real interrupts, and which rows of a stopped command are kept."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_sam.__main__ import main
from fairseq_sam.analysis.objective import Objective
from fairseq_sam.commands.landscape import levels_of, plot_surface
from tests.adapter import runs
from tests.adapter.test_analyses import column, is_plot, rows_of
from tests.adapter.test_tasks import RECIPES

pytestmark = pytest.mark.slow


def in_a_child(words):
    """Start the command in a process of its own, in which each point takes a hundredth of a second at least."""
    child = os.fork()
    if child:
        return child
    status, loss = 70, Objective.loss
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever handler an earlier test has left
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    try:
        Objective.loss = lambda self: time.sleep(0.01) or loss(self)
        with runs.quiet():
            status = main(words)
    finally:
        os._exit(status)


def wait_until_rows(table, number, child, seconds=20):
    for _ in range(100 * seconds):
        if table.exists() and len(rows_of(table)) >= number:
            return
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the command ended before it was stopped"
        time.sleep(0.01)
    raise AssertionError(f"{table} has no {number} rows after {seconds} seconds")


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


def test_a_scheduler_s_signal_ends_a_command_as_an_interrupt_does(checkpoints, tmp_path):
    words = ["landscape", checkpoints[1], "--before", checkpoints[0], "--points", "100001", "--num-batches", "2"]
    command = [sys.executable, "-m", "fairseq_sam", *words, "--max-tokens", "150", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=runs.ROOT)
    wait_until_rows(tmp_path / "line.tsv", 2, running.pid, seconds=240)  # it imports fairseq first
    running.terminate()
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and errors.endswith("stopped\n"), errors


def test_nothing_but_progress_is_on_standard_error(checkpoints, tmp_path):
    words = [checkpoints[0], "--points", "2", "--num-batches", "1", "--max-tokens", "150", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_sam", "landscape", *words], capture_output=True, text=True, cwd=runs.ROOT
    )
    assert done.returncode == 0 and done.stdout.startswith("written: ")
    assert [line[:28] for line in done.stderr.splitlines()] == ["landscape of adam: 4 of 4, 0"], done.stderr


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
        assert len(rows_of(table)) == (3 if is_kept else 6), "rows of other settings stay behind those of these"
        table.unlink()
    assert main([*words, "--data", str(data)]) == 0
    before = column(rows_of(table), "loss")
    for file in data.glob("test.*"):
        file.replace(data / file.name.replace("test", "valid"))
    assert main([*words, "--data", str(data)]) == 0
    after = column(rows_of(table)[:3], "loss")
    assert column(rows_of(table)[3:], "loss") == before
    assert all(first != second for first, second in zip(before, after, strict=True))


def classification_loss(path, weights):
    """Bits per sentence of the validation split, for a classifier with other weights."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path])
    model.load_state_dict(weights)
    task.load_dataset("valid")
    (batch,) = task.get_batch_iterator(task.dataset("valid"), max_sentences=100).next_epoch_itr(shuffle=False)
    with torch.no_grad():
        inputs = {**batch["net_input"], "features_only": True}
        logits, _ = model.eval()(**inputs, classification_head_name="head")
    return float(torch.nn.functional.cross_entropy(logits, batch["target"].reshape(-1))) / math.log(2)


def test_from_a_pretrained_encoder(classification_data, tmp_path, capsys):
    """Which has no head, and the names of an old fairseq: the head is held constant, and that is said."""
    flags = [*RECIPES["sentence_prediction"][1], "--optimizer", "adam", "--max-update", "4"]
    state = runs.train(classification_data, tmp_path / "tuned", *flags)
    path, after = str(tmp_path / "tuned" / "checkpoint_last.pt"), state["model"]
    noise = {name: 0.1 * torch.randn_like(weight) for name, weight in after.items()}
    encoder = {name: weight + noise[name] for name, weight in after.items() if "classification_heads" not in name}
    encoder["encoder.lm_head.weight"] = encoder["encoder.sentence_encoder.embed_tokens.weight"]  # tied
    old = {name.replace("encoder.", "decoder.", 1): weight for name, weight in encoder.items()}
    torch.save({**state, "model": old, "last_optimizer_state": None}, tmp_path / "model.pt")
    words = ["landscape", path, "--before", str(tmp_path / "model.pt"), "--points", "3", "--out", str(tmp_path)]
    assert main(words) == 0
    found = column(rows_of(tmp_path / "line.tsv"), "loss")
    assert found[0] == pytest.approx(classification_loss(path, {**after, **encoder}), rel=1e-4)
    assert found[1] == pytest.approx(classification_loss(path, after), rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-2)
    said = f"tuned: held constant on the line, since {tmp_path / 'model.pt'} lacks them: "
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(said)]
    heads = {name for name in after if "classification_heads" in name}
    assert set(line.removeprefix(said).split(", ")) == heads and len(heads) == 4
    shorter = {name: weight[..., :3] for name, weight in old.items()}
    torch.save({**state, "model": shorter}, tmp_path / "model.pt")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "error: tuned: expected encoder." in error and "must be excluded (--exclude)" in error


def test_levels_are_round_and_those_of_most_of_the_losses():
    assert levels_of([1.0, 2.0, 2.5, 3.1, 3.9, *[4.0] * 6, 1e9]) == pytest.approx([1 + 0.25 * i for i in range(13)])
    assert levels_of([1.0, float("inf"), float("nan"), 2.0])[-1] < 2.2
    assert len(levels_of([3.0, 3.0])) > 1 and len(levels_of([float("nan")])) > 1


def test_a_surface_with_losses_that_are_not_finite(tmp_path):
    losses = {("1", "1"): "inf", ("-1", "1"): "nan"}
    rows = [
        {"model": model, "x": x, "y": y, "loss": losses.get((x, y), str(float(x) ** 2 + float(y) ** 2))}
        for model in ("a_$b$", "_c")
        for x in ("-1", "0", "1")
        for y in ("-1", "0", "1")
    ]
    plot_surface(rows, tmp_path / "surface.png")
    assert is_plot(tmp_path / "surface.png")
