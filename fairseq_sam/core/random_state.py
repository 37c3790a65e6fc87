"""Torch's random state, so that all passes of a step see the same dropout masks."""

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor


class RandomState:
    """A snapshot of torch's CPU generator and of the CUDA generators that the parameters' devices use.

    numpy's and Python's generators are left alone: with ``--num-workers 0`` the data loader draws from them while a
    step runs.

    Args:
        devices: devices whose generators a forward pass may draw from.
        salt: tells snapshots of equal states apart in ``generator``: without dropout nothing advances torch's.
    """

    def __init__(self, devices: Iterable[torch.device], salt: str = "") -> None:
        self._salt = salt
        self._cpu: Tensor = torch.get_rng_state()
        cuda = {torch.device(device) for device in devices if torch.device(device).type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in cuda}

    def restore(self) -> None:
        """Put the generators back to the snapshot."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)

    def generator(self, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator of its own that follows from the snapshot: the same in every run, and never torch's.

        Args:
            stream: what the numbers are for; different names give independent numbers.
            device: where they are drawn.
        """
        source = torch.Generator()
        source.set_state(self._cpu)
        seed = int(torch.randint(2**62, (), generator=source))
        name = f"{self._salt}/{stream}".encode()
        return torch.Generator(device).manual_seed((seed ^ zlib.crc32(name) << 16) % 2**63)

    def reseed(self, number: int) -> None:
        """Start the `number`-th stream that follows from the snapshot: other masks, but the same in every run.

        Args:
            number: which stream, >= 0.
        """
        generator = torch.Generator()
        generator.set_state(self._cpu)
        seeds = torch.randint(2**62, (number + 1,), generator=generator)
        torch.manual_seed(int(seeds[number]))
