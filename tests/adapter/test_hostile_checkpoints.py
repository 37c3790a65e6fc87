"""Checkpoints that were made to do harm, that are damaged, or that are of another version or method."""

import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch

from fairseq_sam._version import __version__
from fairseq_sam.adapter.errors import CheckpointError, ConfigurationError
from fairseq_sam.adapter.state import STATE_FORMAT
from tests.adapter import runs

FLAGS = [*runs.TRANSLATION, "--optimizer", "look_sam", "--sam-mask", "fisher", "--sam-sparsity", "0.5",
         "--sam-fisher-samples", "500"]  # fmt: skip


class Command:
    """Runs a command when it is unpickled by a loader that is not safe."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class Evaluated(Command):
    def __reduce__(self):
        return eval, (f"open({self.mark!r}, 'w').close()",)


class Rebuilt(Command):
    """Through a function that torch's safe loader does allow, with an argument that it does not."""

    def __reduce__(self):
        return torch._utils._rebuild_parameter, (Command(self.mark), True, {})


class Unknown:
    """A class that no fairseq checkpoint holds."""


@pytest.fixture(scope="module")
def saved(translation_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    runs.train(translation_data, folder, *FLAGS, "--max-update", "3")
    return folder / "checkpoint_last.pt"


def put(state, path, value):
    """Set ``state[path[0]][path[1]]...``."""
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = value


PLACES = [("surprise",), ("extra_state", "surprise"), ("model", "encoder.version"), ("cfg", "task"),
          ("last_optimizer_state", "sharpness_aware", "fisher"), ("last_optimizer_state", "state", 0)]  # fmt: skip


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("harm", [Command, Evaluated, Rebuilt, Unknown])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: str(place[-1]))
def test_nothing_in_a_pickle_is_executed(translation_data, saved, tmp_path, place, harm, is_zip):
    """Wherever it is: resuming is refused in one line that names it, and the file stays as it is."""
    state, mark = torch.load(saved), tmp_path / "was_run"
    put(state, place, harm() if harm is Unknown else harm(mark))
    bad = tmp_path / "checkpoint_last.pt"
    torch.save(state, bad, _use_new_zipfile_serialization=is_zip)
    content = bad.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        runs.train(translation_data, tmp_path, *FLAGS, "--max-update", "4")
    message = str(caught.value)
    assert str(bad) in message and "\n" not in message and "weights_only" not in message
    assert any(name in message for name in ("system", "eval", "Unknown")) and "not loaded" in message
    assert not mark.exists() and bad.read_bytes() == content


def damaged(kind, saved, path):
    content = saved.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"not a checkpoint\n" * 100)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps({"model": {}, "x": Command(path.with_name("was_run"))}))
    elif kind == "one bit of a weight":
        with zipfile.ZipFile(saved) as archive:
            weight = archive.read(next(name for name in archive.namelist() if name.endswith("/data/0")))
        place = content.index(weight) + len(weight) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif kind == "zeros at its end":
        path.write_bytes(content[:-3000] + bytes(3000))
    else:
        torch.save({"a list": [1, 2]} if kind == "another dictionary" else [1, 2], path)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "empty",
        "text",
        "bare pickle",
        "one bit of a weight",
        "zeros at its end",
        "another dictionary",
        "a list",
    ],
)
def test_a_damaged_file_is_refused_with_a_remedy(translation_data, saved, tmp_path, kind):
    damaged(kind, saved, tmp_path / "checkpoint_last.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint_last\.pt .*(--restore-file|trust)") as caught:
        runs.train(translation_data, tmp_path, *FLAGS, "--max-update", "4")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_file_with_changed_bytes_never_ends_in_a_traceback(saved, tmp_path, is_zip):
    """60 files with a byte changed, 20 cut short: each is refused in one line, or loads, and what it holds is whole."""
    whole = torch.load(saved)
    torch.save(whole, tmp_path / "whole.pt", _use_new_zipfile_serialization=is_zip)
    content, rng, refused = (tmp_path / "whole.pt").read_bytes(), random.Random(0), 0
    for number in range(80):
        place = rng.randrange(min(len(content), 40_000)) if number % 2 else rng.randrange(len(content))
        changed = content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
        (tmp_path / "changed.pt").write_bytes(changed if number < 60 else content[:place])
        try:
            found = runs.load(tmp_path / "changed.pt")
            assert not is_zip or runs.same_state(found["model"], whole["model"])
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and "changed.pt" in str(error)
    assert refused >= 20


