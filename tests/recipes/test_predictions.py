"""Fine-tune and predict, end to end: pairs, a regression, spans, choices; on the data of another task."""

import json
import logging
import sys
from functools import cache

import pytest
import torch
from fairseq.logging import metrics

import fairseq_sam.tasks.span_prediction  # noqa: F401  registers the task
from fairseq_sam.adapter.probes import probe
from fairseq_sam.analysis.scores import METRICS, accuracy
from scripts import predict as command
from scripts.recipes import glue, predictions
from scripts.recipes.predictions import Folder, Prediction, predict, score
from scripts.recipes.subwords import TokenizerFile
from tests.adapter import runs
from tests.recipes import glue_files

RUNS = {
    "RTE": ["--optimizer", "sam"],
    "CB": ["--optimizer", "adam"],
    "CoLA": ["--optimizer", "adam"],
    "STS-B": ["--optimizer", "delta_sam"],
    "WiC": ["--optimizer", "delta_sam"],
    "WSC": ["--optimizer", "sam"],
    "COPA": ["--optimizer", "delta_sam"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A function that gives the checkpoint and the folder of a task, trained when first asked for."""
    tokens = glue_files.write_wordpiece(tmp_path_factory.mktemp("tokens"))
    data, saved = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("saved")

    @cache
    def folder(name):
        return glue_files.prepared(data, name, tokens)

    @cache
    def checkpoint(name):
        flags = [
            *glue_files.flags_of(name),
            *RUNS[name],
            "--max-epoch",
            "2",
            "--batch-size",
            "6",
            "--no-epoch-checkpoints",
        ]
        runs.train(folder(name), saved / name, *flags)
        return saved / name / "checkpoint_last.pt"

    checkpoint.folder = folder
    return checkpoint


def validated(name, folder, checkpoint):
    """What fairseq's own criterion finds on the validation set, all instances in one batch."""
    trainer, _ = runs.build_trainer(folder, *glue_files.flags_of(name), *RUNS[name])
    trainer.model.load_state_dict(runs.load(checkpoint)["model"])
    trainer.task.load_dataset("valid")
    dataset = trainer.task.dataset("valid")
    with metrics.aggregate(new_root=True) as found:
        _, _, log = trainer.task.valid_step(
            dataset.collater([dataset[n] for n in range(len(dataset))]), trainer.model, trainer.criterion
        )
        type(trainer.criterion).reduce_metrics([log])
    return found.get_smoothed_values()


@pytest.mark.parametrize("name", RUNS)
def test_train_and_predict(places, name):
    """Every instance once, in order, with the scores that fairseq finds."""
    folder = Folder(places.folder(name))
    found = predict(places(name), folder, "valid", cpu=True, batch_size=5)
    assert [each.id for each in found] == list(range(13))
    path = glue.find_file(folder.task, places.folder(name).parent, "valid")
    instances = glue.read_file(folder.task, path, "valid").instances
    if name == "STS-B":
        assert [each.target for each in found] == pytest.approx([float(each.answer) for each in instances])
        assert all(isinstance(each.prediction, float) and each.scores == () for each in found)
    else:
        assert [each.target for each in found] == [each.answer for each in instances]
        for each in found:
            assert sum(each.scores) == pytest.approx(1.0, abs=1e-5) and len(each.scores) == len(folder.task.labels)
            assert each.prediction == folder.task.labels[each.scores.index(max(each.scores))]
    mine, theirs = score(folder.task, found), validated(name, places.folder(name), places(name))
    assert list(mine) == list(folder.task.metrics)
    if name == "STS-B":
        assert theirs["pearson"] == pytest.approx(mine["pearson"], abs=0.06)
        # Batches of other sizes round otherwise: two predictions that are nearly the same may change their places.
        assert theirs["spearman"] == pytest.approx(mine["spearman"], abs=1.0)
        loss = sum((each.prediction - each.target) ** 2 for each in found) / 13 / 25
        assert theirs["loss"] * 0.6931 == pytest.approx(loss, abs=2e-3)
    else:
        right = accuracy([each.prediction for each in found], [each.target for each in found])
        assert theirs["accuracy"] == pytest.approx(right, abs=0.06)
    if name == "CoLA":
        assert theirs["mcc"] == pytest.approx(mine["matthews"], abs=0.06)


@pytest.mark.parametrize("name", ["RTE", "STS-B", "WiC", "COPA"])
def test_batches_change_nothing(places, name):
    """Neither how many run together nor the padding that comes of it; none is dropped."""
    folder = Folder(places.folder(name))
    alone = predict(places(name), folder, cpu=True, batch_size=1)
    for size in (2, 8, 100):
        together = predict(places(name), folder, cpu=True, batch_size=size)
        assert len(together) == len(alone) == 13
        for one, other in zip(alone, together, strict=True):
            assert one.id == other.id and one.target == other.target
            assert one.scores == pytest.approx(other.scores, abs=1e-5)
            if name == "STS-B":
                assert one.prediction == pytest.approx(other.prediction, abs=1e-4)


def test_a_split_of_training_data(places):
    found = predict(places("CB"), Folder(places.folder("CB")), "train", cpu=True, batch_size=7)
    assert [each.id for each in found] == list(range(24))


# -- another task ------------------------------------------------------------------------------------------------------


def test_classes_stand_for_labels_of_another_task(places):
    """Three classes of CB to the two labels of RTE; the prediction is the label of the best class."""
    mapping = ["not_entailment", "not_entailment", "entailment"]
    found = predict(places("CB"), Folder(places.folder("RTE")), labels=mapping, cpu=True)
    assert len(found) == 13 and all(len(each.scores) == 3 for each in found)
    for each in found:
        assert each.prediction == mapping[each.scores.index(max(each.scores))]
        assert each.target in ("entailment", "not_entailment")
    turned = predict(
        places("CB"), Folder(places.folder("RTE")), labels=["entailment"] * 2 + ["not_entailment"], cpu=True
    )
    assert all(a.prediction != b.prediction for a, b in zip(found, turned, strict=True))


def test_as_many_classes_stand_for_the_labels_in_their_order(places):
    found = predict(places("RTE"), Folder(places.folder("CoLA")), cpu=True)
    assert {each.prediction for each in found} <= {"0", "1"} and {each.target for each in found} == {"0", "1"}
    assert all(each.prediction == "01"[each.scores[1] > each.scores[0]] for each in found)


def test_classes_stand_for_scores(places):
    found = predict(places("RTE"), Folder(places.folder("STS-B")), labels=["0", "5"], cpu=True)
    for each in found:
        assert each.prediction == pytest.approx(5 * each.scores[1]) and 0 <= each.target <= 5
    assert set(score(glue.TASKS["STS-B"], found)) == {"pearson", "spearman", "pearson_spearman"}


@pytest.mark.parametrize(
    ("model", "data", "labels", "words"),
    [
        (
            "CB",
            "RTE",
            None,
            "the model has 3 classes, and RTE the labels not_entailment, entailment; say with --labels",
        ),
        ("CB", "RTE", ["entailment", "not_entailment"], "3 names with commas; got entailment,not_entailment"),
        ("CB", "RTE", ["yes", "no", "no"], "got yes,no,no"),
        ("RTE", "STS-B", None, "name the score that each stands for, e.g. --labels 0,5"),
        ("CB", "STS-B", ["low", "mean", "high"], "e.g. --labels 0,2.5,5"),
        ("STS-B", "RTE", None, "is a regression; it has no classes for RTE"),
        ("STS-B", "STS-B", ["1"], "is a regression"),
        ("RTE", "WiC", None, "is of the task sentence_prediction, but WiC needs span_prediction"),
    ],
)
def test_what_does_not_fit(places, model, data, labels, words):
    with pytest.raises(ValueError) as caught:
        predict(places(model), Folder(places.folder(data)), labels=labels, cpu=True)
    assert words in str(caught.value)


def test_files_that_do_not_fit(places, tmp_path, language_model_checkpoint):
    folder = Folder(places.folder("RTE"))
    with pytest.raises(ValueError, match=r"has no split test: no input0/test.idx"):
        predict(places("RTE"), folder, "test", cpu=True)
    with pytest.raises(ValueError, match=r"nowhere.pt is no file"):
        predict(tmp_path / "nowhere.pt", folder, cpu=True)
    with pytest.raises(ValueError, match="--batch-size must be >= 1, got 0"):
        predict(places("RTE"), folder, cpu=True, batch_size=0)
    with pytest.raises(ValueError, match=r"has no glue\.json"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match=r"--task must be one of CoLA, .*, got 'XNLI'"):
        Folder(tmp_path, "XNLI")
    with pytest.raises(
        ValueError, match="is of the task language_modeling; predictions need one of sentence_prediction"
    ):
        predict(language_model_checkpoint, folder, cpu=True)


@pytest.fixture
def language_model_checkpoint(places, tmp_path):
    state = runs.load(places("RTE"))
    state["cfg"]["task"]["_name"] = "language_modeling"
    torch.save(state, tmp_path / "lm.pt")
    return tmp_path / "lm.pt"


# -- folders that fairseq-preprocess made ------------------------------------------------------------------------------


def test_labels_in_another_order(places, tmp_path):
    """fairseq-preprocess sorts labels by frequency: the classes are then those of its dictionary."""
    other = tmp_path / "other"
    (other / "label").mkdir(parents=True)
    for name in ("input0", "input1"):
        (other / name).symlink_to(places.folder("RTE") / name)
    (other / "label" / "dict.txt").write_text("entailment 9\nnot_entailment 4\n")
    folder = Folder(other, "RTE")
    assert folder.labels == ("entailment", "not_entailment") and folder.targets("valid") is None
    found = predict(places("RTE"), folder, cpu=True)
    own = predict(places("RTE"), Folder(places.folder("RTE")), cpu=True)
    assert all(a.prediction != b.prediction and a.scores == b.scores for a, b in zip(found, own, strict=True))
    assert all(each.target is None for each in found) and score(folder.task, found) == {}


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_correlation_that_there_is_none_of():
    found = [Prediction(0, 1.0, 2.0), Prediction(1, 3.0, 2.0)]
    assert score(glue.TASKS["STS-B"], found) == {"pearson": None, "spearman": None, "pearson_spearman": None}


def test_the_written_table(tmp_path):
    path = tmp_path / "new" / "predictions.tsv"
    predictions.write(path, [Prediction(0, "a", "b", (0.25, 0.75)), Prediction(1, None, "a", (0.5, 0.5))])
    assert path.read_text() == "id\ttarget\tprediction\tclass0\tclass1\n0\ta\tb\t0.25\t0.75\n1\t\ta\t0.5\t0.5\n"
    predictions.write(path, [Prediction(0, 4.75, 1 / 3)])
    assert path.read_text() == "id\ttarget\tprediction\n0\t4.75\t0.333333\n"


def run_command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    try:
        command.main()
    finally:
        logging.disable(logging.NOTSET)
    return capsys.readouterr().out


def test_the_command(places, tmp_path, monkeypatch, capsys):
    out = tmp_path / "predictions.tsv"
    words = [places("CB"), places.folder("CB"), "--cpu", "--out", out]
    printed = json.loads(run_command(monkeypatch, capsys, *words))
    assert list(printed) == ["task", "split", "instances", "accuracy", "macro_f1", "accuracy_macro_f1"]
    assert (printed["task"], printed["split"], printed["instances"]) == ("CB", "valid", 13)
    lines = out.read_text().splitlines()
    assert len(lines) == 14 and lines[0].split("\t") == ["id", "target", "prediction", "class0", "class1", "class2"]
    right = sum(line.split("\t")[1] == line.split("\t")[2] for line in lines[1:])
    assert printed["accuracy"] == pytest.approx(100 * right / 13)
    words = [places("CB"), places.folder("RTE"), "--cpu", "--out", out]
    with pytest.raises(SystemExit, match="error: the model has 3 classes"):
        run_command(monkeypatch, capsys, *words)
    mapping = "not_entailment, not_entailment, entailment"
    printed = json.loads(run_command(monkeypatch, capsys, *words, "--labels", mapping, "--split", "train"))
    assert printed["task"] == "RTE" and printed["instances"] == 24 and list(printed)[3:] == ["accuracy"]


# -- linear probes -----------------------------------------------------------------------------------------------------


def features(checkpoint, folder, split):
    """First tokens, one instance at a time."""
    trainer, _ = runs.build_trainer(folder, *glue_files.flags_of(Folder(folder).task.name), "--optimizer", "adam")
    model = trainer.model.eval()
    layers = model.encoder.sentence_encoder
    encoder = {name: weight for name, weight in runs.load(checkpoint)["model"].items() if name.startswith("encoder.")}
    assert not torch.nn.Module.load_state_dict(model, encoder, strict=False).unexpected_keys
    trainer.task.load_dataset(split)
    dataset = trainer.task.dataset(split)
    samples = sorted((dataset[number] for number in range(len(dataset))), key=lambda sample: sample["id"])
    with torch.no_grad():
        rows = [layers(sample["net_input.src_tokens"][None])["encoder_out"][0][0, 0] for sample in samples]
    return torch.stack(rows).double()


def test_a_probe_is_a_ridge_regression_on_the_first_token(places):
    """The encoder of RTE on the pairs of STS-B, against the closed form."""
    place = places.folder("STS-B")
    known, new = (features(places("RTE"), place, split) for split in ("train", "valid"))
    mean, deviation = known.mean(0), known.std(0, correction=0)
    known, new = (known - mean) / deviation, (new - mean) / deviation
    answers, wanted = (torch.tensor(Folder(place).targets(split)).double() for split in ("train", "valid"))
    inverse = torch.linalg.inv(known.T @ known + torch.eye(known.shape[1]))
    found = new @ inverse @ known.T @ (answers - answers.mean()) + answers.mean()
    expected = {name: METRICS[name](found.tolist(), wanted.tolist(), "1") for name in ("pearson", "spearman")}
    got = probe(places("RTE"), Folder(place), cpu=True)
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-2)


def test_a_probe_of_classes(places, tmp_path):
    """Two sentences with a label each are told apart, by an encoder that has seen neither of them."""
    (tmp_path / "CoLA").mkdir()
    rows = ["gj04\t0\t*\tthe old cat", "gj04\t1\t*\tunhappily under the green table"]
    for split, number in (("train", 6), ("dev", 4)):
        (tmp_path / "CoLA" / f"{split}.tsv").write_text("\n".join(rows * number) + "\n")
    tokens, task = glue_files.write_wordpiece(tmp_path), glue.TASKS["CoLA"]
    tokenizer = TokenizerFile(tokens / "tokenizer.json")
    glue.prepare(task, glue.find_files(task, tmp_path), tmp_path / "bin", tokens / "dict.txt", tokenizer)
    assert probe(places("CB"), Folder(tmp_path / "bin"), cpu=True) == {"matthews": pytest.approx(100.0)}


def test_probes_are_of_whole_sentences(places):
    with pytest.raises(ValueError, match="WiC is a task of span_prediction, and probes are of whole sentences"):
        probe(places("RTE"), Folder(places.folder("WiC")), cpu=True)
