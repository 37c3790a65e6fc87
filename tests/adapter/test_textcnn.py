"""TextCNN on the sentence-prediction task."""

import pytest
import torch
from fairseq.data import Dictionary

import fairseq_sam.models.textcnn  # noqa: F401
from fairseq_sam.models.textcnn import TextCNN, TextCNNConfig
from tests.adapter import runs

FLAGS = [
    "--task", "sentence_prediction", "--num-classes", "2", "--arch", "textcnn", "--embed-dim", "12",
    "--num-filters", "6", "--criterion", "sentence_prediction", "--dropout", "0.2",
]  # fmt: skip


def small(widths=(2, 3)):
    torch.manual_seed(0)
    model = TextCNN(num_words=30, padding=1, embed_dim=8, widths=list(widths), num_filters=5, dropout=0.0).double()
    model.register_classification_head("head", num_classes=3)
    return model.double().eval()


def by_hand(model, words):
    """Each window of each filter in a Python loop, one sentence."""
    embedded = [model.embed.weight[word] for word in words]
    pooled = []
    for convolution in model.convolutions:
        width = convolution.kernel_size[0]
        padded = embedded + [torch.zeros_like(embedded[0])] * max(width - len(words), 0)
        windows = [torch.stack(padded[start : start + width], 1) for start in range(len(padded) - width + 1)]
        answers = [(convolution.weight * window).sum((1, 2)) + convolution.bias for window in windows]
        pooled.append(torch.stack(answers).amax(0).clamp(min=0))
    return model.classification_heads["head"](torch.cat(pooled))


@pytest.mark.parametrize("padding", ["right", "left", "both"])
def test_a_prediction_is_that_of_the_sentence_alone(padding):
    model = small((2, 3, 7))
    sentences = [[5, 6, 7, 8, 9, 10, 11, 12, 4, 2], [3], [20, 21], [9, 9, 9, 2]]
    longest = max(map(len, sentences)) + 3
    rows = []
    for sentence in sentences:
        spare = longest - len(sentence)
        left = {"right": 0, "left": spare, "both": spare // 2}[padding]
        rows.append([1] * left + sentence + [1] * (spare - left))
    found, _ = model(src_tokens=torch.tensor(rows), src_lengths=None, classification_head_name="head")
    for row, sentence in zip(found, sentences, strict=True):
        torch.testing.assert_close(row, by_hand(model, sentence))


def test_features_without_a_head_and_the_paper_s_sizes():
    model = small()
    features, _ = model(src_tokens=torch.tensor([[4, 5, 6]]), features_only=True)
    assert features.shape == (1, 10)
    paper = runs.configuration(["/nowhere", "--user-dir", runs.PLUGIN, "--task", "sentence_prediction",
                                "--num-classes", "2", "--arch", "textcnn", "--criterion", "sentence_prediction",
                                "--optimizer", "adam"]).model  # fmt: skip

    class Task:
        source_dictionary = Dictionary()

    model = TextCNN.build_model(paper, Task)
    assert [tuple(c.weight.shape) for c in model.convolutions] == [(500, 500, 3), (500, 500, 4), (500, 500, 5)]


def test_bad_widths():
    with pytest.raises(ValueError, match=r"--filter-widths.*>= 1.*got \[0, 3\]"):
        small((0, 3))
    config = TextCNNConfig(filter_widths="3,a")
    with pytest.raises(ValueError, match=r"--filter-widths.*>= 1.*got '3,a'"):
        TextCNN.build_model(config, type("Task", (), {"source_dictionary": Dictionary()}))


@pytest.mark.parametrize("flags", [["--optimizer", "adam"], ["--optimizer", "ga_sam", "--sam-epsilon", "1e-3"],
                                   ["--optimizer", "delta_sam"]])  # fmt: skip
def test_train_and_load(classification_data, tmp_path, flags):
    state = runs.train(classification_data, tmp_path, *FLAGS, *flags, "--max-update", "3")
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    assert any(name.startswith("classification_heads.sentence_classification_head") for name in state["model"])
