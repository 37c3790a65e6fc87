"""The loss of every instance of a batch, from what the model returned inside the criterion's own forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from fairseq import modules
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    label_smoothed_nll_loss,
)
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.criterions.sentence_ranking import SentenceRankingCriterion
from torch import Tensor, nn
from torch.nn import functional

# (criterion, model, output, sample) -> losses of shape (N,), differentiable; their sum is the criterion's loss.
InstanceLosses = Callable[[Any, Any, Any, Any], Tensor]


class _Entry(NamedTuple):
    losses: InstanceLosses
    watched: Callable[[Any], nn.Module]
    every_call: bool
    in_criterion: bool

    def watched_module(self, criterion: Any, model: nn.Module) -> nn.Module:
        return self.watched(criterion if self.in_criterion else model)


_REGISTRY: dict[type, _Entry] = {}


def register_instance_losses(
    criterion: type,
    watched: Callable[[Any], nn.Module] = lambda module: module,
    *,
    every_call: bool = False,
    in_criterion: bool = False,
) -> Callable[[InstanceLosses], InstanceLosses]:
    """Register how a criterion's loss divides into those of the instances.

    Args:
        criterion: the criterion's class. A subclass counts as well if it overrides neither ``forward`` nor
            ``compute_loss``.
        watched: from the model, the module whose output the function gets; default the model itself.
        every_call: the criterion calls the module several times, and the function gets a list of all outputs.
        in_criterion: `watched` gets the criterion in the model's place, and the module is one of the criterion's.

    Returns:
        A decorator for a function of criterion, model, output and sample that returns the losses of the instances, a
        differentiable tensor of shape (N,) whose sum is the criterion's loss. It must not run the model again.

    Examples:
        >>> from fairseq.criterions import FairseqCriterion
        >>> class MyCriterion(FairseqCriterion):
        ...     pass
        >>> @register_instance_losses(MyCriterion)
        ... def my_losses(criterion, model, output, sample):
        ...     return (output[0] - sample["target"]).square().flatten(1).sum(1)
    """

    def register(losses: InstanceLosses) -> InstanceLosses:
        _REGISTRY[criterion] = _Entry(losses, watched, every_call, in_criterion)
        return losses

    return register


def check_criterion(criterion: type) -> None:
    """Refuse a criterion whose loss cannot be divided.

    Args:
        criterion: its class.

    Raises:
        ValueError: says how to register one.
    """
    _entry_of(criterion)


def _entry_of(criterion: type) -> _Entry:
    for base in criterion.__mro__:
        if base in _REGISTRY:
            same = all(getattr(criterion, m, None) is getattr(base, m, None) for m in ("forward", "compute_loss"))
            if same:
                return _REGISTRY[base]
            break
    known = ", ".join(cls.__name__ for cls in _REGISTRY)
    raise ValueError(
        f"this method needs the loss of every instance, and {criterion.__name__} does not say it; known are {known}. "
        "Register a function with fairseq_sam.adapter.instance_losses.register_instance_losses, or use a method that "
        "takes whole batches, such as --optimizer sam or ga_sam"
    )


class Captured:
    """Output of the watched module's last call, or the outputs of all calls."""

    output: Any = None
    was_called = False
    _probabilities: tuple[Any, bool, Any] | None = None  # of which output, whether logarithms; what they are

    def probabilities(self, plain: Callable[..., Any], output: Any, log_probs: bool, *args: Any, **named: Any) -> Any:
        """Return what ``get_normalized_probs`` of the model gives, and has given before of the same output."""
        if self._probabilities is not None:
            of, is_log, found = self._probabilities
            if of is output and is_log == log_probs and (found.requires_grad or not torch.is_grad_enabled()):
                return found
        found = plain(output, log_probs, *args, **named)
        self._probabilities = output, log_probs, found
        return found

    def release(self) -> None:
        """Let go of the outputs: backward begins, and frees what it has used."""
        self.output = self._probabilities = None


@contextmanager
def capture_output(criterion: Any, model: nn.Module) -> Iterator[Captured]:
    """Record what the criterion's watched module returns.

    While the context is open, the model makes the probabilities of an output, which are as large as itself, only once:
    those that the criterion has asked for are those that the losses of the instances are taken from.

    Args:
        criterion: the criterion that will run.
        model: the model that it is given, possibly wrapped.

    Raises:
        ValueError: if the criterion's loss cannot be divided.
    """
    captured, entry = Captured(), _entry_of(type(criterion))

    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        captured.output = [*(captured.output or ()), output] if entry.every_call else output
        captured.was_called = True

    handle = entry.watched_module(criterion, model).register_forward_hook(record)
    try:
        with _shared_probabilities(model, captured):
            yield captured
    finally:
        handle.remove()


@contextmanager
def _shared_probabilities(model: nn.Module, captured: Captured) -> Iterator[None]:
    """Let ``get_normalized_probs`` be that of what was captured; on the instance."""
    plain = getattr(model, "get_normalized_probs", None)
    try:
        if plain is not None:
            model.get_normalized_probs = partial(captured.probabilities, plain)  # type: ignore[assignment]
        yield
    finally:
        vars(model).pop("get_normalized_probs", None)


