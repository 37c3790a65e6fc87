"""What the commands share."""

import io
import sys
from pathlib import Path

import pytest
import torch

from fairseq_sam.__main__ import main
from fairseq_sam.commands import options
from fairseq_sam.commands.common import Progress, model_names
from fairseq_sam.commands.settings import digest_of_data


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
    with pytest.raises(ValueError, match="--names must be 1 different names"):
        model_names([Path("a.pt")], [" "])
    with pytest.raises(ValueError, match="two of the files are the same"):
        model_names([Path("x/../a.pt"), Path("a.pt")], None)


def test_the_time_left_is_that_of_what_is_done_now(monkeypatch):
    """Parts that an earlier run did took none of this one's time."""
    now, shown = [0.0], io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for start, left in ((0, "0:00:10"), (80, "0:00:20")):
        progress = Progress("work", start, stream=shown)
        now[0] += 20.0
        progress(90, 100) if start else progress(65, 100)
        assert shown.getvalue().splitlines()[-1].endswith(f", {left} left"), shown.getvalue()


COUNTS = {
    "robustness": ("--num-batches", "--batch-size", "--max-tokens", "--attack-batches", "--steps"),
    "sharpness": ("--num-batches", "--batch-size", "--max-tokens", "--instances", "--steps", "--directions"),
    "spectrum": ("--num-batches", "--top", "--steps", "--instances", "--density-steps"),
    "landscape": ("--num-batches", "--batch-size", "--max-tokens"),
    "epsilon": ("--num-batches", "--batch-size", "--max-tokens"),
}
BAD = [([command, flag, value], f"{flag}: must be an integer >= 1, got {value}")
       for command, flags in COUNTS.items() for flag in flags for value in ("0", "-1", "1.5")]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "error"),
    [
        *BAD,
        (["spectrum", "--samples", "1"], "--samples: must be an integer >= 2, got 1"),
        (["spectrum", "--exclude", "("], "--exclude: must be a regular expression, got '('"),
        (["landscape", "--exclude", "("], "--exclude: must be a regular expression, got '('"),
        (["landscape", "--points", "1"], "--points: must be an integer >= 2, got 1"),
        (["landscape", "--range", "0", "0"], "--range must be two numbers FROM < TO, got 0 0"),
        (["landscape", "--range", "1", "-1"], "--range must be two numbers FROM < TO, got 1 -1"),
        (["landscape", "--range", "-1e-3", "-2e+1"], "--range must be two numbers FROM < TO, got -0.001 -20"),
        (["landscape", "--range", "0", "1e-6"], "--range must hold 25 places (--points) that differ in six decimals"),
        (["landscape", "--range", "0", "inf"], "--range: must be a finite number, got inf"),
        (["landscape", "--range", "0", "x"], "--range: must be a finite number, got x"),
        (["robustness", "--bleu", "-1"], "--bleu: must be an integer >= 0, got -1"),
        (["robustness", "--l2", "--linf"], "--l2 and --linf must name a radius, got none"),
        (["robustness", "--linf", "nan"], "--linf: must be a finite number > 0, got nan"),
        (["robustness", "--l2", "0.1", "0"], "--l2: must be a finite number > 0, got 0"),
        (["sharpness", "--radii", "-0.1"], "--radii: must be a finite number > 0, got -0.1"),
        (["sharpness", "--norm", "l0"], "--norm: must be l2, linf or a number > 1, got l0"),
        (["sharpness", "--kinds", "average", "--steps", "3"], "--steps is of the --kinds worst, instance only, got"),
        (
            ["sharpness", "--kinds", "average", "--method", "asam"],
            "--method is of the --kinds worst, ascent, instance only, got --kinds average",
        ),
        (
            ["sharpness", "--kinds", "average", "--norm", "linf"],
            "--norm is of the --kinds worst, ascent, instance only",
        ),
        (["sharpness", "--kinds", "worst", "--directions", "3"], "--directions is of the --kinds average only, got"),
        (
            ["sharpness", "--instances", "3"],
            "--instances is of the --kinds instance only, got --kinds worst ascent average",
        ),
        (["spectrum", "--parts", "trace", "--steps", "9"], "--steps is of the --parts hessian only, got --parts trace"),
        (["spectrum", "--parts", "trace", "--top", "9"], "--top is of the --parts hessian, fisher only, got"),
        (["spectrum", "--parts", "hessian", "--instances", "9"], "--instances is of the --parts fisher only, got"),
        (["spectrum", "--parts", "hessian", "--samples", "9"], "--samples is of the --parts trace only, got"),
        (["spectrum", "--parts", "hessian", "--density-steps", "9"], "--density-steps is of the --parts density only"),
        (
            ["spectrum", "--top", "9", "--instances", "8"],
            "--fisher-top, by default --top, must be at most --instances, 8, got 9",
        ),
        (["spectrum", "--parts", "hessian", "--fisher-top", "9"], "--fisher-top is of the --parts fisher only, got"),
        (["epsilon", "--least", "1", "--most", "0.1"], "--least must be smaller than --most, got 1 and 0.1"),
        (["sharpness", "--method", "ga_sam"], "--method: invalid choice: 'ga_sam' (choose from 'sam', 'asam', 'awp')"),
        (["sharpness", "--method", "model_perturbation"], "--method: invalid choice: 'model_perturbation'"),
        (["robustness", "--remove-bpe", "none"], "--remove-bpe is of --bleu only, got 'none'"),
        (["sharpness", "--method", "freelb"], "--method: invalid choice: 'freelb' (choose from 'sam', "),
        (["sharpness", "--kinds", "best"], "--kinds: invalid choice: 'best'"),
        (["sharpness", "--seed", "-1"], "--seed: must be an integer from 0 to 2147483647, got -1"),
        (["spectrum", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_values_are_refused_before_anything_is_read(tmp_path, capsys, words, error):
    words = [words[0], "nowhere.pt", *words[1:], "--out", str(tmp_path / "out")]
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"fairseq-sam: error: {error}"), lines
    assert f"fairseq-sam {words[0]} --help" in lines[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["robustness", "sharpness", "spectrum", "landscape", "gradients", "epsilon"])
def test_a_folder_that_cannot_be_made(tmp_path, capsys, monkeypatch, command):
    """It is said before a checkpoint is read: this one is none."""
    for name in ("file", "checkpoint.pt"):
        (tmp_path / name).write_text("none")
    main_words = [command, str(tmp_path / "checkpoint.pt"), "--out"]
    for out, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        assert main([*main_words, str(out)]) == 2
        expected = f"--out must be a folder that can be written to, got {out}: {reason}\n"
        assert capsys.readouterr().err == f"fairseq-sam: error: {expected}"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write everywhere
    assert main([*main_words, str(tmp_path)]) == 2
    assert "got " + str(tmp_path) + ": Permission denied" in capsys.readouterr().err


def test_all_checkpoints_must_be_there_before_one_is_measured(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_text("none")
    for other, reason in (("nowhere.pt", "no file"), (".", "a folder")):
        words = ["robustness", str(tmp_path / "checkpoint.pt"), str(tmp_path / other), "--out", str(tmp_path / "out")]
        assert main(words) == 2
        assert f"{tmp_path / other}, which is {reason}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_digest_of_data():
    """Equal for equal sentences in equal batches, in whatever order their parts are named; else different."""
    tokens = torch.arange(6)
    batches = [{"id": tokens[:2], "net_input": {"src_tokens": tokens.reshape(2, 3), "ntokens": 6, "prev": None}}]
    same = [{"net_input": {"prev": None, "ntokens": 6, "src_tokens": tokens.reshape(2, 3).clone()}, "id": tokens[:2]}]
    assert digest_of_data(batches) == digest_of_data(same) and len(digest_of_data(batches)) == 8
    others = [
        [], batches * 2, [{"id": tokens[:2]}], [{**batches[0], "id": tokens[:2].int()}],
        [{**batches[0], "net_input": {**batches[0]["net_input"], "src_tokens": tokens.reshape(3, 2)}}],
        [{**batches[0], "net_input": {**batches[0]["net_input"], "ntokens": 7}}],
        [{**batches[0], "id": torch.tensor([True, False])}], [{**batches[0], "id": torch.tensor(1)}],
    ]  # fmt: skip
    assert len({digest_of_data(each) for each in [batches, *others]}) == len(others) + 1


def test_a_table_of_another_command_is_not_overwritten(tmp_path, capsys):
    """The trials of ``theory`` have a line of their own."""
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_text("none")
    (tmp_path / "line.tsv").write_text("alpha\ttrain\n0.5\t1\n")
    words = ["landscape", str(tmp_path / "a.pt"), "--before", str(tmp_path / "b.pt"), "--out", str(tmp_path)]
    assert main(words) == 2
    assert f"{tmp_path / 'line.tsv'} must be of an earlier landscape" in capsys.readouterr().err
    assert (tmp_path / "line.tsv").read_text().startswith("alpha")


def test_a_word_that_is_given_twice_counts_once():
    made = options.Parser("sharpness", "")
    made.add_argument("--radii", nargs="+", type=options.positive, action=options.Distinct, default=[3.0])
    assert made.parse_args(["--radii", "0.2", "0.1", "0.20"]).radii == [0.2, 0.1]
    assert made.parse_args([]).radii == [3.0]


def test_a_closed_stream_takes_nothing(monkeypatch):
    """Where the shell has closed it (``2>&-``), Python has none, and progress would end in an AttributeError."""
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["sam"]) == 0
    Progress("losses")(1, 1)
    print("and this", file=sys.stderr)
