"""Results of the parts of a batch, joined into that of the whole."""

import numpy as np
import torch

from fairseq_sam.adapter.batches import Pass, joined, resized


def part(number: int) -> Pass:
    return Pass(
        torch.tensor(1.5),
        number,
        {
            "loss": torch.tensor([2.0]),  # the adaptive loss logs it so
            "ntokens": 10,
            "counts": np.int64(3),
            "pred": [0, 1],
            "scores": torch.ones(number, 2),
            "array": np.ones(number),
            "name": "valid",
            "regression": False,
            "nothing": None,
        },
    )


def test_counts_add_up_and_predictions_are_strung_together():
    whole = joined([part(2), part(3)])
    assert float(whole.loss) == 3.0 and whole.sample_size == 5
    log = whole.logging_output
    assert log["loss"].tolist() == [4.0] and log["ntokens"] == 20 and log["counts"] == 6
    assert log["pred"] == [0, 1, 0, 1] and log["scores"].shape == (5, 2) and log["array"].shape == (5,)
    assert log["name"] == "valid" and log["regression"] is False and log["nothing"] is None


def test_one_part_is_the_whole():
    only = part(2)
    assert joined([only]) is only


def test_a_part_is_brought_to_the_size_of_the_whole():
    """What fairseq divides by the counts stays, and the counts, from which it takes words per second, are right."""
    quarter, whole = part(2), joined([part(2), part(2), part(4)])
    found = resized(quarter, whole)
    assert float(found.loss) == 4 * 1.5 and found.sample_size == 8
    log = found.logging_output
    assert log["ntokens"] == 30 and log["loss"].tolist() == [8.0] and log["counts"] == 12
    assert log["pred"] == [0, 1] and log["name"] == "valid" and log["regression"] is False
    assert resized(quarter, quarter) is quarter
