"""Groups of numbers: what one strength, or one ball, covers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_sam.core.norms import tensor_norms


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

    def norms(self, tensors: Sequence[Tensor], p: float = 2.0) -> list[Tensor]:
        """p-norm of the group of each number, broadcastable to each tensor; float64 where a group is a whole tensor."""
        if self.granularity == "element":
            return [tensor.abs() for tensor in tensors]
        if self.granularity in ("filter", "sentence"):
            return [_slice_norm(tensor, p) for tensor in tensors]
        norms = _tensor_norms(tensors, p)
        if self.granularity != "tensor":
            keys = self._keys(len(tensors))
            norms = _joined_norms(norms, torch.tensor(keys, device=norms.device), len(set(keys)), p)
        return list(norms.unbind())

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

    def num_flagged(self, flags: Sequence[Tensor]) -> Tensor:
        """Count flagged groups; a group that spans several tensors counts once."""
        if self.granularity in ("layer", "model"):
            flags = list(dict(zip(self._keys(len(flags)), flags, strict=True)).values())
        return torch.stack([flag.sum().to(flags[0].device) for flag in flags]).sum()

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


def _tensor_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """p-norm of each tensor, in float64: a vector of length ``len(tensors)``."""
    return torch.stack([norm.to(tensors[0].device) for norm in tensor_norms(tensors, p)])


def _joined_norms(norms: Tensor, groups: Tensor, num_groups: int, p: float) -> Tensor:
    """p-norm of the union of the vectors in each group, from the norms of the vectors."""
    largest = norms.new_zeros(num_groups).scatter_reduce_(0, groups, norms, "amax")
    if p == math.inf:
        return largest[groups]
    safe = torch.where(largest > 0, largest, 1.0)  # powers of quotients stay in range
    sums = norms.new_zeros(num_groups).index_add_(0, groups, (norms / safe[groups]) ** p)
    return (safe * sums ** (1.0 / p))[groups]
