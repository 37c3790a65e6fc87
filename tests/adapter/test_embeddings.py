"""Word embeddings of fairseq's models: which modules, how many calls, which positions."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.modules import LearnedPositionalEmbedding
from torch import nn

from fairseq_sam.adapter.embeddings import word_embeddings
from tests.adapter import runs
from tests.adapter.test_tasks import RECIPES

CUTOFFS = ["--adaptive-input", "--adaptive-input-cutoff", "50,200", "--tie-adaptive-weights"]
CHARACTERS = ["--character-embeddings", "--character-filters", "[(1, 8), (2, 8)]", "--character-embedding-dim", "4"]
SIDES = ("src_tokens", "prev_output_tokens")
# Recipe, number of modules, number of calls.
CASES = {
    "transformer": ("translation", runs.TRANSLATION, 2, 2),
    "shared": ("joined", [*runs.TRANSLATION, "--share-all-embeddings"], 1, 2),
    "lstm_translation": (*RECIPES["lstm_translation"], 2, 2),
    "activation_checkpointing": (*RECIPES["activation_checkpointing"], 2, 2),
    "bart": (*RECIPES["denoising"], 1, 2),
    "transformer_lm": (*RECIPES["transformer_lm"], 1, 1),
    "adaptive_input": ("lm", [*RECIPES["transformer_lm_adaptive"][1], *CUTOFFS], 1, 1),
    "characters": ("lm", [*RECIPES["transformer_lm"][1], *CHARACTERS], 1, 1),
    "lstm_lm": (*RECIPES["lstm_lm"], 1, 1),
    "roberta": (*RECIPES["masked_lm"], 1, 1),
    "roberta_classification": (*RECIPES["sentence_prediction"], 1, 1),
}


@pytest.fixture(scope="module")
def joined_data(text_folder, translation_data):
    languages = ("--source-lang", "src", "--target-lang", "tgt")
    runs.preprocess(text_folder, text_folder / "joined-bin", *languages, "--joined-dictionary")
    return text_folder / "joined-bin"


@pytest.fixture
def built(request, translation_data, language_model_data, classification_data, joined_data):
    """Model, task, input with padding in it, number of modules and of calls of one case."""
    kind, flags, num_modules, num_calls = CASES[request.param]
    data = {"translation": translation_data, "lm": language_model_data, "cls": classification_data}
    trainer, batches = runs.build_trainer({**data, "joined": joined_data}[kind], *flags, "--optimizer", "adam")
    words = batches[0]["net_input"]
    for side in SIDES[:num_calls]:
        words[side][0, -1] = trainer.task.source_dictionary.pad()
    return trainer.model.eval(), trainer.task, words, num_modules, num_calls


@pytest.mark.parametrize("built", CASES, indirect=True)
def test_calls_and_padding(built):
    model, task, words, num_modules, num_calls = built
    embeddings = word_embeddings(nn.ModuleDict({"module": model}), task)
    seen = []

    def record(call, is_token, output):
        seen.append((call, is_token, output.shape))
        return output + 0.0 * output

    clean = model(**words)[0]
    with embeddings.perturbed(record):
        found = model(**words)[0]
    assert torch.equal(clean, found)
    assert len(embeddings.modules) == num_modules and [call for call, _, _ in seen] == list(range(num_calls))
    for (_, is_token, shape), side in zip(seen, SIDES, strict=False):
        wanted = words[side].ne(task.source_dictionary.pad()).unsqueeze(-1)
        if type(model).__name__ == "LSTMModel":  # its encoder moves padding to the right before it embeds
            is_token, wanted = is_token.sum(dim=1), wanted.sum(dim=1)
        assert torch.equal(is_token, wanted) and not words[side].ne(task.source_dictionary.pad()).all()
        assert shape[:-1] == words[side].shape
    assert not any(module._forward_hooks for module in embeddings.modules)


@pytest.mark.parametrize("built", ["transformer", "shared", "bart", "lstm_translation"], indirect=True)
@pytest.mark.parametrize("side", [0, 1])
def test_both_sides_reach_the_output(built, side):
    model, task, words, *_ = built
    clean = model(**words)[0]
    with word_embeddings(model, task).perturbed(lambda call, _, output: output + (0.1 if call == side else 0.0)):
        found = model(**words)[0]
    assert not torch.equal(clean, found)


@pytest.mark.parametrize("built", ["shared"], indirect=True)
def test_no_hook_remains_after_an_exception(built):
    model, task, words, *_ = built

    def fails(call, is_token, output):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), word_embeddings(model, task).perturbed(fails):
        model(**words)
    assert not any(module._forward_hooks for module in model.modules())


class Unnamed(nn.Module):
    """No ``embed_tokens``; positions and segments are as many as words."""

    def __init__(self, num_words):
        super().__init__()
        self.words = nn.Embedding(num_words, 2)
        self.embed_positions = LearnedPositionalEmbedding(num_words, 2, None)
        self.learned = LearnedPositionalEmbedding(num_words, 2, None)
        self.position_embedding = nn.Embedding(num_words, 2)
        self.segment_embeddings = nn.Embedding(num_words, 2)
        self.labels = nn.Embedding(num_words + 1, 2)


def dictionary(num_words):
    words = Dictionary()
    for number in range(num_words):
        words.add_symbol(str(number))
    return words


def test_models_without_the_usual_name():
    class Task:
        target_dictionary = None
        dicts = {"de": dictionary(4)}  # noqa: RUF012

        @property
        def source_dictionary(self):
            raise NotImplementedError

    model = Unnamed(len(Task.dicts["de"]))
    found = word_embeddings(model, Task())
    assert found.modules == (model.words,) and found.padding == Task.dicts["de"].pad()


def test_none_found_is_refused():
    task = SimpleNamespace(source_dictionary=dictionary(4), target_dictionary=None)
    with pytest.raises(ValueError, match=r"no word embeddings in Unnamed.*embed_tokens.*\(8\)"):
        word_embeddings(Unnamed(30), task)
    with pytest.raises(ValueError, match="it has none"):
        word_embeddings(Unnamed(30), SimpleNamespace())
