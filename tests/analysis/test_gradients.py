"""Gradient norms by epoch and by layer."""

import json

import pytest

from fairseq_sam.analysis.gradients import layer_of, norms_by_epoch, norms_by_layer, read_gradients, stack_of

NAMES = ("encoder.layers.0.fc1.weight", "encoder.layers.0.fc1.bias", "decoder.layers.1.fc1.weight", "classifier.weight")


def write(path, rows):
    lines = [
        json.dumps({"epoch": e, "update": u, "norm": n, "norms": dict(zip(NAMES, parts, strict=True))})
        for e, u, n, parts in rows
    ]
    path.write_text("\n".join(lines) + '\n{"epoch": 3, "upd')
    return path


def test_means_by_epoch_and_layer(tmp_path):
    path = write(
        tmp_path / "log", [(1, 5, 13.0, (3, 4, 12, 0)), (1, 10, 7.0, (0, 5, 0, 1)), (2, 15, 2.0, (0, 0, 2, 0))]
    )
    gradients = read_gradients(path)
    assert [g.update for g in gradients] == [5, 10, 15]
    assert norms_by_epoch(gradients) == {
        "all": {1: 10.0, 2: 2.0},
        "classifier": {1: 0.5, 2: 0.0},
        "decoder": {1: 6.0, 2: 2.0},
        "encoder": {1: 5.0, 2: 0.0},
    }
    assert norms_by_layer(gradients) == {"decoder": {2: 14 / 3}, "encoder": {1: 10 / 3}}


def test_names_of_layers():
    assert layer_of("decoder.sentence_encoder.layers.11.fc1.bias") == ("sentence_encoder", 12)
    assert layer_of("decoder.lstm.weight") is None and stack_of("decoder.lstm.weight") == "decoder"


BAD_ROWS = [
    '{"epoch": 1, "update": 1, "norm": 1.0, "norms": {"w": "large"}}\n',
    '{"epoch": 1, "update": 1, "norm": 1.0, "norms": {"w": null}}\n',
    '{"epoch": 1, "update": 1, "norm": "large", "norms": {"w": 1.0}}\n',
    '{"epoch": 1, "update": 1, "norm": NaN, "norms": {"w": 1.0}}\n',
    '{"epoch": 1, "update": 1, "norm": 1.0, "norms": {"w": -1.0}}\n',
    '{"epoch": 1, "update": 1, "norm": 1.0, "norms": [1.0]}\n',
    '{"epoch": Infinity, "update": 1, "norm": 1.0, "norms": {}}\n',
]


@pytest.mark.parametrize("text", ["", "nothing here\n", '{"epoch": 1}\n', "[1, 2]\n", *BAD_ROWS])
def test_not_a_log(tmp_path, text):
    (tmp_path / "log").write_text(text)
    with pytest.raises(ValueError, match="expected a log of --sam-gradient-log"):
        read_gradients(tmp_path / "log")
