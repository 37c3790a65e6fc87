"""The commands of ``fairseq-sam`` on checkpoints of fairseq-train: their tables against numbers worked out apart."""

import csv
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fairseq_sam
from fairseq_sam.__main__ import COMMANDS, main
from fairseq_sam.commands import common
from tests.adapter import runs

pytestmark = pytest.mark.slow


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def column(rows, name):
    return [float(row[name]) for row in rows]


def is_plot(path):
    """Whether a PNG is there, in colours that are not one."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    return min(pixels.shape[:2]) > 400 and len(set(map(tuple, pixels[::20, ::20].reshape(-1, 3)))) > 1


def model_and_valid(path):
    """A model of translation in evaluation mode, and the batches of its validation split."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    task.load_dataset("valid")
    batches = task.get_batch_iterator(task.dataset("valid"), max_sentences=7).next_epoch_itr(shuffle=False)
    return model.eval(), list(batches), task.target_dictionary.pad()


def losses(model, batches, pad):
    """Summed cross entropy of each sentence, bits, and its tokens."""
    found = []
    for batch in batches:
        logits = model(**batch["net_input"])[0]
        each = nn.functional.cross_entropy(logits.transpose(1, 2), batch["target"], ignore_index=pad, reduction="none")
        found += zip(each.sum(1) / math.log(2), batch["target"].ne(pad).sum(1).tolist(), strict=True)
    return found


def mean_loss(model, batches, pad):
    with torch.no_grad():
        pairs = losses(model, batches, pad)
    return float(sum(loss for loss, _ in pairs)) / sum(number for _, number in pairs)


