"""Measurements of ``fairseq_sam.analysis`` on a fairseq checkpoint and a split of its data."""

from pathlib import Path

from fairseq_sam.adapter.trained import Trained
from fairseq_sam.analysis import Sharpness, ascent_sharpness


def checkpoint_sharpness(
    path: str | Path,
    data: str | Path,
    subset: str = "test",
    *,
    epsilon: float,
    norm: str | float = "l2",
    max_tokens: int = 4000,
    cpu: bool = False,
) -> Sharpness:
    """Measure loss and ascent-direction sharpness of a model with token targets (translation, language models).

    Args:
        path: checkpoint.
        data: the task's data folder.
        subset: split of the data; all its sentences count.
        epsilon: how far the weights move, in the norm; > 0.
        norm: ``l2``, ``linf`` or a number in (1, inf].
        max_tokens: batch size.
        cpu: stay on the CPU even if there is a GPU.

    Returns:
        Cross entropy in bits per token, without label smoothing, before and after the move.

    Raises:
        ValueError: if `epsilon` or `norm` is out of range.
    """
    trained = Trained(path, data, cpu=cpu)
    batches = trained.batches(subset, max_tokens=max_tokens)
    return ascent_sharpness(trained.model, batches, trained.loss_sum, epsilon=epsilon, norm=norm)
