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
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.step import AscentGradient, SharpnessAwareStep, fisher_information, run_apart, split
from fairseq_sam.core.tensors import Gradients

# From a radius to the loss at w and at the perturbed weights.
Probe = Callable[[float], tuple[float, float]]
SummedLoss = Callable[[Any], float]

FRACTION = 0.1
LEAST, MOST = 1e-7, 100.0
PER_DECADE = 4


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
        epsilon: where the relative rise reaches the fraction; None if it does not within the range.
        fraction: the wanted relative rise.
        curve: what was measured, by growing radius.
    """

    epsilon: float | None
    fraction: float
    curve: tuple[Rise, ...]


def suggest_epsilon(
    probe: Probe,
    *,
    fraction: float = FRACTION,
    least: float = LEAST,
    most: float = MOST,
    per_decade: int = PER_DECADE,
    progress: Progress = unseen,
) -> Suggestion:
    """Find the radius at which a method's perturbation raises the loss by a fraction of it.

    The radius grows by decades until the rise is reached, then the grid is refined in the decade before. Between two
    radii the rise is taken to be a power of epsilon.

    Args:
        probe: see ``Probe``; ``method_probe`` makes one.
        fraction: wanted rise, as a fraction of the loss, > 0.
        least: smallest radius, > 0.
        most: largest radius, >= `least`.
        per_decade: radii in a decade of the grid, >= 1.
        progress: called after each radius; the total is the most that may be needed.

    Returns:
        The suggestion; without an `epsilon` if the rise at `least` is too large already or that at `most` too small.

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
    decades = [least * 10**k for k in range(math.floor(math.log10(most / least) + 1e-9) + 1)]
    decades += [most] if most > decades[-1] * (1 + 1e-9) else []
    total = len(decades) + per_decade - 1
    found: dict[float, Rise] = {}

    def measure(epsilon: float) -> Rise:
        found[epsilon] = Rise(epsilon, *probe(epsilon))
        if not (math.isfinite(found[epsilon].loss) and found[epsilon].loss > 0):
            raise ValueError(
                f"the loss must be a finite number > 0, got {found[epsilon].loss!r} at the unperturbed weights"
            )
        progress(len(found), max(total, len(found)))
        return found[epsilon]

    def reached(rise: Rise) -> bool:
        return rise.relative >= fraction

    for place, epsilon in enumerate(decades):
        if reached(measure(epsilon)):
            if place:
                span = epsilon / decades[place - 1]
                for k in range(1, per_decade):
                    measure(decades[place - 1] * span ** (k / per_decade))
            break
    curve = tuple(found[epsilon] for epsilon in sorted(found))
    above = next((i for i, rise in enumerate(curve) if reached(rise)), None)
    progress(total, total)
    epsilon_found = None if not above else _between(curve[above - 1], curve[above], fraction)
    return Suggestion(epsilon_found, fraction, curve)


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
        buffers = [buffer.detach().clone() for buffer in space.buffers]
        random = RandomState(tensor.device for tensor in space.tensors)
        try:
            rows = list(rises(epsilon))
        finally:
            random.restore()
            for buffer, value in zip(space.buffers, buffers, strict=True):
                buffer.data.copy_(value)
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


def _between(below: Rise, above: Rise, fraction: float) -> float:
    """Interpolate in logarithms; the nearer end where one of the rises has none."""
    if not below.relative > 0:
        return above.epsilon
    if not math.isfinite(above.relative):
        return below.epsilon
    place = math.log(fraction / below.relative) / math.log(above.relative / below.relative)
    return float(below.epsilon * (above.epsilon / below.epsilon) ** place)
