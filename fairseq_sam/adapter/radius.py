"""``--sam-epsilon auto``: the radius that raises the loss by a wanted fraction, measured at the start of a method."""

import logging
import math
import statistics
from typing import Any

from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.analysis.epsilon import LEAST, MOST, Probe, Suggestion, suggest_epsilon
from fairseq_sam.core.memory import Memory
from fairseq_sam.core.method import Method

logger = logging.getLogger(__name__)

UPDATES = 8  # in which the radius is measured, each on its own batch; they are plain ones
AGREEMENT = 3.0  # up to which the largest and the smallest of their radii may differ, as a ratio, without a warning
NEARBY = 100.0  # the first radius that is tried is so many times smaller than what earlier updates have found

# What the radius of a wanted rise depends on.
AXES = (
    "where", "init", "ascent", "ascent_fraction", "m", "scope", "dropout", "norm", "ball", "steps", "step_rule",
    "step_size", "scale", "granularity", "asam_eta", "max_scale", "gradient", "delta_eta", "mask", "sparsity",
    "exclude", "descent", "rounding",
)  # fmt: skip


def settings_of(method: Method, rise: float) -> dict[str, Any]:
    """Return what a radius was searched for with: the method's axes that it depends on, and the wanted rise."""
    return {"rise": rise, **{axis: getattr(method, axis) for axis in AXES}}


def forget_others(memory: Memory, settings: dict[str, Any]) -> None:
    """Let the search begin anew where what is remembered was searched for with other settings.

    Args:
        memory: of a checkpoint.
        settings: of this run, from ``settings_of``.
    """
    if not memory.radii or memory.searched_with == settings:
        return
    changed = [
        f"--sam-{name.replace('_', '-')} {memory.searched_with.get(name)}, now {value}"
        for name, value in settings.items()
        if memory.searched_with.get(name) != value
    ]
    logger.warning(
        "--sam-epsilon auto: the radius is searched for anew, since the checkpoint's was found with %s",
        "; ".join(changed) or "axes that this version does not have",
    )
    memory.radii, memory.epsilon = (), None


def search(memory: Memory, probe: Probe, settings: dict[str, Any]) -> int:
    """Measure the radius on an update's batch; after the last of them the method has its radius, their median.

    Args:
        memory: the method's; it remembers what was found.
        probe: mean losses of the update's batch, of all workers.
        settings: from ``settings_of``.

    Returns:
        How often the batch was probed.

    Raises:
        ConfigurationError: if less than half of the updates have found a radius.
    """
    number = 0

    def counted(epsilon: float) -> tuple[float, float]:
        nonlocal number
        number += 1
        return probe(epsilon)

    memory.searched_with = settings
    radius = _radius_of(memory, counted, settings["rise"])
    memory.radii = (*memory.radii, radius)
    logger.info("--sam-epsilon auto: %.3g in update %d of %d that it measures", radius, len(memory.radii), UPDATES)
    if 2 * (len(memory.radii) - len(_numbers(memory.radii))) > UPDATES:  # whatever the others will find
        raise _nothing_found(memory.radii, settings)
    if len(memory.radii) == UPDATES:
        memory.epsilon = math.exp(statistics.median(map(math.log, _numbers(memory.radii))))  # the middle two's mean
        _report(memory, counted)
    return number


def _radius_of(memory: Memory, probe: Probe, rise: float) -> float:
    """What the update's batch says: from not far below earlier radii, then from the smallest; NaN for nothing."""
    earlier = _numbers(memory.radii)
    try:
        found = Suggestion(None, rise, ())
        if earlier and min(earlier) > NEARBY * LEAST:
            found = suggest_epsilon(probe, fraction=rise, least=min(earlier) / NEARBY)
        if found.epsilon is None:
            found = suggest_epsilon(probe, fraction=rise)
    except ValueError as error:  # of a loss that is not finite or not above 0
        logger.warning("--sam-epsilon auto: nothing is measured in this update: %s", error)
        return math.nan
    if found.epsilon is None:
        first, last = found.curve[0], found.curve[-1]
        logger.warning(
            "--sam-epsilon auto: no radius in this update: the loss rises by %.2g of it at %.3g and by %.2g at %.3g",
            first.relative, first.epsilon, last.relative, last.epsilon,
        )  # fmt: skip
    return found.epsilon or math.nan


def _report(memory: Memory, probe: Probe) -> None:
    """Log the radius, how it does on the last batch, and whether the updates agree."""
    epsilon, radii = float(memory.epsilon or 0.0), _numbers(memory.radii)
    loss, perturbed_loss = probe(epsilon)
    logger.info(
        "--sam-epsilon auto: the radius is %.4g, the median of %d updates; it raises the loss of the last one's batch "
        "by %.2g of it; --sam-epsilon %.4g is the same for another run",
        epsilon, len(radii), (perturbed_loss - loss) / loss, epsilon,
    )  # fmt: skip
    if max(radii) > AGREEMENT * min(radii):
        logger.warning(
            "--sam-epsilon auto: its updates do not agree, they have found radii from %.3g to %.3g; the rise will "
            "differ much between updates. Look at the curve with `fairseq-sam epsilon`, or start later "
            "(--sam-start-epoch, --sam-start-update)", min(radii), max(radii),
        )  # fmt: skip


def _numbers(radii: tuple[float, ...]) -> list[float]:
    return [radius for radius in radii if not math.isnan(radius)]


def _nothing_found(radii: tuple[float, ...], settings: dict[str, Any]) -> ConfigurationError:
    short = "a larger --sam-step-size (it moves the weights no further), " * (settings.get("step_rule") == "gradient")
    return ConfigurationError(
        f"--sam-epsilon auto found a radius from {LEAST:g} to {MOST:g} at which the loss rises by {settings['rise']:g} "
        f"of it (--sam-rise) in only {len(_numbers(radii))} of {len(radii)} updates; give another --sam-rise, {short}a "
        "later --sam-start-epoch, or a number for --sam-epsilon"
    )
