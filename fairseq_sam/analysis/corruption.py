"""Adversarial parameter corruption: the weights moved so that the loss rises."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fairseq_sam.analysis.objective import Objective
from fairseq_sam.core.axes import parse_norm
from fairseq_sam.core.method import PRESETS, Method
from fairseq_sam.core.random_state import RandomState

Progress = Callable[[int, int], None]  # called with how many parts of the work are done, and of how many
STEPS = 10


def unseen(done: int, total: int) -> None:
    """A progress that shows nothing."""


@dataclass
class Corruption:
    """A corruption while the weights are moved.

    Attributes:
        norm: of the move, p-norm of the method.
        losses: L at the weights before each ascent step, the first one at the unmoved weights.
        is_lost: a gradient on the way was not finite; the weights are back at the unmoved ones then.
    """

    norm: float = 0.0
    losses: list[float] = field(default_factory=list)
    is_lost: bool = False

    def largest(self, last: float) -> float:
        """Return the largest loss on the way; infinite if one is not a number, or the way was lost.

        Args:
            last: L at the moved weights.
        """
        losses = [*self.losses, last]
        return math.inf if self.is_lost or any(map(math.isnan, losses)) else max(losses)


def ball(epsilon: float, norm: str | float = "l2", steps: int = 1, base: Method = PRESETS["sam"]) -> Method:
    """Return a method whose ascent has the given ball and number of steps.

    Args:
        epsilon: radius, a finite number > 0.
        norm: ``l2``, ``linf`` or a number in (1, inf].
        steps: number of ascent steps, >= 1, each of length ``1.5 * epsilon / steps``.
        base: the method that gives scale T, granularity and the rest.

    Raises:
        ValueError: if a value is out of range, or `base` does not move weights along the gradient of batches.
    """
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be a finite number > 0, got {epsilon!r}")
    if not moves_all_weights(base):
        raise ValueError(f"method must move all weights along the gradient of batches, got {base.name}")
    return replace(base, epsilon=float(epsilon), norm=parse_norm(norm), steps=steps, step_size=None)


def moves_all_weights(method: Method) -> bool:
    """Return whether a method moves all weights along the gradient of batches, as corruptions do."""
    return method.where == "weights" and method.ascent == "batch" and method.mask == "none"


@contextmanager
def corrupted(
    objective: Objective, method: Method, *, step_done: Callable[[], None] = lambda: None
) -> Iterator[Corruption]:
    """Move the weights by a method's ascent steps; at the end they are put back bit for bit.

    Each step goes along the gradient of the whole objective at the weights reached so far, and is projected onto the
    ball. After a gradient that is zero or not finite it begins again at the unmoved weights.

    Args:
        objective: the loss that the corruption makes large.
        method: radius, norm, number of steps, scale T; see ``ball``.
        step_done: called after each ascent step.

    Yields:
        The norm of the move and the losses on the way.

    References:
        Multi-step adversarial parameter corruption of Zhang et al. 2021; GA-SAM eq. 15-18 without the training.
    """
    perturbation = objective.perturbation(method)
    perturbation.begin(RandomState(parameter.device for parameter in objective.parameters))
    found = Corruption()
    try:
        for _ in range(method.steps):
            with perturbation.applied():
                loss, gradients = objective.loss_and_gradient()
            found.losses.append(loss)
            perturbation.advance(list(gradients), 1.0)
            step_done()
        found.is_lost = bool(perturbation.measured.num_overflows > 0)
        with perturbation.applied():
            perturbation.measure()
            found.norm = float(perturbation.measured.perturbation_norm)
            yield found
    finally:
        perturbation.restore()
