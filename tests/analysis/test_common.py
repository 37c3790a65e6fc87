"""What the commands share."""

from pathlib import Path

import pytest

from fairseq_sam.commands.common import model_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["adam/checkpoint_best.pt"], ["adam"]),
        (["adam/checkpoint_best.pt", "sam/checkpoint_best.pt"], ["adam", "sam"]),
        (["adam/checkpoint_best.pt", "sam/averaged.pt"], ["adam", "sam"]),
        (["adam/checkpoint1.pt", "adam/checkpoint_best.pt"], ["checkpoint1", "checkpoint_best"]),
        (["runs/1f-adam/seed1/best.pt", "runs/2e-sam/seed1/best.pt"], ["1f-adam", "2e-sam"]),
        (["runs/adam/seed1/best.pt", "runs/adam/seed2/best.pt"], ["seed1", "seed2"]),
        (
            ["adam/seed1/a.pt", "adam/seed2/a.pt", "sam/seed1/a.pt", "sam/seed2/a.pt"],
            ["adam/seed1", "adam/seed2", "sam/seed1", "sam/seed2"],
        ),
        (["adam/1.pt", "adam/2.pt", "sam/1.pt"], ["adam/1", "adam/2", "sam/1"]),
        (["adam/a.pt", "adam/a.bin"], ["a.pt", "a.bin"]),
        (["x/a.pt", "x/y/a.pt", "x/y/z/a.pt"], ["x", "y", "z"]),
        (["imdb/adam/run/a.pt", "ptb/sam/run/a.pt"], ["adam", "sam"]),
    ],
)
def test_names_of_models(tmp_path, paths, names):
    paths = [tmp_path / path for path in paths]
    assert model_names(paths, None) == names
    assert model_names(paths, names) == names


def test_names_do_not_depend_on_the_folder_that_all_are_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert model_names([Path("checkpoint1.pt"), Path("checkpoint2.pt")], None) == ["checkpoint1", "checkpoint2"]


def test_bad_names():
    with pytest.raises(ValueError, match="--names must be 2 different names"):
        model_names([Path("a.pt"), Path("b.pt")], ["x", "x"])
    with pytest.raises(ValueError, match="two checkpoints are the same file"):
        model_names([Path("x/../a.pt"), Path("a.pt")], None)
