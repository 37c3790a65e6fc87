"""fairseq's criteria with R-Drop, R3F and SMART: one class for every pair of a criterion and a regulariser."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import field, fields, make_dataclass
from typing import Any, NamedTuple

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY, register_criterion
from fairseq.logging import metrics
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from fairseq_sam.adapter.embeddings import word_embeddings
from fairseq_sam.adapter.workers import torch_ddp
from fairseq_sam.core.divergences import Divergence, squared_error, symmetric_kl
from fairseq_sam.core.embeddings import Perturb
from fairseq_sam.core.regularizers import REGULARIZERS, Regularizer, Smart
from fairseq_sam.core.tensors import at_least_float32


class Forward(NamedTuple):
    """One call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


# -- what each criterion predicts: log probabilities (instances, classes), or numbers (instances,) --------------------


def _tokens(criterion: Any, model: Any, sample: Any, output: Any) -> Tensor:
    log_probs = model.get_normalized_probs(output, log_probs=True)
    target = model.get_targets(sample, output)
    return log_probs.view(-1, log_probs.size(-1))[target.view(-1).ne(criterion.padding_idx)]


def _smoothed_tokens(criterion: Any, model: Any, sample: Any, output: Any) -> Tensor:
    log_probs, target = criterion.get_lprobs_and_target(model, output, sample)
    return log_probs[target.ne(criterion.padding_idx)]


def _masked_tokens(criterion: Any, model: Any, sample: Any, output: Any) -> Tensor:
    logits, target = output[0], sample["target"]
    if logits.shape[:-1] == target.shape:  # all tokens are projected where none is masked
        logits = logits[target.ne(criterion.padding_idx)]
    return log_softmax(at_least_float32(logits), dim=-1)


def _sentences(criterion: Any, model: Any, sample: Any, output: Any) -> Tensor:
    logits = at_least_float32(output[0])
    return logits.view(-1) if criterion.regression_target else log_softmax(logits, dim=-1)


Predict = Callable[[Any, Any, Any, Any], Tensor]
PREDICTIONS: dict[str, Predict] = {
    "cross_entropy": _tokens,
    "label_smoothed_cross_entropy": _smoothed_tokens,
    "sentence_prediction": _sentences,
    "masked_lm": _masked_tokens,
}


# -- passes -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[list[Forward]]:
    """Record how the model is called and what it returns; a hook, since criteria look at the model's class."""
    calls: list[Forward] = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Forward(args, kwargs, output))

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class SamplePasses:
    """Passes of a model and a criterion over one sample.

    Args:
        criterion: the criterion.
        run: runs the base criterion's forward, with the model and the sample.
        model: the model.
        sample: the sample.
    """

    def __init__(self, criterion: Any, run: Callable[[Any, Any], Any], model: Any, sample: Any) -> None:
        self._criterion, self._run, self._model, self._sample = criterion, run, model, sample
        is_regression = getattr(criterion, "regression_target", False)
        self.divergence: Divergence = squared_error if is_regression else symmetric_kl
        self.result, self.prediction = self._first()

    def _first(self) -> tuple[Any, Tensor]:
        with _recorded(self._model) as calls:
            result = self._run(self._model, self._sample)
        self._forward = calls[-1]
        return result, self._prediction(self._forward.output)

    def _prediction(self, output: Any) -> Tensor:
        return PREDICTIONS[self._criterion.base_name](self._criterion, self._model, self._sample, output)

    def repeat(self) -> tuple[Tensor, Tensor]:
        """Run the model and the base criterion again; return the loss and the prediction."""
        with _recorded(self._model) as calls:
            loss = self._run(self._model, self._sample)[0]
        return loss, self._prediction(calls[-1].output)

    def predict(self, perturb: Perturb) -> Tensor:
        """Run the model again with perturbed outputs of its word embeddings; return the prediction."""
        with word_embeddings(self._model, self._criterion.task).perturbed(perturb):
            output = self._model(*self._forward.args, **self._forward.kwargs)
        return self._prediction(output)


# -- criteria ---------------------------------------------------------------------------------------------------------


