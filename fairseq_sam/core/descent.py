"""The descent gradient: what the base optimizer gets, from the gradients of all passes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fairseq_sam.core.method import Method
from fairseq_sam.core.norms import vector_norm
from fairseq_sam.core.tensors import Flag, Gradients, dense, is_own, kept, known

BLOCK = 2**16  # numbers whose products are added up in float32
SMALL = 1e-20  # sums below it may have lost products that float32 has no numbers for

# From this process's part of a gradient: the whole gradient, summed over workers.
Reduce = Callable[[Gradients], Gradients]


def local(gradients: Gradients) -> Gradients:
    """Reduce over one worker."""
    return gradients


class Descent:
    """``last``: the gradient of the last pass (SAM). Base of the other rules.

    Args:
        method: the method.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.first: Gradients = []  # g_0, where it is needed
        self.sample_size = 0.0  # of the ascent passes

    def observe(self, gradients: Gradients, sample_size: float, counts: Flag = True) -> None:
        """See the gradient of the next ascent pass, which is the descent's own from then on.

        Args:
            gradients: of the pass.
            sample_size: of the pass.
            counts: whether it is one; else nothing is done.
        """
        if counts is False:
            return
        if not self.first and (self.method.descent == "gsam" or self.method.between == "reuse"):
            self.first = gradients
        self.sample_size = sample_size

    def combine(self, i: int, gradient: Tensor | None, *, overwrite: bool = False) -> Tensor | None:
        """Return the descent gradient of parameter `i` from the last pass's, which may be overwritten or not."""
        return gradient

    def combine_all(self, gradients: Gradients, sample_size: float, reduce: Reduce) -> Gradients:
        """Return the descent gradient from that of the last pass, whose sample size may differ from the ascent's.

        Args:
            gradients: of the last pass; overwritten.
            sample_size: of the last pass.
            reduce: sums a gradient over workers.
        """
        return [self.combine(i, gradient, overwrite=True) for i, gradient in enumerate(gradients)]

    def share(self, sample_size: float) -> float:
        """Factor that brings ascent gradients to the last pass's sample size: 1 unless the ascent saw a part."""
        if self.method.ascent_fraction == 1 or not (self.sample_size and sample_size):
            return 1.0
        return sample_size / self.sample_size


class Mean(Descent):
    """``mean``: running mean of g_0 .. g_K (GA-SAM eq. 14). Equal gradients leave it bit for bit as it is."""

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self._mean: Gradients = []
        self._num: int | Tensor = 0

    def observe(self, gradients: Gradients, sample_size: float, counts: Flag = True) -> None:
        """See the gradient of the next ascent pass, which is the descent's own from then on."""
        super().observe(gradients, sample_size, counts)
        if counts is False:
            return
        mean = self._mean or [None] * len(gradients)
        if isinstance(counts, Tensor):  # in place of one that does not count stands the mean itself
            mean = [None if m is None else dense(m) for m in mean]
            gradients = [_where(counts, g, m) for g, m in zip(gradients, mean, strict=True)]
        # The gradient itself may be what the weights are about to be moved by.
        overwrite = "" if self.first else "mean"
        self._mean = [_running_mean(m, g, self._num, overwrite) for m, g in zip(mean, gradients, strict=True)]
        self._num = self._num + (1 if counts is True else counts)

    def combine(self, i: int, gradient: Tensor | None, *, overwrite: bool = False) -> Tensor | None:
        """Extend the mean by the last pass's gradient."""
        return _running_mean(
            self._mean[i] if self._mean else None, gradient, self._num, "gradient" if overwrite else ""
        )

    def combine_all(self, gradients: Gradients, sample_size: float, reduce: Reduce) -> Gradients:
        """Extend the mean by the last pass's gradient, at its sample size."""
        share = self.share(sample_size)
        if share != 1.0:
            self._mean = [None if mean is None else mean * share for mean in self._mean]
        return super().combine_all(gradients, sample_size, reduce)


class SurrogateGap(Descent):
    """``gsam``: ``g_s - alpha (g_0 - projection of g_0 on g_s)`` (Zhuang et al. 2022, Algorithm 1)."""

    def combine_all(self, gradients: Gradients, sample_size: float, reduce: Reduce) -> Gradients:
        """Subtract the component of the clean gradient that is orthogonal to the last pass's."""
        alpha = self.method.gsam_alpha
        if not alpha or not self.first:
            return gradients
        share = self.share(sample_size)
        clean = self.first if share == 1.0 else [None if g is None else g * share for g in self.first]
        ratio = projection_ratio(reduce(clean), reduce(gradients))
        return [_surrogate(g, c, alpha, ratio) for g, c in zip(gradients, clean, strict=True)]


DESCENTS: dict[str, type[Descent]] = {
    "last": Descent,
    "mean": Mean,
    "mean_ascent": Mean,
    "gsam": SurrogateGap,
    "sds": Descent,
}


def sharpness_component(clean: Gradients, last: Gradients) -> Gradients:
    """Component of the last pass's gradient that is orthogonal to the clean one (LookSAM, Algorithm 1)."""
    ratio = projection_ratio(last, clean)
    return [_without(g, c, ratio) for g, c in zip(last, clean, strict=True)]


