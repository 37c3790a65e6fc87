"""Cross entropy of a classification of spans."""

# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor
from torch.nn import functional

from fairseq_sam.adapter.instance_losses import register_instance_losses


@dataclass
class SpanPredictionCriterionConfig(FairseqDataclass):
    """Which head classifies."""

    classification_head_name: str = field(
        default="span_classification_head", metadata={"help": "name of the head that classifies the spans"}
    )


@register_criterion("span_prediction", dataclass=SpanPredictionCriterionConfig)
class SpanPredictionCriterion(FairseqCriterion):
    """Sum of the cross entropies (nats) of a batch of ``--task span_prediction``.

    Args:
        cfg: configuration.
        task: the task.
    """

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(task)
        self.head_name = cfg.classification_head_name

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """Return loss, number of instances, and what is logged."""
        logits = span_logits(model, sample, self.head_name)
        target = sample["target"].view(-1)
        loss = _losses(logits, target).sum()
        log = {
            "loss": loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": len(target),
            "sample_size": len(target),
            "ncorrect": (logits.argmax(dim=1) == target).sum(),
        }
        return loss, len(target), log

    @staticmethod
    def reduce_metrics(logging_outputs: Sequence[dict[str, Any]]) -> None:
        """Log loss (bits per instance) and accuracy (%)."""
        loss, number, correct = (sum(log[key] for log in logging_outputs) for key in ("loss", "nsentences", "ncorrect"))
        metrics.log_scalar("loss", loss / number / math.log(2), number, round=3)
        metrics.log_scalar("accuracy", 100.0 * correct / number, number, round=1)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Whether workers may add up what they log."""
        return True


def span_logits(model: Any, sample: Any, head_name: str) -> Tensor:
    """Run the model on a batch.

    Args:
        model: encoder with a head for spans.
        sample: batch of ``--task span_prediction``.
        head_name: the head's name.

    Returns:
        Scores, shape (N, classes).
    """
    with model.classification_heads[head_name].reading(sample["spans"]):
        logits: Tensor = model(**sample["net_input"], features_only=True, classification_head_name=head_name)[0]
    return logits


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    log_probs = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
    return functional.nll_loss(log_probs, target, reduction="none")


@register_instance_losses(SpanPredictionCriterion)
def _instance_losses(criterion: Any, model: Any, output: Any, sample: Any) -> Tensor:
    return _losses(output[0], sample["target"].view(-1))
