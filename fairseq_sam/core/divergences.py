"""How far apart two predictions for the same instances are, in single precision at least."""

from collections.abc import Callable

from torch import Tensor

from fairseq_sam.core.tensors import at_least_float32

Divergence = Callable[[Tensor, Tensor], Tensor]


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence in both directions, summed over instances.

    ``KL(p || q) + KL(q || p) = sum (p - q) (log p - log q)``, a sum of terms that are never negative.

    Args:
        log_p: logarithms of probabilities (instances, classes), finite.
        log_q: those of the other prediction.
    """
    log_p, log_q = at_least_float32(log_p), at_least_float32(log_q)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


def squared_error(first: Tensor, second: Tensor) -> Tensor:
    """Squared difference of two regressions, summed over instances: ``sum (p - q)^2``.

    Args:
        first: predictions (instances,).
        second: the other predictions.
    """
    return (at_least_float32(first) - at_least_float32(second)).square().sum()


# In how many directions a divergence measures; a mean over directions divides by it.
NUM_DIRECTIONS: dict[Divergence, int] = {symmetric_kl: 2, squared_error: 1}
