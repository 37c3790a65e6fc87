"""What can be wrong with checkpoints and data that are analysed: one line that says of which, and what to do."""

import copy
import shutil

import pytest
import torch

from fairseq_sam.__main__ import main
from tests.adapter.test_analyses import model_and_valid

pytestmark = pytest.mark.slow


def error_of(words, capsys):
    """The line that a command ends with."""
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("fairseq-sam: error: "), lines
    return lines[0]


@pytest.fixture
def changed(checkpoints, tmp_path):
    """Writes the first checkpoint after a change."""

    def write(name, change):
        state = copy.deepcopy(torch.load(checkpoints[0], weights_only=False))
        change(state)
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    return write


def to_nan(state):
    state["model"]["encoder.layers.0.fc1.weight"][0, 0] = float("nan")


def to_huge(state):
    state["model"]["encoder.layers.0.fc1.weight"] *= 1e30
    state["model"]["encoder.layers.0.fc2.weight"] *= 1e30


def without_a_weight(state):
    del state["model"]["encoder.layers.0.fc1.weight"]


def of_an_unknown_task(state):
    state["cfg"]["task"]["_name"] = "nothing"


@pytest.mark.parametrize("command", ["robustness", "sharpness", "spectrum", "landscape", "epsilon"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (to_nan, "holds weights that are no finite numbers, in encoder.layers.0.fc1.weight; take"),
        (to_huge, "must be a finite number, got nan; take a checkpoint of before"),
    ],
)
def test_diverged_models(checkpoints, changed, tmp_path, capsys, change, words, command):
    path = changed("diverged.pt", change)
    error = error_of([command, path, "--num-batches", "1", "--out", str(tmp_path / "out")], capsys)
    assert words in error and path in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [(without_a_weight, "Missing key(s) in state_dict"), (of_an_unknown_task, "Could not infer task type")],
)
def test_checkpoints_that_do_not_fit(changed, tmp_path, capsys, change, words):
    path = changed("other.pt", change)
    error = error_of(["sharpness", path, "--out", str(tmp_path)], capsys)
    assert f"{path} and its data do not fit together" in error and words in error


def test_data_of_another_model(checkpoints, classifiers, language_model_data, translation_data, tmp_path, capsys):
    smaller = tmp_path / "smaller"
    shutil.copytree(translation_data, smaller)
    for language in ("src", "tgt"):
        lines = (smaller / f"dict.{language}.txt").read_text().splitlines()
        (smaller / f"dict.{language}.txt").write_text("\n".join(lines[:-9]) + "\n")
    for path, data, words in (
        (checkpoints[0], language_model_data, "Could not infer language pair"),
        (checkpoints[0], smaller, "size mismatch"),
        (classifiers[0], translation_data, "No such file or directory"),
    ):
        error = error_of(["sharpness", path, "--data", str(data), "--out", str(tmp_path)], capsys)
        assert words in error and f"{data} (--data); they must be those of the task" in error, error


def test_splits_and_batches_that_are_not_there(checkpoints, classifiers, tmp_path, capsys):
    for path in (checkpoints[0], classifiers[0]):
        words = ["robustness", path, "--out", str(tmp_path)]
        for flag in ("--subset", "--attack-subset"):
            error = error_of([*words, flag, "nowhere"], capsys)
            assert f"error: {flag} nowhere of /" in error and "cannot be read: " in error
            assert "not find dataset" in error or "Dataset not found" in error
        assert "--max-tokens must be at least 1" in error_of([*words, "--max-tokens", "3"], capsys)
        assert "of the longest sentence of valid, got 3" in error_of([*words, "--max-tokens", "3"], capsys)


def test_damaged_data(checkpoints, translation_data, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(translation_data, data)
    for file in ("valid.src-tgt.src.bin", "valid.src-tgt.src.idx"):
        with open(data / file, "r+b") as opened:
            opened.truncate(100 if file.endswith("bin") else 0)
        error = error_of(["sharpness", checkpoints[0], "--data", str(data), "--out", str(tmp_path)], capsys)
        assert f"error: --subset valid of {data} cannot be read: " in error


def test_excluding_all(checkpoints, tmp_path, capsys):
    for command in ("spectrum", "landscape"):
        error = error_of([command, checkpoints[0], "--exclude", ".", "--out", str(tmp_path)], capsys)
        assert f"--exclude must leave a parameter of {checkpoints[0]}, but '.' matches all" in error


def test_damaged_checkpoints(checkpoints, tmp_path, capsys):
    """It is said what the file is; nothing of training."""
    with open(checkpoints[0], "rb") as file:
        (tmp_path / "cut.pt").write_bytes(file.read()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1], tmp_path / "list.pt")
    for name in ("cut.pt", "text.pt", "list.pt"):
        for words in ([str(tmp_path / name)], [checkpoints[0], "--before", str(tmp_path / name)]):
            error = error_of(["landscape", *words, "--out", str(tmp_path)], capsys)
            assert f"{tmp_path / name} is damaged or no checkpoint: " in error, error
            assert error.endswith("analyses take the checkpoints that fairseq-train writes, whole ones")
            assert "restore-file" not in error and "anew" not in error


def test_too_little_memory(checkpoints, tmp_path, capsys, monkeypatch):
    from fairseq_sam.analysis.objective import Objective

    def fail(self):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Objective, "loss", fail)
    error = error_of(["landscape", checkpoints[0], "--out", str(tmp_path)], capsys)
    assert "2.00 GiB; a smaller --max-tokens or --batch-size, or --cpu, takes less memory" in error


def test_spectra_that_do_not_fit_into_memory(checkpoints, tmp_path, capsys, monkeypatch):
    """That of the density is refused before the eigenvalues are computed; the model is named."""
    weights = sum(parameter.numel() for parameter in model_and_valid(checkpoints[0])[0].parameters())
    monkeypatch.setattr("fairseq_sam.analysis.memory.free_bytes", lambda device: weights * 4 * 60)
    words = ["spectrum", checkpoints[0], "--out", str(tmp_path), "--names", "Adam"]
    for more, steps in (
        (["--top", "2", "--steps", "5", "--density-steps", "70"], 70),
        (["--top", "10", "--parts", "hessian"], 80),
    ):
        error = error_of([*words, *more], capsys)
        assert (
            f"error: Adam: Lanczos of {steps} steps over {weights:,} weights needs" in error
            and "--density-steps" in error
        )
        assert not list(tmp_path.glob("*.tsv"))


def test_no_log_of_gradients(trained, tmp_path, capsys):
    for run in (tmp_path, tmp_path / "nowhere"):
        error = error_of(["gradients", str(trained / "adam"), str(run), "--out", str(tmp_path)], capsys)
        assert f"a run's folder with gradients.jsonl, or such a file, got {run}; --sam-gradient-log writes it" in error
