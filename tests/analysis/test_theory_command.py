"""``fairseq-sam theory`` on generated files: what it measures, goes on with, leaves alone, and refuses."""

import csv
import gzip

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from fairseq_sam.__main__ import main
from fairseq_sam.analysis import theory
from fairseq_sam.commands import theory as command
from tests.analysis.mnist_files import idx, write_mnist

NUMBER, TRIALS = 20, 4
WORDS = ["--number", NUMBER, "--trials", TRIALS, "--hidden", 3, "--l2", 0.1, "--iterations", 60]


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Small files; plots, which take longer than the trials, are not drawn."""
    monkeypatch.setattr(command, "plot", lambda *_: None)
    write_mnist(tmp_path / "mnist", sizes={"train": NUMBER, "t10k": NUMBER})
    return tmp_path / "mnist"


def run(mnist, out, *words):
    return main(["theory", str(mnist), "--out", str(out), *map(str, [*WORDS, *words])])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def lengths(rows, mixture):
    return [float(row["distance"]) for row in rows if row["mixture"] == mixture]


@pytest.fixture
def trials(monkeypatch):
    """The shares that are measured, in order."""
    measured, shifts = [], theory.shifts

    def counted(mixture, etas, *, found, **options):
        def add(result):
            measured.append(result.eta)
            found(result)

        return shifts(mixture, etas, found=add, **options)

    monkeypatch.setattr(theory, "shifts", counted)
    return measured


def reference_loss(flat, parts, first, l2):
    """Loss of the perceptron 16, 3, 10 with tanh by hand, and its gradient, for scipy."""
    w = torch.tensor(flat, requires_grad=True)
    a, b, c, d = (part.reshape(shape) for part, shape in zip(w.split([48, 3, 30, 10]), REFERENCE_SHAPES, strict=True))
    loss = l2 / 2 * (w - first).square().sum()
    for share, (x, y) in parts:
        logits = torch.tanh(x @ a.T + b) @ c.T + d
        loss = loss + share * (logits.logsumexp(1) - logits[torch.arange(len(y)), y]).mean()
    return float(loss.detach()), torch.autograd.grad(loss, w)[0].numpy()


REFERENCE_SHAPES = ((3, 16), (3,), (10, 3), (10,))


def test_it_measures_what_it_says(tmp_path, capsys):
    """Against scipy's minima of a loss written apart; all images are taken, so that their order does not matter."""
    made = write_mnist(tmp_path / "mnist", sizes={"train": NUMBER, "t10k": NUMBER})
    assert run(tmp_path / "mnist", tmp_path / "out", "--mixture", "samples", "weights") == 0
    first = nn.utils.parameters_to_vector(theory.perceptron(16, (3,)).parameters()).detach()
    pixels = {split: torch.tensor(images.reshape(NUMBER, 16) / 255.0) for split, (images, _) in made.items()}
    train, test = (
        (pixels[split] - pixels["train"].mean(0), torch.tensor(made[split][1]).long()) for split in ("train", "t10k")
    )

    def minimum(start, *parts):
        arguments = (parts, first, 0.1)
        return minimize(reference_loss, start, arguments, method="BFGS", jac=True, options={"gtol": 1e-9}).x

    (path,) = (tmp_path / "out").glob("minimum_*.pt")
    theta = torch.cat([tensor.reshape(-1) for tensor in torch.load(path).values()]).numpy()
    reached = minimum(theta, (1.0, train))
    assert np.abs(reached - theta).max() < 1e-5
    rows = rows_of(tmp_path / "out" / "shifts.tsv")
    expected = [
        np.linalg.norm(minimum(reached, (1 - eta, train), (eta, test)) - reached) for eta in (0.25, 0.5, 0.75, 1.0)
    ]
    assert lengths(rows, "weights")[1:] == pytest.approx(expected, rel=1e-3)
    assert lengths(rows, "samples")[-1] == pytest.approx(expected[-1], rel=1e-3)
    assert lengths(rows, "samples")[1] != pytest.approx(expected[0], rel=1e-3)
    assert max(lengths(rows, "samples")[0], lengths(rows, "weights")[0]) < 1e-5, "the control"
    assert [row["eta"] for row in rows] == ["0", "0.25", "0.5", "0.75", "1"] * 2

    line = rows_of(tmp_path / "out" / "line.tsv")
    assert len(line) == 61 and {row["data"] for row in line} == {row["data"] for row in rows}
    other = minimum(reached, (1.0, test))
    constant = (
        reference_loss(other, [(1.0, test)], first, 0.1)[0] - reference_loss(reached, [(1.0, train)], first, 0.1)[0]
    )
    for row in line[::10]:
        alpha = float(row["alpha"])
        here = alpha * reached + (1 - alpha) * other
        assert float(row["train"]) == pytest.approx(reference_loss(here, [(1.0, train)], first, 0.1)[0], rel=1e-4)
        assert float(row["test"]) == pytest.approx(reference_loss(here, [(1.0, test)], first, 0.1)[0], rel=1e-4)
        moved = reference_loss(here - (other - reached), [(1.0, train)], first, 0.1)[0] + constant
        assert float(row["shifted"]) == pytest.approx(moved, rel=1e-4)

    assert (tmp_path / "out" / "theory.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for mixture in ("samples", "weights"):
        r = np.corrcoef([0.25, 0.5, 0.75, 1.0], lengths(rows, mixture)[1:])[0, 1]
        p = np.polyfit(np.log([0.25, 0.5, 0.75, 1.0]), np.log(lengths(rows, mixture)[1:]), 1)[0]
        assert f"{mixture}: 4 trials, r = {r:.3f}, ∝ η^{p:.2f}" in output
        assert f"{mixture}: control, ‖δ‖ at η = 0: " in output
    assert "training minimum: loss " in output and "off the test loss near θ* (|α| ≤ 0.5): training loss" in output


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_stopped_command_goes_on(mnist, tmp_path, monkeypatch, trials, after):
    """Ctrl-C after some trials; the next run measures the others and ends with the tables of a whole run."""
    assert run(mnist, tmp_path / "whole") == 0
    whole = list(trials)
    assert whole == [0, 0.25, 0.5, 0.75, 1]
    trials.clear()
    shift, calls = theory.shift, []

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return shift(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(theory, "shift", stopped)
        assert run(mnist, tmp_path / "out") == 130
    assert trials == whole[: max(after - 1, 0)], "the first shift is the line's"
    before = (tmp_path / "out" / "shifts.tsv").read_text() if trials else ""
    trials.clear()
    assert run(mnist, tmp_path / "out") == 0
    assert trials == whole[max(after - 1, 0) :]
    for table in ("line.tsv", "shifts.tsv"):
        assert (tmp_path / "out" / table).read_text() == (tmp_path / "whole" / table).read_text()
    assert (tmp_path / "out" / "shifts.tsv").read_text().startswith(before)
    monkeypatch.setattr(theory, "minimise", None)
    assert run(mnist, tmp_path / "out") == 0, "nothing is left to do"


def test_more_trials_add_to_those_that_are_there(mnist, tmp_path, trials, capsys):
    assert run(mnist, tmp_path / "out", "--trials", 2) == 0
    assert run(mnist, tmp_path / "out", "--trials", 4) == 0
    assert trials == [0, 0.5, 1, 0.25, 0.75]
    assert [row["eta"] for row in rows_of(tmp_path / "out" / "shifts.tsv")] == ["0", "0.25", "0.5", "0.75", "1"]
    assert run(mnist, tmp_path / "out", "--trials", 2) == 0
    assert "samples: 4 trials" in capsys.readouterr().out.splitlines()[-3], "all that are in the table"


@pytest.mark.parametrize(
    "words",
    [
        ["--number", NUMBER - 1],
        ["--hidden", 3, 2],
        ["--l2", 0.2],
        ["--iterations", 5],
        ["--seed", 2],
        ["--activation", "softplus"],
        ["--mixture", "weights"],
        "other data",
    ],
    ids=str,
)
def test_rows_of_other_settings_stay(mnist, tmp_path, trials, words):
    out = tmp_path / "out"
    assert run(mnist, out) == 0
    mine = rows_of(out / "shifts.tsv"), rows_of(out / "line.tsv")
    trials.clear()
    if words == "other data":
        write_mnist(tmp_path / "other", seed=1, sizes={"train": NUMBER, "t10k": NUMBER})
        assert run(tmp_path / "other", out) == 0
    else:
        assert run(mnist, out, *words) == 0
    assert trials == [0, 0.25, 0.5, 0.75, 1], "none is taken from the other settings"
    rows = rows_of(out / "shifts.tsv")
    assert rows[:5] == mine[0] and len(rows) == 10
    assert lengths(rows[5:], rows[5]["mixture"])[1:4] != lengths(rows[:5], "samples")[1:4]
    num_lines = 1 if "--mixture" in words else 2  # a line has no mixture
    lines = rows_of(out / "line.tsv")
    assert lines[:61] == mine[1] and len(lines) == 61 * num_lines
    trials.clear()
    assert run(mnist, out) == 0 and trials == []
    assert sorted(map(str, rows_of(out / "shifts.tsv"))) == sorted(map(str, rows))


def error_of(capsys):
    """The one line that a user sees."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("DEBUG", "INFO"))]
    assert len(lines) == 1 and lines[0].startswith("fairseq-sam: error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--number", NUMBER + 1], f"--number must be at most {NUMBER}, the images of train in"),
        (["--number", 0], "--number: must be an integer >= 1, got 0"),
        (["--trials", 0], "--trials: must be an integer >= 1, got 0"),
        (["--trials", "many"], "--trials: must be an integer >= 1, got many"),
        (["--l2=-0.1"], "--l2: must be a finite number >= 0, got -0.1"),
        (["--l2", "nan"], "--l2: must be a finite number >= 0, got nan"),
        (["--l2", "inf"], "--l2: must be a finite number >= 0, got inf"),
        (["--l2", "much"], "--l2: must be a finite number >= 0, got much"),
        (["--iterations", 0], "--iterations: must be an integer >= 1, got 0"),
        (["--hidden", 3, 0], "--hidden: must be an integer >= 1, got 0"),
        (["--seed", "1.5"], "--seed: must be an integer from 0 to 2147483647, got 1.5"),
        (["--seed=-1"], "--seed: must be an integer from 0 to 2147483647, got -1"),
        (["--seed", 2**31], "--seed: must be an integer from 0 to 2147483647, got 2147483648"),
        (["--activation", "sine"], "--activation: invalid choice: 'sine'"),
        (["--mixture", "both"], "--mixture: invalid choice: 'both'"),
        (["--trial", 3], "unrecognized arguments: --trial 3"),
    ],
)
def test_errors_are_one_line(mnist, tmp_path, capsys, words, error):
    assert run(mnist, tmp_path / "out", *words) == 2
    assert error in error_of(capsys)


def test_files_that_are_not_there_or_broken(mnist, tmp_path, capsys):
    assert run(tmp_path / "none", tmp_path / "out") == 2
    assert "MNIST must be a folder with train-images-idx3-ubyte.gz and so on" in error_of(capsys)
    assert (tmp_path / "out").is_dir(), "made before the work begins"
    path = mnist / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert run(mnist, tmp_path / "out") == 2
    assert f"{path} is cut off or no gzip file" in error_of(capsys)
    path.write_bytes(gzip.compress(idx(np.zeros((NUMBER, 5, 5), np.uint8))))
    assert run(mnist, tmp_path / "out") == 2
    assert "expected images of one size" in error_of(capsys)
    (tmp_path / "file").write_text("")
    assert run(mnist, tmp_path / "file") == 2
    assert f"--out must be a folder that can be written to, got {tmp_path / 'file'}: File exists" in error_of(capsys)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("images\tl2\teta\tdistance\n100\t0.1\t0.5\t1\n", "is no table of this command; move it away"),
        (b"\xff\xfe\x00", "is no table of this command"),
        ("cut", "is no table of this command"),
        ("number", "has a row that is no measurement (could not convert string to float: 'far')"),
    ],
)
def test_tables_that_are_not_its_own_are_left_alone(mnist, tmp_path, capsys, trials, content, error):
    table = tmp_path / "out" / "shifts.tsv"
    if content in ("cut", "number"):
        assert run(mnist, tmp_path / "out") == 0
        capsys.readouterr()
        text = table.read_text()
        last = text.splitlines()[-1].split("\t")
        spoilt = last[:-2] if content == "cut" else [*last[:-2], "far", last[-1]]
        content = text.replace("\t".join(last), "\t".join(spoilt))
    table.parent.mkdir(exist_ok=True)
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = table.read_bytes()
    trials.clear()
    assert run(mnist, tmp_path / "out") == 2 and trials == []
    assert error in error_of(capsys) and table.read_bytes() == before


@pytest.mark.parametrize("content", [b"no weights", b"", "other model"])
def test_a_broken_minimum(mnist, tmp_path, capsys, content):
    assert run(mnist, tmp_path / "out") == 0
    (path,) = (tmp_path / "out").glob("minimum_*.pt")
    capsys.readouterr()
    if content == "other model":
        torch.save({"0.weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    assert run(mnist, tmp_path / "out") == 2
    assert f"{path} " in (error := error_of(capsys)) and error.endswith("remove it")


def test_images_are_chosen_at_random(tmp_path):
    """Other seeds take other images, from the whole split; the same seed the same."""
    write_mnist(tmp_path)
    chosen = [command.images(tmp_path, 12, seed) for seed in (1, 1, 2)]
    for (x, y), (again, _), (other, _) in zip(*chosen, strict=True):
        assert x.shape == (12, 16) and y.shape == (12,) and x.dtype == torch.float64
        assert torch.equal(x, again) and not torch.equal(x, other)
    assert torch.allclose(chosen[0][0][0].mean(0), torch.zeros(16).double(), atol=1e-15)


def test_the_legend_has_the_mixtures_and_the_straight_line(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(command, "save", lambda made, path: figures.append(made))
    shifts = [theory.Shift(eta=eta, distance=2 * eta, gradient=0.0) for eta in (0.0, 0.5, 1.0)]
    points = [theory.LinePoint(alpha=alpha, train=1.0, test=2.0, shifted=3.0, constant=0.0) for alpha in (0.0, 1.0)]
    command.plot(points, {"samples": shifts, "weights": shifts}, tmp_path / "theory.png")
    shown = [text.get_text() for text in figures[0].axes[1].get_legend().get_texts()]
    own = "2 trials, r = 1.000, ∝ η^1.00"
    assert shown == [f"samples: {own}", f"weights: {own}", "proportional to η"]