def add_component(
    gradients: Gradients,
    component: Gradients,
    length: Tensor,
    alpha: float,
    reduce: Reduce = local,
    num_workers: int = 1,
) -> Gradients:
    """``g + alpha ||g|| / ||v|| v`` (LookSAM, Algorithm 1); g where v is 0.

    Args:
        gradients: g, or this worker's part of it; overwritten.
        component: v, the same on all workers.
        length: ``||v||``, a 0-dimensional tensor.
        alpha: weight of the component, >= 0.
        reduce: makes g from its parts.
        num_workers: how many workers' results are summed later, each with its share of the component.
    """
    usable = known(torch.isfinite(length) & (length > 0))
    if alpha == 0 or usable is False:
        return gradients
    factor = alpha * length_of(reduce(gradients)).to(length.device) / (length * num_workers)

    def with_part(g: Tensor, v: Tensor) -> Tensor:
        if usable is True and is_own(g, v):
            return g.addcmul_(v, factor.to(v.device, v.dtype))
        part = v * factor.to(v.device)
        part = (kept(part, usable) if isinstance(usable, Tensor) else part).to(g.dtype)
        if is_own(g, part):
            return g.add_(part)
        return part + g if g.is_sparse else g + part  # torch adds sparse tensors to dense ones, not the reverse

    return [g if v is None or g is None else with_part(g, v) for g, v in zip(gradients, component, strict=True)]


def projection_ratio(of: Gradients, on: Gradients) -> Tensor:
    """``<of, on> / ||on||^2``, 0 where `on` is 0; exactly 1 for equal ones."""
    square = dot(on, on)
    return torch.where(square > 0, dot(of, on).to(square.device) / square, torch.zeros_like(square))


def length_of(gradients: Gradients) -> Tensor:
    """Euclidean norm of a gradient taken as a vector, in float64; a missing gradient counts as 0."""
    present = [dense(g) for g in gradients if g is not None]
    return vector_norm(present, 2.0) if present else torch.zeros((), dtype=torch.float64)


def dot(first: Gradients, second: Gradients) -> Tensor:
    """Inner product of two gradients taken as vectors, in float64; a missing gradient counts as 0."""
    pairs = [
        (dense(a).reshape(-1), dense(b).reshape(-1))
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    found = _cpu_dot(pairs)
    if found is not None:
        return found
    device = pairs[0][0].device
    return torch.stack([torch.dot(a.double(), b.double()).to(device) for a, b in pairs]).sum()


def _cpu_dot(pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The sum of float32 vectors' products on the CPU, where torch is slow with another type; None for all others.

    Blocks are short enough for float32.
    """
    if any(each.device.type != "cpu" or each.dtype != torch.float32 for pair in pairs for each in pair):
        return None
    blocks = [
        torch.dot(x, y) for a, b in pairs for x, y in zip(torch.split(a, BLOCK), torch.split(b, BLOCK), strict=True)
    ]
    found = torch.stack(blocks).sum(dtype=torch.float64)
    return found if SMALL < abs(float(found)) < math.inf else None  # else products leave the range of float32


def _surrogate(last: Tensor | None, clean: Tensor | None, alpha: float, ratio: Tensor) -> Tensor | None:
    if clean is None:
        return None if last is None else last * (1.0 + alpha * ratio.to(last.device)).to(last.dtype)
    if last is None:
        return clean * -alpha
    factor = ratio.to(last.device, last.dtype)
    if is_own(last, clean) and is_own(clean, last):
        return last.sub_(clean.addcmul_(last, factor, value=-1.0), alpha=alpha)
    if last.is_sparse or clean.is_sparse:
        return last - alpha * (clean - last * factor)
    return torch.sub(last, clean.addcmul(last, factor, value=-1.0), alpha=alpha)


def _without(gradient: Tensor | None, other: Tensor | None, factor: Tensor) -> Tensor | None:
    """A gradient minus the product of another one and a factor; a missing one is 0."""
    if other is None:
        return gradient
    factor = factor.to(other.device, other.dtype)
    if gradient is None:
        return -(other * factor)
    if gradient.is_sparse or other.is_sparse or gradient.dtype != other.dtype:
        return gradient - other * factor
    return torch.addcmul(gradient, other, factor, value=-1.0)


def _where(flag: Tensor, gradient: Tensor | None, other: Tensor | None) -> Tensor | None:
    """One gradient where a flag is set, else another; a missing one is 0."""
    if gradient is None:
        return None if other is None else kept(other, ~flag)
    flag = flag.to(gradient.device)
    return kept(gradient, flag) if other is None else torch.where(flag, dense(gradient), dense(other))


def _running_mean(
    mean: Tensor | None, gradient: Tensor | None, count: int | Tensor, overwrite: str = ""
) -> Tensor | None:
    """Mean of `count` gradients, extended by one; a missing gradient counts as 0.

    Args:
        mean: of the others.
        gradient: the new one.
        count: how many the others are.
        overwrite: ``mean`` or ``gradient``: which may be overwritten; default neither.
    """
    if isinstance(count, int) and count == 0:
        return gradient
    if gradient is None:
        return None if mean is None else mean * (1.0 - _share(count, mean))
    if mean is None:
        return gradient * _share(count, gradient)
    if mean.is_sparse != gradient.is_sparse:
        mean, gradient = dense(mean), dense(gradient)
    share = _share(count, mean)
    if overwrite == "gradient" and is_own(gradient, mean):
        return gradient.lerp_(mean, 1.0 - share)
    if overwrite == "mean" and is_own(mean, gradient):
        return mean.lerp_(gradient, share)
    return mean + (gradient - mean) * share


def _share(count: int | Tensor, like: Tensor) -> float | Tensor:
    """Of a gradient in the mean of `count` others and itself."""
    return 1.0 / (count + 1) if isinstance(count, int) else 1.0 / (count + 1).to(like.device, like.dtype)
