"""Hooks on word embeddings of plain PyTorch models."""

import copy

import pytest
import torch
from torch import nn

from fairseq_sam import SharpnessAware
from fairseq_sam.core.embeddings import WordEmbeddings


class TwoSides(nn.Module):
    """Reads two sentences with one table, as an encoder-decoder with shared embeddings does."""

    def __init__(self, padding_idx=0):
        super().__init__()
        self.words = nn.Embedding(7, 3, padding_idx=padding_idx)
        self.alias = self.words

    def forward(self, source, target):
        return self.words(source).sum(dim=1), self.alias(input=target).sum(dim=1)


SOURCE = torch.tensor([[1, 2, 3], [4, 0, 0]])
TARGET = torch.tensor([[5, 6], [0, 2]])


def hooks(model):
    return [module for module in model.modules() if module._forward_hooks]


def test_each_call_is_perturbed_and_counted():
    model = TwoSides()
    seen = []

    def perturb(call, is_token, output):
        seen.append((call, is_token))
        return output + (call + 1) * is_token

    clean = model(SOURCE, TARGET)
    embeddings = WordEmbeddings.of(model)
    with embeddings.perturbed(perturb):
        first, second = model(SOURCE, TARGET)
    assert [call for call, _ in seen] == [0, 1] and len(embeddings.modules) == 1
    assert torch.equal(seen[0][1], SOURCE.ne(0).unsqueeze(-1)) and torch.equal(seen[1][1], TARGET.ne(0).unsqueeze(-1))
    torch.testing.assert_close(first - clean[0], torch.tensor([[3.0], [1.0]]).expand(2, 3))
    torch.testing.assert_close(second - clean[1], torch.tensor([[4.0], [2.0]]).expand(2, 3))


def test_calls_are_counted_anew_in_every_context():
    model, calls = TwoSides(), []
    embeddings = WordEmbeddings([model.words, model.words])
    for _ in range(2):
        with embeddings.perturbed(lambda call, is_token, output: calls.append(call) or output):
            model(SOURCE, TARGET)
    assert calls == [0, 1, 0, 1]


@pytest.mark.parametrize(("own", "given", "expected"), [(0, 5, 0), (None, 5, 5), (None, None, None)])
def test_padding_is_the_modules_own_then_the_given_one(own, given, expected):
    model, masks = TwoSides(own), []
    with WordEmbeddings([model.words], given).perturbed(lambda _, is_token, output: masks.append(is_token) or output):
        model(SOURCE, TARGET)
    for mask, words in zip(masks, (SOURCE, TARGET), strict=True):
        wanted = torch.ones_like(words, dtype=torch.bool) if expected is None else words.ne(expected)
        assert mask.dtype == torch.bool and torch.equal(mask, wanted.unsqueeze(-1))


def test_no_hook_remains():
    model = TwoSides()
    embeddings = WordEmbeddings.of(model)
    with embeddings.perturbed(lambda call, is_token, output: output):
        assert hooks(model)
    assert not hooks(model) and not hooks(copy.deepcopy(model))
    with pytest.raises(KeyError), embeddings.perturbed(lambda call, is_token, output: output):
        raise KeyError
    assert not hooks(model)

    def fails(call, is_token, output):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), embeddings.perturbed(fails):
        model(SOURCE, TARGET)
    assert not hooks(model)


def test_what_cannot_be_perturbed_is_refused():
    with pytest.raises(ValueError, match="Linear has no nn"):
        WordEmbeddings.of(nn.Linear(2, 2))
    with WordEmbeddings([linear := nn.Linear(2, 2)]).perturbed(lambda call, is_token, output: output):
        with pytest.raises(ValueError, match="adds one axis"):
            linear(torch.ones(3, 2))


def test_a_plain_loop_names_its_word_embeddings():
    """Positions are embedded too; only what is listed is attacked."""

    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.positions, self.out = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 1)

        def forward(self, words):
            return self.out(torch.tanh(self.words(words) + self.positions(torch.arange(5).expand_as(words)))).mean()

    model = Positioned()
    sam = SharpnessAware(
        torch.optim.SGD(model.parameters(), lr=0.0), model, "freelb", embeddings=WordEmbeddings([model.words])
    )
    seen = []
    model.out.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))

    def closure():
        loss = model(torch.ones(2, 5, dtype=torch.long))
        loss.backward()
        return loss

    sam.step(closure)
    clean = torch.tanh(model.words(torch.ones(2, 5, dtype=torch.long)) + model.positions(torch.arange(5)))
    assert all(0 < float((passed - clean).abs().max()) <= 0.02 * 1.001 for passed in seen) and len(seen) == 2
    plain = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"SharpnessAware\(\.\.\., embeddings=WordEmbeddings"):
        SharpnessAware(torch.optim.SGD(plain.parameters(), lr=0.1), plain, "freelb")
