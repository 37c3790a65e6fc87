"""Measurements of ``fairseq_sam.analysis`` on a fairseq checkpoint and a split of its data."""

import math
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from torch import Tensor, nn

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
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], {"data": str(data)})
    task.load_dataset(subset)
    iterator = task.get_batch_iterator(task.dataset(subset), max_tokens=max_tokens)
    criterion = CrossEntropyCriterion(task, sentence_avg=False)
    use_cuda = torch.cuda.is_available() and not cpu
    batches = [utils.move_to_cuda(b) if use_cuda else b for b in iterator.next_epoch_itr(shuffle=False)]

    def loss_sum(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        loss, num_tokens, _ = criterion(model, batch)
        return loss / math.log(2), float(num_tokens)

    model = models[0].cuda() if use_cuda else models[0]
    return ascent_sharpness(model, batches, loss_sum, epsilon=epsilon, norm=norm)
