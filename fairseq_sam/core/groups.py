"""Groups of numbers: what one strength, or one ball, covers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq_sam.core.norms import joined_norms
from fairseq_sam.core.tensors import on_device

if TYPE_CHECKING:
    from fairseq_sam.core.vectors import Vector


@dataclass(frozen=True)
class Groups:
    """A cut of a list of tensors into groups.

    Attributes:
        granularity: ``element``, ``filter`` (slices of the first dimension), ``sentence`` (the same, of an embedding
            output), ``tensor``, ``layer`` or ``model``.
        layers: the layer number of each tensor; only ``layer`` reads it.
    """

    granularity: str
    layers: Sequence[int] = ()

    def norms(self, vector: "Vector", p: float = 2.0) -> Tensor | list[Tensor]:
        """Return the p-norm of the group of each number.

        Args:
            vector: the numbers.
            p: order of the norm, in (1, inf].

        Returns:
            A number for each tensor, shape (N,), float64, or one for all, shape (1,); or, where the groups are smaller
            than tensors, a tensor for each, broadcastable to it.
        """
        if self.granularity == "element":
            return [tensor.abs() for tensor in vector.values()]
        if self.granularity in ("filter", "sentence"):
            return [_slice_norm(tensor, p) for tensor in vector.values()]
        norms = vector.norms(p)
        if self.granularity == "tensor":
            return norms
        keys = self._keys(len(norms))
        return joined_norms(norms, on_device(keys, norms.device), max(keys, default=0) + 1, p)

    def sizes(self, tensors: Sequence[Tensor]) -> list[float]:
        """How many numbers the group of each tensor's numbers has: `n_i`."""
        sizes = [float(tensor.numel()) for tensor in tensors]
        if self.granularity == "element":
            return [1.0] * len(tensors)
        if self.granularity in ("filter", "sentence"):
            return [size / t.shape[0] if t.dim() else 1.0 for size, t in zip(sizes, tensors, strict=True)]
        if self.granularity == "tensor":
            return sizes
        keys = self._keys(len(tensors))
        total = [0.0] * len(set(keys))
        for key, size in zip(keys, sizes, strict=True):
            total[key] += size
        return [total[key] for key in keys]

    def num_flagged(self, flags: Tensor | Sequence[Tensor]) -> Tensor:
        """Count flagged groups; a group that spans several tensors counts once."""
        if not isinstance(flags, Tensor):
            return torch.stack([flag.sum().to(flags[0].device) for flag in flags]).sum()
        keys = self._keys(len(flags)) if self.granularity != "tensor" else list(range(len(flags)))
        first = list({key: place for place, key in reversed(list(enumerate(keys)))}.values())
        return flags[on_device(first, flags.device)].sum()

    def _keys(self, length: int) -> list[int]:
        """Group number of each tensor, counted from 0."""
        if self.granularity == "model":
            return [0] * length
        number = {layer: index for index, layer in enumerate(dict.fromkeys(self.layers))}
        return [number[layer] for layer in self.layers]


def _slice_norm(tensor: Tensor, p: float) -> Tensor:
    if tensor.dim() <= 1:
        return tensor.abs()
    norm: Tensor = torch.linalg.vector_norm(tensor, p, dim=tuple(range(1, tensor.dim())), keepdim=True)
    return norm
