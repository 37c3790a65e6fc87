"""What a step measures of its perturbation."""

from dataclasses import dataclass

from torch import Tensor

from fairseq_sam.core.tensors import Flag


@dataclass
class Measurements:
    """What one step measured.

    Attributes:
        gradient_norm: 2-norm of the ascent gradient ``g_0`` in the method's unit, over all that is perturbed.
        perturbation_norm: p-norm of the change that the weights underwent for the last pass: in half precision as it
            is after rounding, else of what was added; for embeddings, the largest of the sentences' norms.
        num_capped: groups whose T was capped.
        num_skipped: ascent steps without a usable gradient (zero, infinite or NaN); the perturbation is then 0.
        num_overflows: those of them whose gradient was infinite or NaN. On a GPU both are tensors.
        num_passes: forward-backward passes, in passes over the whole batch.
        num_forwards: forward passes without gradient, in passes over the whole batch.
        survived: how much of the perturbation the rounding to half precision leaves, from 0 to 1; None in float32.
        moved_share: share of the batch that `survived` is the mean over.
    """

    gradient_norm: float | Tensor = 0.0
    perturbation_norm: float | Tensor = 0.0
    num_capped: int | Tensor = 0
    num_skipped: int | Tensor = 0
    num_overflows: int | Tensor = 0
    num_passes: float = 0
    num_forwards: float = 0
    survived: float | Tensor | None = None
    moved_share: float = 0

    def add(self, other: "Measurements", share: float) -> None:
        """Add what another part of the same batch measured.

        Args:
            other: its measurements.
            share: which share of the batch it is. Norms are averaged, passes count by their share.
        """
        self.gradient_norm = self.gradient_norm + share * other.gradient_norm
        self.perturbation_norm = self.perturbation_norm + share * other.perturbation_norm
        self.num_capped = self.num_capped + other.num_capped
        self.num_skipped = self.num_skipped + other.num_skipped
        self.num_overflows = self.num_overflows + other.num_overflows
        self.num_passes += share * other.num_passes
        self.num_forwards += share * other.num_forwards
        if other.survived is not None:
            moved = self.moved_share + share
            earlier = 0.0 if self.survived is None else self.survived * self.moved_share
            self.survived, self.moved_share = (earlier + share * other.survived) / moved, moved


def unset(flag: Flag) -> int | Tensor:
    """1 where a flag is not set, else 0."""
    return int(not flag) if isinstance(flag, bool) else (~flag).long()