CONTENTS = {
    "newer": (
        ("format",),
        STATE_FORMAT + 1,
        rf"by fairseq_sam {__version__} in format 2.*reads formats up to 1.*newer",
    ),
    "no number": (("format",), "two", "format two"),
    "no dictionary": ((), [1, 2], "is list, not a dict"),
    "component": (("component",), [1], "component is list"),
    "component's content": (("component",), {"w": "x"}, "component is dict of other things"),
    "mask": (("fisher", "mask"), torch.ones(3), "fisher.mask is Tensor"),
    "mask's content": (("fisher", "mask"), {"w": 3}, "fisher.mask is dict of other things"),
    "Fisher": (("fisher",), "x", "fisher is str"),
    "count": (("num_skipped",), "many", "num_skipped is str"),
    "instances": (("fisher", "num_instances"), None, "fisher.num_instances is NoneType"),
    "preset": (("preset",), 7, "preset is int"),
    "negative format": (("format",), -1, "format -1"),
    "negative count": (("fisher", "num_instances"), -5, "fisher.num_instances is -5"),
    "mask of numbers": (("fisher", "mask"), {"w": torch.full((3,), 1e4)}, "fisher.mask holds other numbers than true"),
    "component with NaN": (("component",), {"w": torch.tensor([torch.nan])}, "component holds numbers that are not"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_state_that_no_version_writes_is_refused(translation_data, saved, tmp_path, case):
    path, value, message = CONTENTS[case]
    state = torch.load(saved)
    put(state, ("last_optimizer_state", "sharpness_aware", *path), value)
    torch.save(state, tmp_path / "checkpoint_last.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        runs.train(translation_data, tmp_path, *FLAGS, "--max-update", "4")
    assert "--reset-optimizer" in str(caught.value) and "\n" not in str(caught.value)
    more = runs.train(translation_data, tmp_path, *FLAGS, "--max-update", "4", "--reset-optimizer")
    assert more["last_optimizer_state"]["sharpness_aware"]["format"] == STATE_FORMAT


def test_a_state_without_number_is_migrated(translation_data, saved, tmp_path):
    """Checkpoints from before there was one go on exactly."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        state = torch.load(saved)
        if name == "old":
            for key in ("format", "version", "preset"):
                del state["last_optimizer_state"]["sharpness_aware"][key]
        torch.save(state, tmp_path / name / "checkpoint_last.pt")
    old, new = (runs.train(translation_data, tmp_path / name, *FLAGS, "--max-update", "5") for name in ("old", "new"))
    assert runs.same_bits(old["model"], new["model"])
    assert runs.same_state(old["last_optimizer_state"], new["last_optimizer_state"])


HALF = ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4", *FLAGS]


def test_another_preset_s_state(translation_data, tmp_path, caplog):
    """fairseq refuses it in fp32 by the optimizer's name; in fp16 it does not see it, and the plugin migrates it."""
    runs.train(translation_data, tmp_path / "fp32", *FLAGS, "--max-update", "2")
    other = [*FLAGS[: FLAGS.index("--optimizer")], "--optimizer", "ga_sam", "--max-update", "4"]
    with pytest.raises(AssertionError, match=r"--reset-optimizer.*LookSamOptimizer vs GaSamOptimizer"):
        runs.train(translation_data, tmp_path / "fp32", *other)
    half = [flag for flag in HALF if flag.startswith("--fp16") or flag == "4"]
    before = runs.train(translation_data, tmp_path / "fp16", *half, *FLAGS, "--max-update", "2")
    with caplog.at_level("WARNING", "fairseq_sam"):
        logging_is_on(lambda: runs.train(translation_data, tmp_path / "fp16", *half, *other))
    assert "the checkpoint is of --optimizer look_sam: ga_sam goes on" in caplog.text
    after = runs.load(tmp_path / "fp16" / "checkpoint_last.pt")["last_optimizer_state"]
    assert before["last_optimizer_state"]["sharpness_aware"]["fisher"] and "fisher" not in after["sharpness_aware"]
    assert after["state"][0]["step"] == 4, "Adam went on"


def logging_is_on(call):
    import logging

    disable, logging.disable = logging.disable, lambda level: None
    try:
        call()
    finally:
        logging.disable = disable


def test_another_base_is_refused(translation_data, tmp_path):
    runs.train(translation_data, tmp_path, *FLAGS, "--max-update", "2")
    with pytest.raises(ConfigurationError, match=r"--base-optimizer adam, but .* sgd.*--reset-optimizer"):
        runs.train(translation_data, tmp_path, *FLAGS, "--base-optimizer", "sgd", "--max-update", "4")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "generate"])
def test_one_line_and_exit_status_on_the_command_line(translation_data, saved, tmp_path, command):
    state = torch.load(saved)
    state["extra_state"]["surprise"] = Command(tmp_path / "was_run")
    torch.save(state, tmp_path / "checkpoint_last.pt")
    if command == "train":
        flags = [*runs.common_flags(), *FLAGS, "--save-dir", str(tmp_path)]
    else:
        flags = ["--user-dir", runs.PLUGIN, "--cpu", "--path", str(tmp_path / "checkpoint_last.pt")]
    done = runs.command_in_subprocess(command, str(translation_data), *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("fairseq_sam: error: ") and "system" in done.stderr
    assert not (tmp_path / "was_run").exists()
    shutil.rmtree(tmp_path)
