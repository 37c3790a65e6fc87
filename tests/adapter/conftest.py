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
