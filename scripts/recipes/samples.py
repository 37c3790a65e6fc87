"""Samples of training data: the smaller one within the larger one, the same on every machine."""

import hashlib
import math
from collections.abc import Sequence


def sample(answers: Sequence[str], size: int, seed: int = 1, has_classes: bool = True) -> list[int]:
    """Choose some instances: the same on every machine, and among those of any larger sample with the same seed.

    Args:
        answers: label of each instance.
        size: how many, at least one for each class.
        seed: another one gives another sample.
        has_classes: take one instance of each class before all others.

    Returns:
        Their places, in order.

    Raises:
        ValueError: if there are not as many instances, or more classes.
    """
    if not 0 < size <= len(answers):
        raise ValueError(f"a sample of {size} cannot be taken from {len(answers)} instances")
    order = sorted(range(len(answers)), key=lambda place: hashlib.sha256(f"{seed}:{place}".encode()).digest())
    first: dict[str, int] = {}
    for place in order if has_classes else ():
        first.setdefault(answers[place], place)
    if size < len(first):
        raise ValueError(f"a sample of {size} cannot have one instance of each of the {len(first)} classes")
    chosen = list(first.values())
    taken = set(chosen)
    chosen += [place for place in order if place not in taken]
    return sorted(chosen[:size])


def sample_size(number: int, rate: float, num_classes: int) -> int:
    """Return how many instances a rate gives.

    Args:
        number: of instances.
        rate: share that is taken, in (0, 1].
        num_classes: the least number.

    Raises:
        ValueError: if the rate is out of range.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"--rate must be in (0, 1], e.g. 0.05 for 5 %, got {rate:g}")
    return min(number, max(math.floor(rate * number + 0.5), num_classes, 1))
