"""``--sam-epsilon auto``: the radius that raises the loss by a wanted fraction, measured at the start of a method."""

import logging
import math
from collections.abc import Sequence

from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.analysis.epsilon import LEAST, MOST, Probe, suggest_epsilon
from fairseq_sam.core.memory import Memory

logger = logging.getLogger(__name__)

UPDATES = 8  # in which the radius is measured, each on its own batch; they are plain ones


def search(memory: Memory, probe: Probe, rise: float) -> None:
    """Measure the radius on an update's batch; after the last of them the method has its radius.

    Args:
        memory: the method's; it remembers what was found.
        probe: mean losses of the update's batch, of all workers.
        rise: wanted rise of the loss, as a fraction of it.

    Raises:
        ConfigurationError: if no update has found a radius.
    """
    try:
        found = suggest_epsilon(probe, fraction=rise).epsilon or math.nan
    except ValueError as error:  # of a loss that is not finite or not above 0
        logger.warning("--sam-epsilon auto: nothing is measured in this update: %s", error)
        found = math.nan
    memory.radii = (*memory.radii, found)
    logger.info("--sam-epsilon auto: %.3g in update %d of %d that it measures", found, len(memory.radii), UPDATES)
    if len(memory.radii) == UPDATES:
        memory.epsilon = _mean(memory.radii, rise)
        logger.info(
            "--sam-epsilon auto: the radius is %.4g, at which the loss rises by %g of it; --sam-epsilon %.4g is the "
            "same for another run", memory.epsilon, rise, memory.epsilon,
        )  # fmt: skip


def _mean(radii: Sequence[float], rise: float) -> float:
    """Geometric mean of what was found."""
    found = [radius for radius in radii if not math.isnan(radius)]
    if not found:
        raise ConfigurationError(
            f"--sam-epsilon auto found no radius from {LEAST:g} to {MOST:g} at which the loss rises by {rise:g} of it "
            f"(--sam-rise) in {UPDATES} updates; give another --sam-rise, or a number for --sam-epsilon"
        )
    return math.exp(sum(map(math.log, found)) / len(found))