def instance_losses(
    criterion: Any, model: Any, captured: Captured, sample: Any, number: int, loss: Any = None
) -> Tensor:
    """Return the losses of the instances from a captured output.

    Args:
        criterion: the criterion.
        model: the model.
        captured: from ``capture_output``, after the criterion ran.
        sample: the sample.
        number: how many instances it has.
        loss: what the criterion returned, to compare with; None for no comparison.

    Returns:
        Shape (N,).

    Raises:
        ValueError: if the model did not run, or the losses have another shape or do not add up to the criterion's.
    """
    name = type(criterion).__name__
    if not captured.was_called:
        raise ValueError(f"{name} did not call the module that its instance losses watch")
    losses = _entry_of(type(criterion)).losses(criterion, model, captured.output, sample)
    if not torch.is_tensor(losses) or losses.shape != (number,) or losses.requires_grad != torch.is_grad_enabled():
        found = f"a tensor of shape {tuple(losses.shape)}" if torch.is_tensor(losses) else type(losses).__name__
        raise ValueError(
            f"the instance losses registered for {name} must be a tensor of shape ({number},), one number for each "
            f"instance, with a gradient where the criterion's loss has one; got {found}"
            f"{' without a gradient' if torch.is_tensor(losses) and not losses.requires_grad else ''}"
        )
    if loss is not None:
        check_sum(criterion, losses, loss)
    return losses


def check_sum(criterion: Any, losses: Tensor, loss: Any) -> None:
    """Refuse losses of instances that are not parts of the criterion's loss.

    Args:
        criterion: the criterion.
        losses: of the instances.
        loss: what it returned; one that is not finite is compared with nothing.

    Raises:
        ValueError: if they do not add up to it.
    """
    name = type(criterion).__name__
    found, expected = losses.detach().sum(), torch.as_tensor(loss).detach().sum()
    coarse = expected.dtype in (torch.float16, torch.bfloat16)
    found, expected = found.double(), expected.to(found.device).double()
    is_close = torch.isclose(found, expected, rtol=2e-2 if coarse else 1e-3, atol=1e-3, equal_nan=True)
    if torch.isfinite(expected) and not is_close:
        raise ValueError(
            f"the instance losses registered for {name} add up to {float(found):g}, but the criterion's loss is "
            f"{float(expected):g}; they must be its parts"
        )


@register_instance_losses(CrossEntropyCriterion)
def _cross_entropy(criterion: Any, model: Any, output: Any, sample: Any) -> Tensor:
    log_probs = model.get_normalized_probs(output, log_probs=True)
    target = model.get_targets(sample, output)
    flat = log_probs.reshape(-1, log_probs.size(-1)), target.reshape(-1)
    return _by_row(functional.nll_loss(*flat, ignore_index=criterion.padding_idx, reduction="none"), len(target))


@register_instance_losses(LabelSmoothedCrossEntropyCriterion)
def _label_smoothed(criterion: Any, model: Any, output: Any, sample: Any) -> Tensor:
    log_probs, target = criterion.get_lprobs_and_target(model, output, sample)
    losses, _ = label_smoothed_nll_loss(
        log_probs, target, criterion.eps, ignore_index=criterion.padding_idx, reduce=False
    )
    return _by_row(losses, len(sample["target"]))


@register_instance_losses(AdaptiveLoss, watched=lambda model: model.decoder.adaptive_softmax)
def _adaptive(criterion: Any, model: Any, output: Any, sample: Any) -> Tensor:
    """Loss of the head at every token, and of a tail at the tokens that fall into it."""
    logits, targets = output
    target = model.get_targets(sample, None)
    _, places = model.decoder.adaptive_softmax.adapt_target(target.reshape(-1))
    pad = criterion.padding_idx
    losses = functional.cross_entropy(logits[0], targets[0], ignore_index=pad, reduction="none")
    for tail_logits, tail_target, place in zip(logits[1:], targets[1:], places, strict=True):
        if tail_target is not None:
            tail = functional.cross_entropy(tail_logits, tail_target, ignore_index=pad, reduction="none")
            losses = losses.index_add(0, place, tail)
    return _by_row(losses, len(target))


@register_instance_losses(MaskedLmLoss)
def _masked_lm(criterion: Any, model: Any, output: Any, sample: Any) -> Tensor:
    logits, target = output[0], sample["target"]
    is_masked = target.ne(criterion.padding_idx)
    nothing = logits.new_zeros(len(target), dtype=torch.float32) + 0.0 * logits.sum().float()
    if not is_masked.any():  # the criterion then predicts all tokens, and counts none
        return nothing
    if logits.dim() == 3:
        logits = logits[is_masked]
    losses = modules.cross_entropy(
        logits.view(-1, logits.size(-1)), target[is_masked], ignore_index=criterion.padding_idx, reduction="none"
    )
    return nothing.to(losses.dtype).index_add(0, is_masked.nonzero()[:, 0], losses)


@register_instance_losses(SentencePredictionCriterion)
def _sentence_prediction(criterion: Any, model: Any, output: Any, sample: Any) -> Tensor:
    logits = output[0]
    target = model.get_targets(sample, [logits]).view(-1)
    if criterion.regression_target:
        return functional.mse_loss(logits.view(-1).float(), target.float(), reduction="none")
    log_probs = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
    return functional.nll_loss(log_probs, target, reduction="none")


@register_instance_losses(SentenceRankingCriterion, every_call=True)
def _sentence_ranking(criterion: Any, model: Any, outputs: Any, sample: Any) -> Tensor:
    """One call of the model scores one choice of every instance."""
    logits = torch.cat([output[0] for output in outputs], dim=1)
    log_probs = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
    return functional.nll_loss(log_probs, sample["target"].view(-1), reduction="none")


def _by_row(losses: Tensor, number: int) -> Tensor:
    return losses.reshape(number, -1).sum(1)