def test_robustness(checkpoints, tmp_path, capsys):
    words = ["--names", "Adam", "GA-SAM", "--l2", "0.05", "0.5", "--linf", "1e-3", "--steps", "2"]
    before = [torch.load(path, weights_only=False)["model"] for path in checkpoints]
    assert main(["robustness", *checkpoints, *words, "--bleu", "1", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "robustness.tsv")
    assert [(row["model"], row["norm"], row["radius"]) for row in rows] == [
        (model, norm, radius)
        for model in ("Adam", "GA-SAM")
        for norm, radius in (("", "0"), ("l2", "0.05"), ("l2", "0.5"), ("linf", "0.001"))
    ]
    for path, row in zip(checkpoints, (rows[0], rows[4]), strict=True):
        expected = mean_loss(*model_and_valid(path))
        assert float(row["loss"]) == pytest.approx(expected, abs=1e-3)  # fairseq rounds to three digits
        assert float(row["attacked loss"]) == pytest.approx(expected, rel=1e-5)
        assert float(row["ppl"]) == pytest.approx(2**expected, rel=1e-2)
    for row in rows:
        assert float(row["reached"]) <= float(row["radius"]) * (1 + 1e-4)
        assert float(row["radius"]) == 0 or float(row["reached"]) > 0.5 * float(row["radius"])
    clean, small, large = column(rows[:3], "attacked loss")
    assert clean < small < large and "bleu" in rows[0]
    after = [torch.load(path, weights_only=False)["model"] for path in checkpoints]
    assert all(runs.same_bits(*pair) for pair in zip(before, after, strict=True))
    assert is_plot(tmp_path / "robustness.png") and "robustness of GA-SAM: 10 of 10" in capsys.readouterr().err


def test_one_step_of_a_corruption(checkpoints, tmp_path):
    """A step of 1.5 times the radius, brought back to the edge, along the gradient of the whole split."""
    words = ["--l2", "0.1", "--linf", "--steps", "1", "--out", str(tmp_path)]
    assert main(["robustness", checkpoints[0], *words]) == 0
    model, batches, pad = model_and_valid(checkpoints[0])
    pairs = losses(model, batches, pad)
    loss = sum(loss for loss, _ in pairs) / sum(number for _, number in pairs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    norm = flat(gradients).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(0.1 * gradient / norm)
    found = float(rows_of(tmp_path / "robustness.tsv")[1]["attacked loss"])
    assert found == pytest.approx(mean_loss(model, batches, pad), rel=1e-4)


def test_sharpness(checkpoints, tmp_path):
    words = ["--kinds", "worst", "ascent", "average", "instance", "--radii", "0.02", "0.1", "--steps", "3"]
    words += ["--directions", "2", "--instances", "3", "--out", str(tmp_path)]
    assert main(["sharpness", *checkpoints, *words]) == 0
    rows = rows_of(tmp_path / "sharpness.tsv")
    assert len(rows) == 2 * 2 * 4 and {row["model"] for row in rows} == {"adam", "ga_sam"}
    found = {(row["model"], row["direction"], row["radius"]): row for row in rows}
    for row in rows:
        rise = float(row["perturbed loss"]) - float(row["loss"])
        assert float(row["sharpness"]) == pytest.approx(rise, abs=2e-4)
        assert (float(row["standard error"]) > 0) == (row["direction"] == "average")
    for model in ("adam", "ga_sam"):
        at = {kind: float(found[model, kind, "0.1"]["sharpness"]) for kind in ("worst", "ascent", "average")}
        assert at["average"] < at["ascent"] <= at["worst"] * 1.05 and at["ascent"] > 0
        assert float(found[model, "instance", "0.1"]["sharpness"]) > float(
            found[model, "instance", "0.02"]["sharpness"]
        )
    expected = mean_loss(*model_and_valid(checkpoints[1]))
    assert float(found["ga_sam", "average", "0.1"]["loss"]) == pytest.approx(expected, rel=1e-5)
    assert is_plot(tmp_path / "sharpness.png")


def test_steps_and_method_of_sharpness(checkpoints, tmp_path):
    """More steps and another ball change the worst directions, those of instances too; random ones know neither."""

    def measure(*words):
        kinds = ["--kinds", "worst", "instance", "average", "--radii", "0.5", "--directions", "2", "--instances", "3"]
        assert main(["sharpness", checkpoints[0], *kinds, *words, "--out", str(tmp_path), "--overwrite"]) == 0
        return {row["direction"]: float(row["sharpness"]) for row in rows_of(tmp_path / "sharpness.tsv")}

    plain, more, scaled = measure("--steps", "1"), measure("--steps", "8"), measure("--steps", "1", "--method", "asam")
    assert all(more[kind] > plain[kind] and scaled[kind] != plain[kind] for kind in ("worst", "instance"))
    assert plain["average"] == more["average"] == scaled["average"]


def test_spectrum(checkpoints, tmp_path):
    words = ["--top", "3", "--instances", "6", "--samples", "2", "--density-steps", "4", "--out", str(tmp_path)]
    assert main(["spectrum", *checkpoints, *words, "--steps", "25"]) == 0
    rows = rows_of(tmp_path / "eigenvalues.tsv")
    names = [(row["model"], row["matrix"], row["rank"]) for row in rows]
    assert names == [(m, x, str(r)) for m in ("adam", "ga_sam") for x in ("hessian", "fisher") for r in (1, 2, 3)]
    model, batches, pad = model_and_valid(checkpoints[0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        pairs = losses(model, batches, pad)
    loss = sum(loss for loss, _ in pairs) / sum(number for _, number in pairs)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    vector = [torch.randn_like(p) for p in parameters]
    for _ in range(100):  # power iteration
        norm = flat(vector).norm()
        vector = [part / norm for part in vector]
        products = torch.autograd.grad(gradient, parameters, vector, retain_graph=True)
        value = float(sum((a * b).sum() for a, b in zip(vector, products, strict=True)))
        vector = [part.detach() for part in products]
    assert float(rows[0]["eigenvalue"]) == pytest.approx(value, rel=1e-2)
    assert float(rows[0]["residual"]) < 0.05 * value
    for table, wanted in (
        ("trace", {"model", "trace", "standard error"}),
        ("density", {"model", "eigenvalue", "density", "kernel width"}),
    ):
        found = rows_of(tmp_path / f"{table}.tsv")
        assert set(found[0]) == wanted and {row["model"] for row in found} == {"adam", "ga_sam"}
    assert len({row["kernel width"] for row in found}) == 1, "all models are smoothed alike"
    for name in ("adam", "ga_sam"):
        density = [row for row in found if row["model"] == name]
        places, values = column(density, "eigenvalue"), column(density, "density")
        assert torch.trapezoid(torch.tensor(values), torch.tensor(places)).item() == pytest.approx(1.0, abs=0.01)
    assert is_plot(tmp_path / "spectrum.png")


def test_spectrum_of_the_fisher_information(checkpoints, tmp_path):
    """Of all instances of the split: eigenvalues of their gradients' Gram matrix over the number of tokens.

    In nats they are those of the Hessian in nats, where the model is right; the table has both in bits.
    """
    words = ["--parts", "fisher", "--fisher-top", "5", "--instances", "1000", "--out", str(tmp_path)]
    assert main(["spectrum", checkpoints[0], *words]) == 0
    (run,) = json.loads((tmp_path / "spectrum.json").read_text())["runs"]
    assert run["measured"][0]["instances"] == 30 and re.fullmatch("[0-9a-f]{8}", run["measured"][0]["instances digest"])
    model, batches, pad = model_and_valid(checkpoints[0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs = losses(model, batches, pad)
    gradients = torch.stack([flat(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss, _ in pairs])
    gram = gradients.double() @ gradients.double().T / sum(number for _, number in pairs)
    expected = (
        torch.linalg.eigvalsh(gram).flip(0)[:5] * math.log(2)
    ).tolist()  # as if of gradients in nats, then in bits
    assert column(rows_of(tmp_path / "eigenvalues.tsv"), "eigenvalue") == pytest.approx(expected, rel=1e-3)
    assert is_plot(tmp_path / "spectrum.png")


def test_line(checkpoints, tmp_path):
    """From one model at -1 to the other at 0; a stopped command goes on, other settings are not mixed in."""
    words = ["--before", checkpoints[0], "--points", "5", "--out", str(tmp_path)]
    assert main(["landscape", checkpoints[1], *words]) == 0
    rows = rows_of(tmp_path / "line.tsv")
    assert column(rows, "x") == [-1.0, -0.5, 0.0, 0.5, 1.0]
    for row, path in ((rows[0], checkpoints[0]), (rows[2], checkpoints[1])):
        assert float(row["loss"]) == pytest.approx(mean_loss(*model_and_valid(path)), rel=1e-5)
    assert is_plot(tmp_path / "line.png")
    text = (tmp_path / "line.tsv").read_text()
    changed = "".join(f"{line}\n" for line in text.splitlines()[:4]).replace(rows[1]["loss"], "123.456")
    (tmp_path / "line.tsv").write_text(changed)
    assert main(["landscape", checkpoints[1], *words]) == 0
    again = rows_of(tmp_path / "line.tsv")
    assert again[1]["loss"] == "123.456" and [row["loss"] for row in again[2:]] == [row["loss"] for row in rows[2:]]
    assert main(["landscape", checkpoints[0], "--before", checkpoints[1], "--points", "5", "--out", str(tmp_path)]) == 0
    both = rows_of(tmp_path / "line.tsv")
    assert [row["model"] for row in both] == 5 * ["adam"] + 5 * ["ga_sam"] and both[5:] == again  # which stay
    assert "123.456" not in [row["loss"] for row in both[:5]]


def test_surface(checkpoints, tmp_path):
    words = ["--points", "3", "--range", "-0.5", "0.5", "--num-batches", "1", "--max-tokens", "150"]
    assert main(["landscape", *checkpoints, *words, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "surface.tsv")
    assert len(rows) == 2 * 9 and {(row["x"], row["y"]) for row in rows} >= {("0.000000", "0.000000")}
    centre = [row for row in rows if row["x"] == row["y"] == "0.000000"]
    assert len({row["loss"] for row in rows}) > 15 and len(centre) == 2
    assert is_plot(tmp_path / "surface.png")


def test_gradients(trained, tmp_path):
    folders = [str(trained / name) for name in ("adam", "ga_sam")]
    assert main(["gradients", *folders, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "gradients.tsv")
    found = {(row["run"], row["by"], row["group"]) for row in rows}
    assert found == {
        (run, by, group)
        for run in ("adam", "ga_sam")
        for by, group in (
            ("epoch", "all"), ("epoch", "encoder"), ("epoch", "decoder"), ("layer", "encoder"), ("layer", "decoder"),
        )
    }  # fmt: skip
    assert is_plot(tmp_path / "gradients.png")


def test_settings_are_beside_the_tables(checkpoints, trained, translation_data, tmp_path):
    words = ["--num-batches", "2", "--max-tokens", "150", "--seed", "7", "--out", str(tmp_path)]
    assert main(["sharpness", *checkpoints, "--radii", "0.1", "--kinds", "ascent", *words]) == 0
    whole = json.loads((tmp_path / "sharpness.json").read_text())
    (found,) = whole["runs"]
    assert (whole["command"], found["fairseq_sam"]) == ("sharpness", fairseq_sam.__version__)
    assert all(model["finished"] for model in found["measured"])
    expected = {"subset": "valid", "num_batches": 2, "max_tokens": 150, "seed": 7, "radii": [0.1], "norm": "l2"}
    assert expected.items() <= found["flags"].items()
    for path, model in zip(checkpoints, found["measured"], strict=True):
        assert model["checkpoint"] == path and Path(model["data"]) == translation_data and model["batches"] == 2
        assert model["weights"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    assert len({model["batches digest"] for model in found["measured"]}) == 1
    again = ["sharpness", checkpoints[0], "--radii", "0.1", "--kinds", "ascent", *words, "--seed", "8"]
    assert main([*again, "--overwrite"]) == 0
    (last,) = json.loads((tmp_path / "sharpness.json").read_text())["runs"]
    (other,) = last["measured"]
    assert last["flags"]["seed"] == 8 and other["batches digest"] != found["measured"][0]["batches digest"]
    assert main(["gradients", str(trained / "adam"), "--out", str(tmp_path)]) == 0
    (log,) = json.loads((tmp_path / "gradients.json").read_text())["runs"][0]["measured"]
    assert log["log"] == str(trained / "adam" / "gradients.jsonl") and log["name"] == "adam"


def answers(path, output):
    """What a classifier or regression says of its validation split, and the labels."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path])
    task.load_dataset("valid")
    found, labels = [], []
    for batch in task.get_batch_iterator(task.dataset("valid"), max_sentences=4).next_epoch_itr(shuffle=False):
        inputs = {**batch["net_input"], "features_only": True}
        logits, _ = model.eval()(**inputs, classification_head_name="sentence_classification_head")
        found += output(logits).reshape(-1).tolist()
        labels += batch["target"].reshape(-1).tolist()
    return found, labels


ROUNDING = 0.051  # fairseq's, of scores that are no means


def test_robustness_of_several_tasks(checkpoints, classifiers, tmp_path):
    """Each model has the scores of its own task; lists of predictions are none."""
    words = ["--l2", "0.1", "1", "--linf", "--steps", "1", "--out", str(tmp_path)]
    assert main(["robustness", *classifiers, checkpoints[0], *words]) == 0
    rows = {row["model"]: row for row in rows_of(tmp_path / "robustness.tsv") if row["radius"] == "0"}
    found, labels = answers(classifiers[0], lambda logits: logits.argmax(1))
    scores = {"accuracy": accuracy_score, "f1": f1_score, "mcc": matthews_corrcoef}
    for name, score in scores.items():
        assert float(rows["classes"][name]) == pytest.approx(
            100 * score(labels, found), abs=1e-3 if name == "accuracy" else ROUNDING
        ), name
    values, targets = answers(classifiers[1], lambda logits: logits)
    for name, score in {"pearson": pearsonr, "spearman": spearmanr}.items():
        assert float(rows["scores"][name]) == pytest.approx(100 * score(values, targets)[0], abs=ROUNDING), name
    assert not {"pred", "targ"} & rows["classes"].keys() and rows["adam"]["f1"] == rows["classes"]["ppl"] == ""
    assert is_plot(tmp_path / "robustness.png")


def test_other_tasks(language_model_data, classification_data, tmp_path):
    """Perplexity of a language model, accuracy of a classifier."""
    small = ["--decoder-embed-dim", "16", "--decoder-hidden-size", "16", "--decoder-out-embed-dim", "16"]
    flags = ["--task", "language_modeling", "--arch", "lstm_lm", *small, "--tokens-per-sample", "32"]
    runs.train(language_model_data, tmp_path / "lm", *flags, "--optimizer", "adam", "--max-update", "3")
    flags = ["--task", "sentence_prediction", "--arch", "textcnn", "--num-classes", "2", "--num-filters", "8"]
    flags += ["--embed-dim", "16", "--criterion", "sentence_prediction"]
    runs.train(classification_data, tmp_path / "classes", *flags, "--optimizer", "adam", "--max-update", "3")
    for name, score in (("lm", "ppl"), ("classes", "accuracy")):
        words = ["--l2", "0.1", "--linf", "--steps", "1", "--out", str(tmp_path / name)]
        assert main(["robustness", str(tmp_path / name / "checkpoint_last.pt"), *words]) == 0
        assert score in rows_of(tmp_path / name / "robustness.tsv")[0]
        words = ["--top", "2", "--steps", "4", "--instances", "3", "--samples", "2", "--density-steps", "3"]
        words += ["--out", str(tmp_path / name)]
        assert main(["spectrum", str(tmp_path / name / "checkpoint_last.pt"), *words]) == 0
        assert main([
            "epsilon", str(tmp_path / name / "checkpoint_last.pt"), "--num-batches", "1", "--max-tokens", "300",
            "--fresh", "--out", str(tmp_path / name),
        ]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("words", "calls", "rows"),
    [
        (["robustness", "--l2", "0.1", "0.2", "--linf", "--steps", "2"], 5, 2),  # the model as it is and 0.1
        (["sharpness", "--kinds", "ascent", "worst", "--radii", "0.1", "0.2", "--steps", "2"], 4, 3),
        (["epsilon", "--num-batches", "1"], 4, 4),
        (["spectrum", "--parts", "hessian", "trace", "--top", "2", "--steps", "4", "--samples", "5"], 5, 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_was_measured_before_an_interrupt_is_in_the_table(
    checkpoints, tmp_path, monkeypatch, capsys, words, calls, rows
):
    show, number = common.Progress.__call__, []

    def interrupted(self, *args):
        show(self, *args)
        number.append(args)
        if len(number) == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(common.Progress, "__call__", interrupted)
    assert main([words[0], checkpoints[0], *words[1:], "--out", str(tmp_path)]) == 130
    assert "stopped" in capsys.readouterr().err
    assert is_plot(tmp_path / f"{words[0]}.png"), "of what was measured"
    table = tmp_path / {"spectrum": "eigenvalues.tsv"}.get(words[0], f"{words[0]}.tsv")
    assert len(rows_of(table)) == rows
    (run,) = json.loads((tmp_path / f"{words[0]}.json").read_text())["runs"]
    assert run["measured"][0]["finished"] is False


def test_a_model_of_another_plugin(translation_data, tmp_path):
    """``--user-dir`` makes fairseq know it; without it the command says that the model is not known."""
    plugin = tmp_path / "other_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(
        "from fairseq.models import register_model_architecture\n"
        "from fairseq.models.transformer import tiny_architecture\n\n\n"
        "@register_model_architecture('transformer', 'transformer_elsewhere')\n"
        "def small(args):\n    tiny_architecture(args)\n"
    )
    flags = ["--user-dir", str(plugin), "--task", "translation", "--arch", "transformer_elsewhere"]
    command = [sys.executable, "-m", "fairseq_cli.train", str(translation_data), *flags, "--cpu", "--max-tokens", "200"]
    command += ["--optimizer", "adam", "--max-update", "1", "--lr", "1e-3", "--save-dir", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True)
    measured = [sys.executable, "-m", "fairseq_sam", "sharpness", str(tmp_path / "run" / "checkpoint_last.pt")]
    measured += ["--kinds", "ascent", "--radii", "0.1", "--cpu", "--out", str(tmp_path / "out")]
    found = subprocess.run([*measured, "--user-dir", str(plugin)], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert len(rows_of(tmp_path / "out" / "sharpness.tsv")) == 1
    found = subprocess.run([*measured, "--overwrite"], check=False, capture_output=True, text=True)
    assert found.returncode == 2 and "--user-dir" in found.stderr, found.stderr


def test_tables_of_an_earlier_run_are_not_overwritten_unasked(checkpoints, tmp_path, capsys):
    """They would be lost, or stand beside those of other settings."""
    words = ["--samples", "2", "--density-steps", "3", "--num-batches", "1", "--out", str(tmp_path)]
    assert main(["spectrum", checkpoints[0], "--parts", "trace", "density", *words]) == 0
    before = (tmp_path / "trace.tsv").read_bytes(), (tmp_path / "spectrum.json").read_bytes()
    short = [*words[:2], *words[4:]]
    assert main(["spectrum", checkpoints[1], "--parts", "trace", *short]) == 2
    error = capsys.readouterr().err
    assert f"--out {tmp_path} holds trace.tsv, density.tsv, spectrum.png of an earlier run; take another" in error
    assert before == ((tmp_path / "trace.tsv").read_bytes(), (tmp_path / "spectrum.json").read_bytes())
    assert main(["spectrum", checkpoints[1], "--parts", "trace", *short, "--overwrite"]) == 0
    assert rows_of(tmp_path / "trace.tsv")[0]["model"] == "ga_sam" and not (tmp_path / "density.tsv").exists()


def test_earlier_tables_stay_until_the_models_are_read(checkpoints, tmp_path, capsys):
    words = ["--kinds", "ascent", "--radii", "0.1", "--num-batches", "1", "--out", str(tmp_path)]
    assert main(["sharpness", checkpoints[0], *words]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for broken in (["nowhere.pt"], [checkpoints[0], "--subset", "nowhere"]):
        assert main(["sharpness", *broken, *words, "--overwrite"]) == 2
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "refused",
    [
        ["spectrum", "--parts", "fisher", "--top", "2", "--instances", "100000", "--fisher-top", "99999"],
        ["robustness", "--attack-subset", "nowhere", "--l2", "0.1", "--linf", "0.001"],
    ],
    ids=["spectrum", "robustness"],
)
def test_earlier_tables_stay_until_there_are_others(checkpoints, tmp_path, refused):
    """A command that is refused when its models are read has measured nothing."""
    parts = ["--parts", "trace", "--samples", "2"] if refused[0] == "spectrum" else ["--l2", "0.1", "--linf", "0.001"]
    common_words = ["--num-batches", "1", "--out", str(tmp_path)]
    assert main([refused[0], checkpoints[0], *parts, *common_words]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([refused[0], checkpoints[0], *refused[1:], *common_words, "--overwrite"]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_average_sharpness_where_the_loss_overflows(checkpoints, tmp_path):
    words = ["--kinds", "average", "--directions", "2", "--radii", "0.1", "1e30", "--num-batches", "1"]
    assert main(["sharpness", checkpoints[0], *words, "--out", str(tmp_path)]) == 0
    first, second = rows_of(tmp_path / "sharpness.tsv")
    assert math.isfinite(float(first["sharpness"])) and not math.isfinite(float(second["sharpness"]))


@pytest.mark.parametrize("words", [["robustness", "--steps", "2"], ["landscape", "--points", "3"]])
def test_an_interrupt_before_there_is_anything_to_draw(checkpoints, tmp_path, monkeypatch, capsys, words):
    """After the first row, of which no panel can be made."""

    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Progress, "__call__", interrupted)
    assert main([words[0], checkpoints[0], *words[1:], "--num-batches", "1", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_damaged_model_is_found_before_another_is_measured(checkpoints, tmp_path, capsys):
    cut = tmp_path / "cut.pt"
    cut.write_bytes(Path(checkpoints[1]).read_bytes()[:5000])
    assert main(["sharpness", checkpoints[0], str(cut), "--out", str(tmp_path / "out")]) == 2
    assert str(cut) in capsys.readouterr().err and not (tmp_path / "out" / "sharpness.tsv").exists()


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", stop)
    assert main(["sharpness", "a.pt", "--out", "out"]) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and f"fairseq-sam {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["robustness", "nowhere.pt"], "nowhere.pt, which is no file"),
        (["robustness", "{0}", "--names", "a", "b"], "--names must be 1 different names"),
        (["robustness", "{0}", "{0}"], "two of the files are the same"),
        (["robustness", "{0}", "--subset", "nothing"], "--subset nothing"),
        (["robustness", "{0}", "--data", "nowhere"], "nowhere"),
        (["robustness", "{0}", "--l2", "-1"], "--l2: must be a finite number > 0, got -1"),
        (["robustness", "{0}", "--steps", "0"], "--steps: must be an integer >= 1, got 0"),
        (["spectrum", "{0}", "--parts", "hessian", "--top", "1000000"], "k (--top) must be an integer from 1 to"),
        (["spectrum", "{0}", "--parts", "trace", "--samples", "1"], "--samples: must be an integer >= 2, got 1"),
        (["spectrum", "{0}", "--exclude", "."], "exclude"),
        (["sharpness", "{0}", "--radii", "0"], "--radii: must be a finite number > 0, got 0"),
        (["landscape", "{0}", "--points", "0"], "--points: must be an integer >= 2, got 0"),
        (["landscape", "{0}", "--before", "nowhere.pt"], "nowhere.pt"),
        (["epsilon", "{0}", "--fraction", "0"], "--fraction: must be a finite number > 0, got 0 "),
        (["epsilon", "{0}", "--norm", "l0"], "norm"),
    ],
)
def test_errors_are_one_line(checkpoints, tmp_path, capsys, words, error):
    words = [word.format(*checkpoints) for word in words]
    assert main([*words, "--out", str(tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("fairseq-sam: error: ") and error in lines[0], lines
