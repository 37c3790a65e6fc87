"""What is logged of an update; read where it does not make the host wait for a GPU."""

import logging
import math
from typing import Any

import torch
from fairseq.logging import metrics
from torch import Tensor

from fairseq_sam.adapter.batches import Pass, resized
from fairseq_sam.adapter.optimizers import SharpnessAwareOptimizer
from fairseq_sam.core.measurements import Measurements
from fairseq_sam.core.method import Method
from fairseq_sam.core.space import ParameterSpace

logger = logging.getLogger(__name__)

LEAST_SURVIVED = 0.5  # of a perturbation, in half precision; below it the user is warned


class UpdateLog:
    """What was measured in an update's micro-batches, kept until the update is over.

    Args:
        optimizer: knows what was logged and told before.
        method: the method.
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer, method: Method) -> None:
        self._optimizer = optimizer
        self._method = method
        self._unread: list[dict[str, tuple[Any, int]]] = []  # of each micro-batch, with its digits

    def add_plain(self, passes: float) -> None:
        """Note a plain micro-batch, and that it cost so many passes."""
        metrics.log_scalar("sam_passes", passes, weight=1, round=2)
        if self._optimizer.logged:  # of weight 0: a log line of plain updates alone shows numbers and not None
            self._unread.append({})
            for key in self._optimizer.logged:
                metrics.log_scalar(key, 0.0, weight=0)

    def add(self, space: ParameterSpace, measured: Measurements, collected: float, clean: Pass, last: Pass) -> Pass:
        """Note what was measured in a micro-batch.

        Args:
            space: the trained parameters.
            measured: by its step.
            collected: share of a pass that the Fisher mask has cost.
            clean: of the first pass, at the unperturbed weights.
            last: of the last pass.

        Returns:
            What fairseq logs: losses of the first pass, for the counts of the last.
        """
        logged = {
            "sam_eps": (measured.perturbation_norm, 8),
            "sam_passes": (measured.num_passes + collected, 2),
            "sam_capped": (measured.num_capped, 2),
        }
        if measured.survived is not None:
            logged["sam_survived"] = (measured.survived, 4)
            # Masters that were just made from weights in half precision are rounded as these.
            self._optimizer.has_new_masters = self._optimizer.has_new_masters and _masters_are_new(space)
        if self._method.has_first_pass:
            logged["sam_gnorm"] = (measured.gradient_norm, 4)
        if measured.num_forwards:
            logged["sam_forwards"] = (measured.num_forwards, 2)
        if self._method.ascent_fraction < 1:
            clean = resized(clean, last)
        elif self._method.measures_sharpness and clean is not last:
            logged["sam_sharp"] = (_bits(last) - _bits(clean), 5)
        self._optimizer.logged |= logged.keys() - {"sam_passes"}
        self._unread.append(logged)
        return Pass(clean.loss, last.sample_size, clean.logging_output)

    def write(self, dtype: torch.dtype) -> None:
        """Log what was measured; fairseq has waited for the update's end by now.

        Args:
            dtype: of the weights.
        """
        if not self._unread:
            return
        with metrics.aggregate("train"):  # where fairseq logs an update
            for logged in self._unread:
                for key, (value, digits) in logged.items():
                    metrics.log_scalar(key, _value(value), weight=1, round=digits)
                if "sam_survived" in logged:
                    self._warn_of_rounding(_value(logged["sam_survived"][0]), dtype)
            metrics.log_scalar("sam_skipped", _value(self._optimizer.num_skipped), weight=0)
        self._unread = []

    def explain_failure(self, update: int, error: FloatingPointError) -> None:
        """Say that fairseq has ended the run because of the perturbation, if every micro-batch was fine before it.

        Args:
            update: its number.
            error: fairseq's.
        """
        reason = str(error)
        if "inconsistent" in reason and not any(norm in reason for norm in ("= nan", "= inf")):
            return  # workers whose gradients are finite, but not the same
        norms = [_value(logged["sam_eps"][0]) for logged in self._unread if "sam_eps" in logged]
        if not norms or len(norms) < len(self._unread) or not all(norm > 0 for norm in norms):
            return  # a zero is a gradient that was not finite at the unperturbed weights: ε is not the reason
        logger.error(
            "update %d failed at perturbed weights (--sam-epsilon %g, norm of the perturbation %.3g); its gradient "
            "before the perturbation was finite. Try --sam-epsilon %g, or --sam-epsilon auto, or a later "
            "--sam-start-epoch",
            update, self._method.epsilon, max(norms), self._method.epsilon / 10,
        )  # fmt: skip

    def _warn_of_rounding(self, survived: float, dtype: torch.dtype) -> None:
        told = self._optimizer.has_warned_of_rounding or self._optimizer.has_new_masters
        if survived < LEAST_SURVIVED and not told:
            self._optimizer.has_warned_of_rounding = True
            logger.warning(
                "rounding to %s leaves %.0f %% of the perturbation (sam_survived); use --amp, whose weights are fp32, "
                "or a larger --sam-epsilon, or --sam-rounding stochastic",
                str(dtype).removeprefix("torch."), 100 * survived,
            )  # fmt: skip


def _masters_are_new(space: ParameterSpace) -> bool:
    """Whether the fp32 masters are no more exact than the weights in half precision."""
    pairs = zip(space.masters, space.tensors, strict=True)
    return all(master is not None and torch.equal(master, tensor.detach().float()) for master, tensor in pairs)


def _bits(result: Pass) -> Any:
    """Loss per unit of sample size, in bits as fairseq's own losses: a number, or a tensor that is not read yet."""
    loss = result.loss.detach() if isinstance(result.loss, Tensor) else result.loss
    return loss / ((float(result.sample_size) or 1.0) * math.log(2))


def _value(number: Any) -> float:
    return float(number.detach()) if isinstance(number, Tensor) else float(number)
