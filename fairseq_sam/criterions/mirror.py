"""Mirror-BERT's contrastive loss of two views of the same sentences (Liu et al. 2021), as the delta-SAM paper uses it.

The defaults are those of the authors' script for sentences, where it says so: ``mirror_sentence_bert.sh`` in their
repository ``cambridgeltl/mirror-bert``.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor, nn
from torch.nn import functional

from fairseq_sam.adapter.embeddings import word_embeddings
from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.instance_losses import register_instance_losses
from fairseq_sam.adapter.workers import torch_ddp
from fairseq_sam.core.method import Method
from fairseq_sam.core.tensors import at_least_float32
from fairseq_sam.core.unperturbed import call_unperturbed, check_descent

POOLINGS = ("cls", "mean")


def pooled(features: Tensor, tokens: Tensor, padding: int, pooling: str) -> Tensor:
    """Make one embedding of each sentence from its tokens' features.

    Args:
        features: shape (sentences, length, width).
        tokens: shape (sentences, length), padded on the right.
        padding: number of the padding symbol.
        pooling: ``cls``, the first token's, or ``mean`` over all tokens, those of begin and end included. Differs from
            Mirror-BERT's code, whose mean has the padding in it: an embedding here does not depend on the batch.

    Returns:
        Shape (sentences, width).
    """
    if pooling == "cls":
        return features[:, 0]
    is_token = tokens.ne(padding).unsqueeze(-1)
    return features.masked_fill(~is_token, 0.0).sum(1) / is_token.sum(1).to(features.dtype)


class InfoNCE(nn.Module):
    """The contrastive loss of N pairs, ``-log exp(s(x, x')/t) / sum over y != x of exp(s(x, y)/t)`` for an x.

    s is the cosine, x' the other view of x's sentence, and y goes over both views of all sentences (Liu et al. 2021,
    eq. 1; NT-Xent). The loss of a sentence is the mean of its views' losses. Alone in its batch it has no negatives,
    and the loss is 0.

    Args:
        temperature: t, > 0.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the losses of the sentences, shape (N,), in float32 or better, from two views of shape (N, width)."""
        number = len(first)
        with torch.autocast(first.device.type, enabled=False):
            views = functional.normalize(at_least_float32(torch.cat([first, second])), dim=1)
            similarities = views @ views.T / self.temperature
            itself = torch.eye(2 * number, dtype=torch.bool, device=views.device)
            twins = torch.arange(2 * number, device=views.device).roll(number)
            losses = functional.cross_entropy(similarities.masked_fill(itself, -math.inf), twins, reduction="none")
        return losses.view(2, number).mean(0)


@dataclass
class MirrorConfig(FairseqDataclass):
    """Flags of ``--criterion mirror``."""

    temperature: float = field(
        default=0.04,
        metadata={"help": "temperature of the contrastive loss, > 0 (default: Mirror-BERT's for sentences)"},
    )
    pooling: ChoiceEnum(POOLINGS) = field(  # type: ignore[valid-type]
        default="mean",
        metadata={"help": "embedding of a sentence: of its first token, or the mean (Mirror-BERT: mean; RoBERTa: cls)"},
    )
    input_noise: float = field(
        default=0.0,
        metadata={
            "help": "scale of uniform noise in [-scale, scale] on the word embeddings of the second view, >= 0 "
            "(delta-SAM, appendix A: 0.1 for Mirror-BERT, 0.2 for Mirror-RoBERTa, searched in 0.01 to 0.5)"
        },
    )
    perturb_one_view: bool = field(
        default=False,
        metadata={"help": "sharpness-aware methods perturb the model for the second view only (delta-SAM 5.3)"},
    )


@register_criterion("mirror", dataclass=MirrorConfig)
class MirrorCriterion(FairseqCriterion):
    """Two views of each sentence are to be closer than views of different sentences.

    The model reads a batch twice. The views differ by dropout masks and, in the second, by what the task masks and by
    noise; without dropout, in evaluation, they are one. The negatives are the other sentences of the micro-batch, on
    the same worker. The loss is summed over sentences; the sample size is their number.

    With ``--perturb-one-view`` the first view is that of the unperturbed weights in all passes, and the ascent's
    gradient is through the second alone: what delta-SAM 5.3 reports on, having found it much better than perturbing
    both. Without it, both views are perturbed, as by any other criterion.

    That noise is put on the second view only is decided here; the paper says "to input embedding".

    Methods that need the losses of instances are possible, since these are well-defined in a given batch. Methods that
    take batches apart are refused: a sentence's loss in a part of its batch, with fewer negatives, is another.

    Args:
        task: the task; its dictionary knows the padding.
        temperature: of the loss.
        pooling: what a sentence's embedding is, see ``pooled``.
        input_noise: largest noise on a number of a word's embedding.
        perturb_one_view: only the second view is perturbed.

    Raises:
        ConfigurationError: if a value is out of range.
    """

    def __init__(self, task: Any, temperature: float, pooling: str, input_noise: float, perturb_one_view: bool) -> None:
        super().__init__(task)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ConfigurationError(f"--temperature must be a finite number > 0 (default 0.04), got {temperature}")
        if not (input_noise >= 0 and math.isfinite(input_noise)):
            raise ConfigurationError(f"--input-noise must be a finite number >= 0 (0: no noise), got {input_noise}")
        self.info_nce = InfoNCE(temperature)
        self.pooling = str(pooling)
        self.input_noise = input_noise
        self.perturb_one_view = perturb_one_view

    @staticmethod
    def check_method(cfg: Any, method: Method) -> None:
        """Refuse sharpness-aware methods that this loss has no sense for.

        Args:
            cfg: the criterion's configuration.
            method: the method.

        Raises:
            ValueError: names the flag and what to choose instead.
        """
        if method.slices:
            raise ValueError(
                f"--criterion mirror contrasts the sentences of a batch with each other, and --optimizer {method.name} "
                f"takes batches apart (ascent {method.ascent}, ascent_fraction {method.ascent_fraction}, m {method.m}, "
                f"mask {method.mask}, descent {method.descent}): a sentence has another loss in a part of its batch, "
                "and none alone; use a method on whole batches, such as --optimizer sam or delta_sam"
            )
        if getattr(cfg, "perturb_one_view", False):
            try:
                check_descent(method)
            except ValueError as error:
                raise ValueError(f"--perturb-one-view: {error}") from None

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Any, Any, Any]:
        """Compute the loss of a batch.

        Args:
            model: gives features of shape (sentences, length, width) when it is called with ``features_only``.
            sample: of the task ``sentence_embedding``: ``net_input``, and ``second_input`` where that differs.
            reduce: sum the losses of the sentences.

        Returns:
            The loss, the number of sentences, and what is logged.
        """
        first = self._first(model, sample["net_input"])
        second = self._second(model, sample.get("second_input", sample["net_input"])) if model.training else first
        losses = self.info_nce(first, second)
        logging_output = {
            "loss": losses.detach().sum(),
            "ntokens": sample["ntokens"],
            "nsentences": len(losses),
            "sample_size": len(losses),
        }
        return losses.sum() if reduce else losses, len(losses), logging_output

    def _first(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        if not self.perturb_one_view:
            return self._pooled(model(**inputs, features_only=True), inputs)
        if any(hasattr(module, "precheckpoint_forward") for module in model.modules()):
            raise ConfigurationError(
                "--perturb-one-view cannot be used with --checkpoint-activations, which would compute the first view "
                "anew at perturbed weights; leave one of them out"
            )
        return self._pooled(call_unperturbed(model, **inputs, features_only=True), inputs)

    def _second(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        replica = torch_ddp(model)
        if replica is not None and replica.find_unused_parameters and replica.require_backward_grad_sync:
            raise ConfigurationError(
                "--find-unused-parameters cannot be used with --criterion mirror, which runs the model twice before "
                "one backward; leave it out: the task freezes what has no part in the loss"
            )
        if not self.input_noise:
            return self._pooled(model(**inputs, features_only=True), inputs)
        with word_embeddings(model, self.task).perturbed(self._with_noise):
            return self._pooled(model(**inputs, features_only=True), inputs)

    def _with_noise(self, call: int, is_token: Tensor, output: Tensor) -> Tensor:
        noise = torch.empty_like(output).uniform_(-self.input_noise, self.input_noise)
        return output + noise * is_token

    def _pooled(self, output: Any, inputs: dict[str, Tensor]) -> Tensor:
        return pooled(output[0], inputs["src_tokens"], self.task.source_dictionary.pad(), self.pooling)

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean loss of a sentence in bits, as fairseq's own losses."""
        number = sum(log.get("sample_size", 0) for log in logging_outputs)
        loss = sum(log.get("loss", 0) for log in logging_outputs)
        metrics.log_scalar("loss", loss / max(number, 1) / math.log(2), number, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Say that workers may sum what they log."""
        return True


@register_instance_losses(MirrorCriterion, watched=lambda criterion: criterion.info_nce, in_criterion=True)
def _mirror(criterion: Any, model: Any, output: Any, sample: Any) -> Tensor:
    losses: Tensor = output
    return losses
