"""Generated data for the adapter's tests, once per run."""

import pytest

pytest.importorskip("fairseq", reason="the adapter's tests need fairseq; core and analysis are tested without it")

import fairseq_sam  # noqa: F401
from tests.adapter import runs


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def translation_data(text_folder):
    return runs.write_translation_data(text_folder)


@pytest.fixture(scope="session")
def language_model_data(text_folder, translation_data):
    return runs.write_monolingual_data(text_folder)


@pytest.fixture(scope="session")
def classification_data(text_folder, translation_data):
    return runs.write_classification_data(text_folder)


@pytest.fixture(scope="session")
def trained(translation_data, tmp_path_factory):
    """Two runs to be analysed, with logs of their gradients: Adam and GA-SAM."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("adam", ["--sam-epsilon", "0"]), ("ga_sam", ["--sam-norm", "linf", "--sam-epsilon", "1e-3"])):
        runs.train(
            translation_data, folder / name, *runs.TRANSLATION, "--optimizer", "ga_sam", *flags, "--max-update", "9",
            "--sam-gradient-log", "1", "--no-epoch-checkpoints",
        )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def checkpoints(trained):
    return [str(trained / name / "checkpoint_last.pt") for name in ("adam", "ga_sam")]


@pytest.fixture(scope="session")
def classifiers(classification_data, tmp_path_factory):
    """Checkpoints of a classifier that reports accuracy, F1 and MCC, and of a regression with its correlations."""
    folder = tmp_path_factory.mktemp("classes")
    common = ["--task", "sentence_prediction", "--arch", "textcnn", "--num-filters", "8", "--embed-dim", "16"]
    common += ["--criterion", "sentence_prediction", "--optimizer", "adam", "--max-update", "14", "--lr", "0.03"]
    for name, flags in (
        ("classes", ["--num-classes", "2", "--report-acc-and-f1", "--report-mcc"]),
        ("scores", ["--num-classes", "1", "--regression-target", "--report-pearson-and-spearman"]),
    ):
        runs.train(classification_data, folder / name, *common, *flags)
    return [str(folder / name / "checkpoint_last.pt") for name in ("classes", "scores")]
