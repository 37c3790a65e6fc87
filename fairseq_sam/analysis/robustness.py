"""Robustness: what is left of a model after adversarial corruptions of its weights (GA-SAM Table 4)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fairseq_sam.analysis.corruption import STEPS, Progress, ball, corrupted, unseen
from fairseq_sam.analysis.objective import Objective

Scores = dict[str, float]

# GA-SAM Table 4, En-Vi.
RADII: dict[str | float, tuple[float, ...]] = {"l2": (0.05, 0.1, 0.2), "linf": (0.0001, 0.0002, 0.0005)}


@dataclass(frozen=True)
class Corrupted:
    """A model after a corruption.

    Attributes:
        norm: of the ball, ``l2``, ``linf`` or a number; empty without a corruption.
        radius: of the ball; 0 without a corruption.
        reached: norm of the corruption; NaN where a gradient on the way was not finite, and nothing can be measured.
        loss: ``L(w + a)`` per unit of weight; infinite there.
        scores: what else was measured at ``w + a``, by name.
    """

    norm: str | float
    radius: float
    reached: float
    loss: float
    scores: Scores = field(default_factory=dict)


def robustness(
    objective: Objective,
    *,
    radii: Mapping[str | float, Sequence[float]] = RADII,
    steps: int = STEPS,
    score: Callable[[], Scores] = dict,
    progress: Progress = unseen,
) -> Iterator[Corrupted]:
    """Measure loss and scores after corruptions of several norms and radii, one after the other.

    Args:
        objective: the loss that the corruptions make large; it is also measured.
        radii: of the balls, by norm (``l2``, ``linf`` or a number); default the paper's for En-Vi.
        steps: ascent steps of a corruption, >= 1 (the paper does not say how many).
        score: measures the corrupted model, such as its accuracy or BLEU; called once for each row.
        progress: called after each ascent step and each row.

    Yields:
        The model as it is, then a row for each norm and radius, once it is measured; the weights are then their own.

    Raises:
        ValueError: if a radius, a norm or `steps` is out of range, or there is no data.
    """
    balls = [(norm, radius, ball(radius, norm, steps)) for norm, values in radii.items() for radius in values]
    total = 1 + len(balls) * (steps + 1)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    clean = Corrupted("", 0.0, 0.0, objective.loss(), score())
    count()
    yield clean
    for norm, radius, method in balls:
        with corrupted(objective, method, step_done=count) as found:
            if found.is_lost:  # the radius is too large for this model
                row = Corrupted(norm, radius, math.nan, math.inf)
            else:
                row = Corrupted(norm, radius, found.norm, objective.loss(), score())
        count()
        yield row
