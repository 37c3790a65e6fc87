"""A radius without a grid search: how much the loss rises against epsilon, and the epsilon of a wanted rise."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from fairseq_sam.analysis.corruption import Progress, unseen
from fairseq_sam.core.batch import Batch
from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.memory import Memory
from fairseq_sam.core.method import Method
from fairseq_sam.core.passes import fisher_information, run_apart, split
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.step import AscentGradient, SharpnessAwareStep
from fairseq_sam.core.tensors import Gradients, copies, copy_

# From a radius to the loss at w and at the perturbed weights.
Probe = Callable[[float], tuple[float, float]]
SummedLoss = Callable[[Any], float]

FRACTION = 0.01
LEAST, MOST = 1e-7, 100.0
PER_DECADE = 4
NEGLIGIBLE = 0.03  # share of the wanted rise up to which radii grow by decades
TOLERANCE = 0.05  # how far off the wanted rise, as a share of it, the suggestion may be
MOST_REFINEMENTS = 8


@dataclass(frozen=True)
class Rise:
    """How much a perturbation raises the loss.

    Attributes:
        epsilon: its radius.
        loss: at w.
        perturbed_loss: at the perturbed weights.
    """

    epsilon: float
    loss: float
    perturbed_loss: float

    @property
    def relative(self) -> float:
        """The rise as a fraction of the loss; infinite if the perturbed loss is not finite."""
        if not math.isfinite(self.perturbed_loss):
            return math.inf
        return (self.perturbed_loss - self.loss) / self.loss if self.loss > 0 else math.nan


@dataclass(frozen=True)
class Suggestion:
    """A radius, and the curve that it was read from.

    Attributes:
        found: what was measured at the smallest radius where the relative rise reaches the fraction, as near to it as
            the search came; None if it does not within the range.
        fraction: the wanted relative rise.
        curve: all that was measured, by growing radius.
    """

    found: Rise | None
    fraction: float
    curve: tuple[Rise, ...]

    @property
    def epsilon(self) -> float | None:
        """The radius that was found."""
        return None if self.found is None else self.found.epsilon


def suggest_epsilon(
    probe: Probe,
    *,
    fraction: float = FRACTION,
    least: float = LEAST,
    most: float = MOST,
    per_decade: int = PER_DECADE,
    found: Callable[[Rise], None] = lambda rise: None,
    progress: Progress = unseen,
) -> Suggestion:
    """Find the smallest radius at which a method's perturbation raises the loss by a fraction of it.

    The radius grows by decades while the rise is a small share of the wanted one, where it is as good as linear, then
    on a finer grid until the wanted rise is reached; a rise that falls again behind that is not looked at. Between the
    last two radii the search goes on until a radius is met whose rise, as it was measured, is within 5 % of the wanted
    one.

    Args:
        probe: see ``Probe``; ``method_probe`` makes one.
        fraction: wanted rise, as a fraction of the loss, > 0.
        least: smallest radius, > 0.
        most: largest radius, >= `least`.
        per_decade: radii in a decade of the finer grid, >= 1.
        found: called with what was measured at each radius.
        progress: called after each radius; the total is an estimate until the last call.

    Returns:
        The suggestion; without a radius if the rise at `least` is too large already or that at `most` too small, or
        the loss is not finite where it has not risen before.

    Raises:
        ValueError: if a value is out of range, or the loss is not a finite number > 0.
    """
    for name, value in (("fraction", fraction), ("least", least), ("most", most)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    if most < least:
        raise ValueError(f"most must be at least least = {least!r}, got {most!r}")
    if isinstance(per_decade, bool) or not isinstance(per_decade, int) or per_decade < 1:
        raise ValueError(f"per_decade must be an integer >= 1, got {per_decade!r}")
    curve: list[Rise] = []
    estimate = math.ceil(math.log10(most / least)) + 1 + per_decade

    def measure(epsilon: float) -> Rise:
        rise = Rise(epsilon, *probe(epsilon))
        if not (math.isfinite(rise.loss) and rise.loss > 0):
            raise ValueError(f"the loss must be a finite number > 0, got {rise.loss!r} at the unperturbed weights")
        curve.append(rise)
        found(rise)
        progress(len(curve), max(estimate, len(curve) + 1))
        return rise

    below, above = _bracket(measure, fraction, least, most, per_decade)
    nearest = _refined(measure, below, above, fraction) if below and above else None
    progress(len(curve), len(curve))
    return Suggestion(nearest, fraction, tuple(sorted(curve, key=lambda rise: rise.epsilon)))


def _bracket(
    measure: Callable[[float], Rise], fraction: float, least: float, most: float, per_decade: int
) -> tuple[Rise | None, Rise | None]:
    """Two neighbouring radii, the first that reaches the rise and the one before; None where there is none."""
    fine, coarse = 10 ** (1 / per_decade), 10.0
    below, ahead, epsilon, factor = None, None, least, coarse
    while True:
        is_known = ahead is not None and math.isclose(epsilon, ahead.epsilon, rel_tol=1e-6)
        rise = ahead if ahead is not None and is_known else measure(epsilon)
        is_small = abs(rise.relative) <= NEGLIGIBLE * fraction
        if factor == coarse > fine and below is not None and not is_small:  # through this decade again, finer
            ahead, factor, epsilon = rise, fine, below.epsilon * fine
            continue
        if rise.relative >= fraction:
            return below, rise
        if epsilon >= most:
            return rise, None
        factor = coarse if is_small and factor == coarse else fine
        below, epsilon = rise, min(epsilon * factor, most)


def _refined(measure: Callable[[float], Rise], below: Rise, above: Rise, fraction: float) -> Rise | None:
    """Narrow the two ends until one has the wanted rise, or hardly differs from the other."""

    def distance(rise: Rise) -> float:
        """From the wanted rise, in logarithms; of no use is an end where the loss falls or is not finite."""
        return abs(math.log(rise.relative / fraction)) if 0 < rise.relative < math.inf else math.inf

    for _ in range(MOST_REFINEMENTS):
        if min(distance(below), distance(above)) <= math.log1p(TOLERANCE):
            break
        share = 0.5
        if 0 < below.relative and above.relative < math.inf:  # between two radii a power of epsilon, but not too near
            share = math.log(fraction / below.relative) / math.log(above.relative / below.relative)
            share = min(max(share, 0.1), 0.9)
        middle = measure(below.epsilon * (above.epsilon / below.epsilon) ** share)
        below, above = (below, middle) if middle.relative >= fraction else (middle, above)
    nearest = min(below, above, key=distance)
    return nearest if distance(nearest) < math.inf else None


def method_probe(
    model: nn.Module,
    batches: Sequence[Batch[Any]],
    method: Method,
    *,
    embeddings: WordEmbeddings | None = None,
    summed_loss: SummedLoss = lambda result: float(result.loss) * float(result.sample_size),
    modules: Mapping[str, nn.Module] | None = None,
) -> Probe:
    """Return a probe that perturbs a model as a method's training step does, each batch by its own perturbation.

    The model stays in its mode; in training mode all passes over a batch see the same dropout masks, those of the
    first batch in every call of the probe alike. Weights, gradients, buffers and torch's random state are afterwards
    as before.

    Args:
        model: the model.
        batches: what ``SharpnessAware.step`` takes: ``InstanceBatch``, or ``ClosureBatch`` with a mean loss.
        method: the method; its `epsilon` is replaced.
        embeddings: for methods that perturb word embeddings; default all ``nn.Embedding`` modules of the model.
        summed_loss: from what a pass returns to the sum of its losses.
        modules: the modules whose parameters are trained, by prefix of their names; default the model alone.

    Raises:
        ValueError: if there is no batch.
    """
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    if method.where == "embeddings" and embeddings is None:
        embeddings = WordEmbeddings.of(model)
    space = ParameterSpace.of(modules or {"": model}, exclude=method.exclude)
    memory = _with_mask(method, space, batches)

    def ascent_gradient(gradients: Gradients, result: Any) -> tuple[Gradients, float]:
        return gradients, 1.0 / float(result.sample_size) if method.gradient == "mean" else 1.0

    def rises(epsilon: float) -> list[Rises]:
        return [
            loss_rise(
                with_epsilon(method, epsilon), space, batch, ascent_gradient, memory=memory, embeddings=embeddings,
                summed_loss=summed_loss,
            )
            for batch in batches
        ]  # fmt: skip

    return probe_of(space, rises)


class Rises(NamedTuple):
    """Summed losses of a batch at w and at the perturbed weights, and its sample size."""

    loss: float
    perturbed_loss: float
    sample_size: float


def probe_of(
    space: ParameterSpace,
    rises: Callable[[float], Iterable[Rises]],
    reduce: Callable[[Rises], Rises] = lambda rises: rises,
) -> Probe:
    """Return a probe of mean losses that leaves buffers and torch's random state as they were.

    Args:
        space: the trained parameters.
        rises: measures each batch with a radius; leaves weights and gradients as they were.
        reduce: adds up what all workers have found.
    """

    def probe(epsilon: float) -> tuple[float, float]:
        buffers = copies(space.buffers)
        random = RandomState(tensor.device for tensor in space.tensors)
        try:
            rows = list(rises(epsilon))
        finally:
            random.restore()
            copy_(space.buffers, buffers)
        total = reduce(Rises(*(sum(column) for column in zip(*rows, strict=True))) if rows else Rises(0.0, 0.0, 0.0))
        size = total.sample_size or math.nan
        return total.loss / size, total.perturbed_loss / size

    return probe


def with_epsilon(method: Method, epsilon: float) -> Method:
    """Return the method with another, constant radius, and a last pass over whole batches."""
    return replace(
        method,
        epsilon=epsilon,
        epsilon_min=None,
        lr_max=None,
        lr_min=0.0,
        step_size=None if method.step_rule == "steepest" else method.step_size,
        descent="last" if method.selects else method.descent,
        esam_gamma=None if method.selects else method.esam_gamma,
    )


def loss_rise(
    method: Method,
    space: ParameterSpace,
    batch: Batch[Any],
    ascent_gradient: AscentGradient[Any],
    *,
    memory: Memory | None = None,
    embeddings: WordEmbeddings | None = None,
    summed_loss: SummedLoss = lambda result: float(result.loss) * float(result.sample_size),
) -> Rises:
    """Measure a batch's loss before and after the method's perturbation; weights and gradients are as before then.

    Args:
        method: the method, without selection of instances in its last pass.
        space: the trained parameters.
        batch: the batch.
        ascent_gradient: see ``AscentGradient``.
        memory: holds the Fisher mask, for a method that has one.
        embeddings: the word embeddings, for a method that perturbs them.
        summed_loss: from what a pass returns to the sum of its losses.
    """
    prior = space.take_gradients()
    random = RandomState(tensor.device for tensor in space.tensors)
    own = Memory()  # else LookSAM would remember the component of these steps
    own.mask = memory.mask if memory else None
    try:
        clean, _, _ = run_apart(space, batch)
        random.restore()
        step: SharpnessAwareStep[Any] = SharpnessAwareStep(method, space, own, embeddings)
        perturbed = 0.0
        for part, _ in split(method, batch):
            step.ascend(part, ascent_gradient)
            perturbed += summed_loss(step.descend(part))
            space.take_gradients()
    finally:
        space.put_gradients(prior)
    return Rises(summed_loss(clean), perturbed, float(clean.sample_size))


def _with_mask(method: Method, space: ParameterSpace, batches: Sequence[Batch[Any]]) -> Memory:
    """What a method remembers in its first update: the Fisher mask, if it has one."""
    memory = Memory()
    for number, batch in enumerate(batches):
        wanted = memory.instances_wanted(method, space, number)
        if not wanted:
            break
        memory.add_squares(method, space, fisher_information(space, batch, wanted, 1.0, str(number)))
    return memory