class RegularizedCriterion:
    """A criterion of fairseq whose training loss has a regulariser's term; validation is the base criterion's.

    The term is summed over what the loss is summed over: tokens that are not padding, masked tokens, sentences. It is
    logged as ``reg_loss``, in bits per unit of sample size as ``loss`` is, and it is a part of ``loss``. What else is
    logged is of the first pass.
    """

    base_name: str
    regularizer_class: type[Regularizer]
    regularizer: Regularizer

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> Any:
        """Build the criterion and its regulariser.

        Raises:
            ValueError: if a flag of the regulariser has a value that is not allowed.
        """
        flags = {flag.name: getattr(cfg, flag.name) for flag in fields(cls.regularizer_class)}
        regularizer = cls.regularizer_class(**flags)
        criterion = super().build_criterion(cfg, task)  # type: ignore[misc]
        criterion.regularizer = regularizer
        return criterion

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Any, Any, Any]:
        """Compute the base criterion's loss and, in training, the regulariser's term.

        Returns:
            The summed loss, the base criterion's sample size, and the logging output.

        Raises:
            ValueError: if a loss per instance is asked for in training, or the model cannot be regularised.
        """
        run = super().forward  # type: ignore[misc]
        if not model.training or not self.regularizer.is_active:
            return run(model, sample, reduce)
        self._check(model, reduce)
        passes = SamplePasses(self, run, model, sample)
        base_loss, sample_size, logging_output = passes.result
        loss, term = self.regularizer(base_loss, passes.prediction, passes)
        return loss, sample_size, {**logging_output, "loss": loss.data, "reg_loss": term.data}

    def _check(self, model: nn.Module, reduce: bool) -> None:
        if not reduce:
            name = type(self.regularizer).__name__
            raise ValueError(f"{name} gives a summed loss only: reduce must be True in training, got False")
        replica = torch_ddp(model)
        if replica is not None and replica.find_unused_parameters and replica.require_backward_grad_sync:
            raise ValueError(
                f"--find-unused-parameters cannot be used with {type(self.regularizer).__name__}, which runs the model "
                "several times before one backward; use --ddp-backend legacy_ddp"
            )
        if isinstance(self.regularizer, Smart):
            if any(hasattr(module, "precheckpoint_forward") for module in model.modules()):
                raise ValueError(
                    "--checkpoint-activations cannot be used with SMART, which needs a gradient with respect to "
                    "embeddings alone; leave it out, or use R3F or R-Drop"
                )

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log what the base criterion logs, and ``reg_loss``."""
        super().reduce_metrics(logging_outputs)  # type: ignore[misc]
        if any("reg_loss" in log for log in logging_outputs):
            sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
            term = sum(log.get("reg_loss", 0) for log in logging_outputs)
            metrics.log_scalar("reg_loss", term / sample_size / math.log(2), sample_size, round=5)


def register_regularized_criteria() -> None:
    """Register ``BASE_REGULARIZER`` for each pair, once."""
    for base_name in PREDICTIONS:
        for name, regularizer_class in REGULARIZERS.items():
            if f"{base_name}_{name}" not in CRITERION_REGISTRY:
                _register(base_name, name, regularizer_class)


def _register(base_name: str, name: str, regularizer_class: type[Regularizer]) -> None:
    base = CRITERION_REGISTRY[base_name]
    class_name = "".join(part.capitalize() for part in f"{base_name}_{name}".split("_"))
    flags: list[tuple[str, Any, Any]] = [
        (flag.name, flag.type, field(default=flag.default, metadata={"help": flag.metadata["help"]}))
        for flag in fields(regularizer_class)
    ]
    config = make_dataclass(f"{class_name}Config", flags, bases=(CRITERION_DATACLASS_REGISTRY[base_name],))
    members = {"base_name": base_name, "regularizer_class": regularizer_class, "__module__": __name__}
    cls = type(f"{class_name}Criterion", (RegularizedCriterion, base), members)
    register_criterion(f"{base_name}_{name}", dataclass=config)(cls)
