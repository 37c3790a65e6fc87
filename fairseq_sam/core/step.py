"""One sharpness-aware step: K ascent passes, the move, the last pass, the restore."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fairseq_sam.core.method import Method
from fairseq_sam.core.norms import project_, scale_, steepest_direction_, vector_norm
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.scales import ScaleOperator, build_scale
from fairseq_sam.core.space import ParameterSpace

Result = TypeVar("Result")
Gradients = list[Tensor | None]
# Given the gradients of an ascent pass and what the pass returned: the gradients to ascend, and their unit factor.
AscentGradient = Callable[[Gradients, Result], tuple[Gradients, float]]


@dataclass
class Measurements:
    """What one step measured.

    Attributes:
        gradient_norm: 2-norm of the ascent gradient ``g_0`` in the method's unit, over all perturbed parameters.
        perturbation_norm: p-norm of the change that the weights really underwent for the last pass.
        num_capped: groups whose T was capped.
        num_skipped: ascent steps without a usable gradient (zero, infinite or NaN); the perturbation is then 0.
        num_passes: forward-backward passes.
    """

    gradient_norm: float | Tensor = 0.0
    perturbation_norm: float | Tensor = 0.0
    num_capped: int | Tensor = 0
    num_skipped: int = 0
    num_passes: int = 0


class SharpnessAwareStep(Generic[Result]):
    """The passes of one update (or of one micro-batch of it) around a black-box forward and backward.

    ``ascend`` finds the perturbation from K passes; ``descend`` runs the last pass at the perturbed weights, once for
    each micro-batch that shares the perturbation, and leaves the descent gradient in ``p.grad``, added to what was
    there. Outside a pass the weights are always the unperturbed ones, bit for bit, also after an exception. Buffers,
    such as BatchNorm's statistics, end as the first pass, at the unperturbed weights, left them.

    Args:
        method: the method.
        space: the trained parameters.
    """

    def __init__(self, method: Method, space: ParameterSpace) -> None:
        self.method = method
        self.space = space
        self.measured = Measurements()
        self._random = RandomState(tensor.device for tensor in space.tensors)
        self._backup = _clone(space.tensors)
        self._buffers = _clone(space.buffers)
        self._clean_buffers = self._buffers
        self._mean: Gradients = [None] * len(space.tensors)
        self._num_in_mean = 0
        self._active: list[int] = []  # parameters that have an ascent gradient and may move
        self._transformed: list[Tensor] = []  # T^-1 a of the active parameters
        self._scale = ScaleOperator([], 0)

    def ascend(self, run_pass: Callable[[], Result], ascent_gradient: AscentGradient[Result]) -> Result:
        """Run the K ascent passes.

        Args:
            run_pass: forward and backward at the weights as they are; leaves gradients in ``p.grad``.
            ascent_gradient: see ``AscentGradient``; brings gradients to a common unit, reduces them over workers.

        Returns:
            What the first pass, at the unperturbed weights, returned.
        """
        first: list[Result] = []
        prior = self._take_gradients()
        try:
            for k in range(self.method.steps):
                self._set_masks(k)
                result = self._run_at_perturbed(run_pass)
                first = first or [result]
                gradients = self._take_gradients()
                is_finite = self._advance(*ascent_gradient(gradients, result))
                if is_finite or k == 0:  # what goes wrong at w must reach the base optimizer and the loss scaler
                    self._update_mean(gradients)
                if k == 0:
                    self._clean_buffers = _clone(self.space.buffers)
        finally:
            self._put_gradients(prior)
            _copy_(self.space.buffers, self._buffers)
        self._random.restore()
        return first[0]

    def descend(
        self, run_pass: Callable[[], Result], *, finish: bool = True, shared: bool = False, in_backward: bool = False
    ) -> Result:
        """Run the last pass at ``w + a_K`` and add the descent gradient to ``p.grad``.

        Args:
            run_pass: forward and backward of one micro-batch.
            finish: this is the last micro-batch that shares the perturbation.
            shared: the ascent saw all micro-batches of the update, so their gradients enter the mean as one.
            in_backward: combine gradients inside backward, before a hook of torch's DDP reduces them.

        Returns:
            What the pass returned.
        """
        prior = self._take_gradients()
        raw: Gradients = [None] * len(prior)
        combine = functools.partial(self._combine_shared if shared else self._combine, finish=finish)
        handles: list[Any] = []
        try:
            if in_backward:
                for i, tensor in enumerate(self.space.tensors):
                    hook = functools.partial(self._combine_in_backward, i, tensor, raw, prior, combine)
                    handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]
            result = self._run_at_perturbed(run_pass, measure=True)
        except BaseException:
            self._put_gradients(prior)
            _copy_(self.space.buffers, self._buffers)
            raise
        finally:
            for handle in handles:
                handle.remove()
        self._put_gradients(
            [
                tensor.grad if in_backward and tensor.grad is not None else combine(i, prior[i], tensor.grad)
                for i, tensor in enumerate(self.space.tensors)
            ]
        )
        _copy_(self.space.buffers, self._clean_buffers)
        return result

    # -- the descent gradient --------------------------------------------------------------------------------------

    def _update_mean(self, gradients: Gradients) -> None:
        """Running mean of g_0 .. g_k. Equal gradients leave it bit for bit as it is, whatever K."""
        if self.method.descent == "mean":
            count = self._num_in_mean
            self._mean = [_running_mean(m, g, count) for m, g in zip(self._mean, gradients, strict=True)]
            self._num_in_mean += 1

    def _with_mean(self, i: int, gradient: Tensor | None) -> Tensor | None:
        if self.method.descent != "mean":
            return gradient
        return _running_mean(self._mean[i], gradient, self._num_in_mean)

    def _combine(self, i: int, prior: Tensor | None, gradient: Tensor | None, finish: bool) -> Tensor | None:
        """Earlier micro-batches' gradient plus this micro-batch's descent gradient, as plain accumulation adds."""
        return _add(prior, self._with_mean(i, gradient))

    def _combine_shared(self, i: int, prior: Tensor | None, gradient: Tensor | None, finish: bool) -> Tensor | None:
        """Descent gradient of the whole update, once its last micro-batch is in."""
        accumulated = _add(prior, gradient)
        return self._with_mean(i, accumulated) if finish else accumulated

    def _combine_in_backward(
        self,
        i: int,
        tensor: Tensor,
        raw: Gradients,
        prior: Gradients,
        combine: Callable[[int, Tensor | None, Tensor | None], Tensor | None],
        gradient: Tensor,
    ) -> Tensor | None:
        """Turn the gradient that backward is about to accumulate into all that ``p.grad`` shall hold.

        A task may run backward several times in one pass; the sum so far replaces what the earlier call left.
        """
        raw[i] = _add(raw[i], gradient)
        tensor.grad = None
        return combine(i, prior[i], raw[i])

    def _take_gradients(self) -> Gradients:
        gradients = [tensor.grad for tensor in self.space.tensors]
        for tensor in self.space.tensors:
            tensor.grad = None
        return gradients

    def _put_gradients(self, gradients: Gradients) -> None:
        for tensor, gradient in zip(self.space.tensors, gradients, strict=True):
            tensor.grad = gradient

    # -- the ascent ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _advance(self, gradients: Gradients, unit: float) -> bool:
        """From ``a_{k-1}`` and ``g_{k-1}`` to ``a_k`` (GA-SAM eq. 15-16), kept as ``T^-1 a`` so that T may be 0.

        Returns whether the gradient was finite.
        """
        first = not self._active
        if first:
            self._active = [
                i
                for i, g in enumerate(gradients)
                if g is not None and self.space.perturbed[i] and self.space.tensors[i].numel()
            ]
        ascent = [self._ascent_tensor(i, gradients[i]) for i in self._active]
        norm = vector_norm(ascent, 2.0) * unit if ascent else torch.zeros(())
        if first:
            self.measured.gradient_norm = norm
        is_finite = bool(torch.isfinite(norm))
        if is_finite and norm > 0:
            if not self._scale.factors:
                self._build_scale(ascent, unit)
            self._step_(ascent)
        else:
            self._skip()
        return is_finite

    def _ascent_tensor(self, i: int, gradient: Tensor | None) -> Tensor:
        """A copy of the gradient that may be overwritten, in float32 or better."""
        weight = self._anchor(i)
        if gradient is None:
            return torch.zeros_like(weight)
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        return dense.detach().to(weight.dtype, copy=True)

    def _anchor(self, i: int) -> Tensor:
        """Unperturbed weights of parameter `i` in float32 or better: the optimizer's masters where there are any."""
        master = self.space.masters[i]
        weight = self._backup[i] if master is None else master.detach()
        return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight

    def _build_scale(self, ascent: Sequence[Tensor], unit: float) -> None:
        self._scale = build_scale(
            self.method.scale,
            self.method.granularity,
            [self._anchor(i) for i in self._active],
            ascent,
            [self.space.layers[i] for i in self._active],
            unit=unit,
            eta=self.method.asam_eta,
            max_scale=self.method.max_scale,
        )
        self.measured.num_capped = self._scale.num_capped

    def _step_(self, ascent: list[Tensor]) -> None:
        """Add the step along the steepest direction to ``T^-1 a`` and project. Overwrites `ascent`."""
        for gradient, factor in zip(ascent, self._scale.factors, strict=True):
            if factor is not None:
                gradient.mul_(factor)
        norm = vector_norm(ascent, torch.inf)
        if not (torch.isfinite(norm) and norm > 0):
            self._skip()
            return
        direction = steepest_direction_(ascent, self.method.norm)
        scale_(direction, self.method.eta)
        if self._transformed:
            torch._foreach_add_(direction, self._transformed)
        project_(direction, self.method.norm, self.method.epsilon)
        self._transformed = direction

    def _skip(self) -> None:
        self.measured.num_skipped += 1
        self._transformed = []

    # -- the move --------------------------------------------------------------------------------------------------

    def _set_masks(self, k: int) -> None:
        """Give ascent pass `k` its random state: that of the last pass, or a stream of its own."""
        if self.method.dropout == "fresh" and self.method.epsilon > 0:
            self._random.reseed(k)
        else:
            self._random.restore()

    def _run_at_perturbed(self, run_pass: Callable[[], Result], *, measure: bool = False) -> Result:
        with self._perturbed() if self._transformed else nullcontext():
            if measure and self._transformed:
                self.measured.perturbation_norm = self._applied_norm()
            self.measured.num_passes += 1
            return run_pass()

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        try:
            self._move()
            yield
        finally:
            try:
                self._restore()
            except BaseException:  # an interrupt in the middle of the restore must not leave it half done
                self._restore()
                raise

    @torch.no_grad()
    def _move(self) -> None:
        for i, transformed, factor in zip(self._active, self._transformed, self._scale.factors, strict=True):
            perturbation = transformed if factor is None else transformed * factor
            self.space.tensors[i].data.copy_(self._anchor(i) + perturbation)
        torch.clear_autocast_cache()  # an autocast around all passes would go on with casts of the unperturbed weights

    def _restore(self) -> None:
        _copy_(self.space.tensors, self._backup)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _applied_norm(self) -> Tensor:
        moved = [self.space.tensors[i].detach().to(self._anchor(i).dtype) - self._anchor(i) for i in self._active]
        return vector_norm(moved, self.method.norm)


def _clone(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _copy_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _running_mean(mean: Tensor | None, gradient: Tensor | None, count: int) -> Tensor | None:
    """Mean of `count` gradients, extended by one; a missing gradient counts as 0."""
    if count == 0:
        return gradient
    if gradient is None:
        return None if mean is None else mean * (count / (count + 1))
    if mean is None:
        return gradient / (count + 1)
    return mean + (gradient - mean) / (count + 1)
