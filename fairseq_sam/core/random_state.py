"""Torch's random state, so that all passes of a step see the same dropout masks."""

from collections.abc import Iterable

import torch
from torch import Tensor


class RandomState:
    """A snapshot of torch's CPU generator and of the CUDA generators that the parameters' devices use.

    numpy's and Python's generators are left alone: with ``--num-workers 0`` the data loader draws from them while a
    step runs.

    Args:
        devices: devices whose generators a forward pass may draw from.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu: Tensor = torch.get_rng_state()
        cuda = {torch.device(device) for device in devices if torch.device(device).type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in cuda}

    def restore(self) -> None:
        """Put the generators back to the snapshot."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)

    def reseed(self, number: int) -> None:
        """Start the `number`-th stream that follows from the snapshot: other masks, but the same in every run.

        Args:
            number: which stream, >= 0.
        """
        generator = torch.Generator()
        generator.set_state(self._cpu)
        seeds = torch.randint(2**62, (number + 1,), generator=generator)
        torch.manual_seed(int(seeds[number]))
