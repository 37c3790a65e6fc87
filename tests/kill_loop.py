"""``kill -9`` at 20 random moments of a run: restarted by the same command, it ends where it would have ended.

    python3 user_dir_setup.py test tests/kill_loop.py -s

Not among the tests that run without this name: it takes some minutes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.adapter import runs

NUM_KILLS = 20
NUM_DURING_START = 4  # of them; the others are anywhere between the first update and the last
NUM_UPDATES = 240
LIMIT = 300  # seconds that one start may take to reach its moment

# Random state (dropout, fresh masks, noise), a Fisher mask that is being collected, a reused sharpness component, an
# exponential moving average, a schedule, several epochs, and a checkpoint at every other update.
FLAGS = [
    *runs.TRANSLATION, "--optimizer", "look_sam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0",
    "--sam-epsilon", "0.05", "--sam-mask", "fisher", "--sam-sparsity", "0.5", "--sam-fisher-samples", "60",
    "--sam-mask-interval", "25", "--sam-interval", "3", "--sam-dropout", "fresh", "--store-ema", "--ema-decay", "0.9",
    "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "20", "--update-freq", "2",
    "--max-update", str(NUM_UPDATES), "--save-interval-updates", "2", "--keep-interval-updates", "2",
    "--keep-last-epochs", "2",
]  # fmt: skip


def command(data: Path, folder: Path) -> list[str]:
    common = [flag for flag in runs.common_flags() if flag not in ("--disable-validation", "--log-format", "none")]
    flags = [*common, "--log-format", "json", "--log-interval", "1", "--save-dir", str(folder), *FLAGS]
    return [sys.executable, "-m", "fairseq_cli.train", str(data), *flags]


def num_updates(log: Path) -> int:
    """The last update that a log shows, 0 before the first."""
    for line in reversed(log.read_text(errors="replace").splitlines()):
        _, _, entry = line.partition(" | train_inner | ")
        if entry:
            return int(json.loads(entry)["num_updates"]) if entry.endswith("}") else 0
    return 0


class Start:
    """One start of the run."""

    def __init__(self, data: Path, folder: Path, log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command(data, folder), stdout=file, stderr=file, env=environment)

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait_for_update(self, update: int) -> None:
        deadline = time.monotonic() + LIMIT
        while num_updates(self.log) < update and self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.005)

    def finish(self) -> None:
        assert self.process.wait(LIMIT) == 0, self.log.read_text()[-2000:]


def states(folder: Path):
    """What must be equal at the end. Times and speeds are not, and the history has an entry for each start."""
    state = runs.load(folder / "checkpoint_last.pt")
    state["optimizer_history"] = state["optimizer_history"][-1]
    state["extra_state"] = {
        key: value for key, value in state["extra_state"].items() if key not in ("metrics", "previous_training_time")
    }
    return {key: state[key] for key in ("model", "last_optimizer_state", "optimizer_history", "extra_state")}


def test_twenty_kills(tmp_path):
    started = time.monotonic()
    data = runs.write_translation_data(tmp_path)
    folder, log = tmp_path / "killed", tmp_path / "log"
    whole = Start(data, tmp_path / "whole", tmp_path / "whole.log")
    whole.finish()
    rng = random.Random(7)
    moments = sorted(rng.randint(1, NUM_UPDATES - 2) for _ in range(NUM_KILLS - NUM_DURING_START))
    during_start = set(rng.sample(range(NUM_KILLS), NUM_DURING_START))
    for number in range(NUM_KILLS):
        start = Start(data, folder, log)
        if number in during_start:
            start.kill_after(rng.uniform(0.5, 8.0))
            where = "while it started"
        else:
            start.wait_for_update(moments.pop(0))
            start.kill_after(rng.uniform(0.0, 0.2))
            where = f"at update {num_updates(log)}"
        assert start.process.returncode == -signal.SIGKILL, log.read_text()[-2000:]
        last = folder / "checkpoint_last.pt"
        saved = runs.load(last)["optimizer_history"][-1]["num_updates"] if last.exists() else 0
        half = len(list(folder.glob("*.tmp"))) if folder.exists() else 0
        print(f"kill {number + 1:2} of {NUM_KILLS}: {where}; saved: {saved}; half-written files: {half}", flush=True)
    for _ in range(2):  # the second has nothing left to do
        Start(data, folder, log).finish()
    expected, found = states(tmp_path / "whole"), states(folder)
    method = found["last_optimizer_state"]["sharpness_aware"]
    assert found["optimizer_history"]["num_updates"] == NUM_UPDATES
    assert method["fisher"]["mask"] and method["component"] and "ema" in str(found["extra_state"].keys())
    for key in expected:
        assert runs.same_state(expected[key], found[key]), f"{key} differs"
    tensors, seconds = len(found["model"]), round(time.monotonic() - started)
    print(f"the final checkpoint equals the uninterrupted one: {tensors} tensors and their state ({seconds} s)")


def test_states_differ_where_a_weight_differs(tmp_path):
    """The comparison above can fail."""
    first = {"model": {"w": torch.zeros(3)}}
    assert not runs.same_state(first, {"model": {"w": torch.tensor([0.0, 0.0, 1e-38])}})
