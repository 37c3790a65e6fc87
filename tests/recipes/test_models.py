"""Settings that a recipe's model must heed in training."""

from types import SimpleNamespace

import pytest

pytest.importorskip("fairseq", reason="the models are fairseq's")

import torch
from fairseq.data import Dictionary

from fairseq_sam.models.textcnn import TextCNN
from scripts.recipes.recipe import read_recipe

RATE = 0.5


@pytest.fixture
def model():
    sizes = read_recipe("ga_sam_table1_imdb", "paper").methods["Baseline"]
    assert sizes["dropout"] == RATE
    dictionary = Dictionary()
    for number in range(20):
        dictionary.add_symbol(f"w{number}")
    cfg = SimpleNamespace(embed_dim=8, num_filters=400, filter_widths="3,4,5", dropout=RATE)
    return TextCNN.build_model(cfg, SimpleNamespace(source_dictionary=dictionary))


def test_textcnn_drops_features_in_training(model):
    """Half of the pooled features are gone, the others are doubled; another half each time, none in validation."""
    words = torch.randint(4, 24, (3, 12))
    whole, _ = model.eval()(words)
    again, _ = model(words)
    assert torch.equal(whole, again) and (whole > 0).float().mean() > 0.7
    first, second = (model.train()(words)[0] for _ in range(2))
    assert not torch.equal(first, second)
    for found in (first, second):
        is_kept = found != 0
        torch.testing.assert_close(found[is_kept], whole[is_kept] / (1 - RATE))
        assert is_kept[whole > 0].float().mean().item() == pytest.approx(1 - RATE, abs=0.05)
