"""One sharpness-aware step: the ascent passes, the move, the last pass, the restore."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Generic

import torch
from torch import Tensor

from fairseq_sam.core.batch import Batch, Result
from fairseq_sam.core.descent import (
    DESCENTS,
    Descent,
    Reduce,
    local,
    sharpness_component,
)
from fairseq_sam.core.embedding_perturbation import EmbeddingPerturbation
from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.measurements import Measurements
from fairseq_sam.core.memory import Memory
from fairseq_sam.core.method import Method
from fairseq_sam.core.perturbation import WeightPerturbation
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.tensors import (
    Gradients,
    add,
    add_all,
    at_least_float32,
    copies,
    copy_,
    dense,
    kept,
)
from fairseq_sam.core.unperturbed import running

# Given the gradients of an ascent pass and what the pass returned: the gradients to ascend, and their unit factor.
AscentGradient = Callable[[Gradients, Result], tuple[Gradients, float]]


class SharpnessAwareStep(Generic[Result]):
    """The passes of one update (or of one micro-batch of it) around black-box forward and backward passes.

    ``ascend`` finds the perturbation; ``descend`` runs the last pass at the perturbed weights, once for each
    micro-batch that shares the perturbation, and leaves the descent gradient in ``p.grad``, added to what was there.
    Outside a pass the weights are always the unperturbed ones, bit for bit, also after an exception. Buffers, such as
    BatchNorm's statistics, end as the first pass, at the unperturbed weights, left them.

    A step may be used for one part of a batch after the other; each ``ascend`` starts anew.

    Args:
        method: the method.
        space: the trained parameters.
        memory: what the method remembers between updates.
        embeddings: the word embeddings, for a method that perturbs them.
        salt: names this step among those of a run, for random directions and masks.
        scales_loss: a gradient scaler multiplies the loss, and skips updates whose gradient is not finite. It learns of
            an ascent pass that was not from a descent gradient that is infinite; without a scaler the ascent step
            alone is skipped.
    """

    def __init__(
        self,
        method: Method,
        space: ParameterSpace,
        memory: Memory | None = None,
        embeddings: WordEmbeddings | None = None,
        salt: str = "",
        scales_loss: bool = False,
    ) -> None:
        self.method = method
        self.space = space
        self._memory = memory or Memory()
        self._salt = salt
        self._scales_loss = scales_loss
        self._perturbation: WeightPerturbation | EmbeddingPerturbation
        if method.where == "embeddings":
            if embeddings is None:
                raise ValueError("where (--sam-where) embeddings needs the model's word embeddings")
            self._perturbation = EmbeddingPerturbation(method, embeddings)
        else:
            self._perturbation = WeightPerturbation(method, space, self._memory.masks(space), self._memory.room)
        self._num_parts = 0

    @property
    def measured(self) -> Measurements:
        """What this step measured since ``ascend``."""
        return self._perturbation.measured

    def _begin(self) -> None:
        self._random = RandomState((t.device for t in self.space.tensors), f"{self._salt}.{self._num_parts}")
        self._num_parts += 1
        self._buffers = copies(self.space.buffers)
        self._clean_buffers: list[Tensor] = []  # as the first ascent pass left them; empty without one
        self._descent: Descent = DESCENTS[self.method.descent](self.method)
        self._clean_losses: Tensor | None = None  # of the instances at w, where the descent selects
        self._rises: Tensor | None = None  # by how much they rose
        self._ascent_passes: float = 0
        self._sample_size = 0.0  # of the last pass so far
        self._perturbation.begin(self._random)

    # -- the ascent ------------------------------------------------------------------------------------------------

    def ascend(self, batch: Batch[Result], ascent_gradient: AscentGradient[Result]) -> Result | None:
        """Find the perturbation.

        Args:
            batch: what shares the perturbation.
            ascent_gradient: see ``AscentGradient``; brings gradients to a common unit, reduces them over workers.

        Returns:
            What the first pass, at the unperturbed weights, returned; None for a method without such a pass.
        """
        self._begin()
        prior = self.space.take_gradients()
        try:
            return self._ascend(batch, ascent_gradient)
        except BaseException:
            self._perturbation.restore()
            raise
        finally:
            self.space.put_gradients(prior)
            copy_(self.space.buffers, self._buffers)
            self._random.restore()

    def _ascend(self, batch: Batch[Result], ascent_gradient: AscentGradient[Result]) -> Result | None:
        first: list[Result] = []
        part, share = self._head(batch)
        run = self._pass_over(part, share)
        for k in range(self.method.num_ascents):
            if not self.method.has_first_pass:
                break
            self._set_masks(k)
            with self._perturbation.applied(), running(self._perturbation, ascends=True):
                result = run(k)
            if self.method.epsilon == 0:
                self._perturbation.restore()  # quant-noise overwrites weights in the forward pass
            self._ascent_passes += share
            first = first or [result]
            gradients = self.space.take_gradients()
            keeps = self.method.needs_clean_gradient  # the descent, which is given them next
            is_finite = self._perturbation.advance(*ascent_gradient(gradients, result), overwrite=not keeps)
            # What goes wrong at w must reach the base optimizer and the loss scaler.
            self._descent.observe(gradients, float(result.sample_size), is_finite if k else True)
            if k == 0:
                self._clean_buffers = copies(self.space.buffers)
        if self.method.ascent == "random":
            self._weights().advance_randomly(self._random)
        if self.method.selects and self._perturbation.moves:  # without a perturbation no loss rises
            self._rises = self._loss_rises(batch)
        self.measured.num_passes = self._ascent_passes
        return first[0] if first else None

    def _head(self, batch: Batch[Result]) -> tuple[Batch[Result], float]:
        """The first instances of the batch that the ascent sees, and which share of all they are."""
        if self.method.ascent_fraction == 1 or self.method.epsilon == 0:
            return batch, 1
        number = max(1, round(self.method.ascent_fraction * len(batch)))
        return (batch, 1) if number >= len(batch) else (batch.select(range(number)), number / len(batch))

    def _pass_over(self, part: Batch[Result], share: float) -> Callable[[int], Result]:
        """Ascent pass k over a part of the batch."""
        keeps_losses = self.method.selects and share == 1
        is_weighted = self.method.ascent == "weighted"
        if self.method.epsilon == 0 or not (is_weighted or keeps_losses):
            return lambda k: part.run()
        shifted = self._shifted_losses(part, share) if is_weighted else ()
        found: list[Tensor] = []

        def run(k: int) -> Result:
            if k and is_weighted:  # the weights are those of the first pass
                return part.run_weighted(lambda _, *of_first: self._instance_weights(*of_first), *found, *shifted)[0]
            if k:
                return part.run()
            result, losses = part.run_weighted(self._instance_weights, *shifted) if shifted else part.run_with_losses()
            found[:] = [losses]
            if keeps_losses:
                self._clean_losses = losses
            return result

        return run

    def _shifted_losses(self, part: Batch[Result], share: float) -> tuple[Tensor, Tensor]:
        """``l(w+r)`` and ``l(w-r)`` of every instance, under the masks of the first pass."""
        weights = self._weights()
        direction = weights.gaussian(self._random)
        with weights.shifted(direction, 1.0), running(weights):
            up = self._losses(part, share, masks_of=0)
        with weights.shifted(direction, -1.0), running(weights):
            down = self._losses(part, share, masks_of=0)
        return up, down

    def _instance_weights(self, clean: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """``|l(w+r) + l(w-r) - 2 l(w)| / max(|l(w+r) - l(w-r)|, eta)`` of every instance (delta-SAM eq. 5).

        0 where a loss is missing, infinite or NaN: nothing is known of the instance's curvature.
        """
        clean = at_least_float32(clean)
        up, down = up.to(clean), down.to(clean)
        weights = (up + down - 2.0 * clean).abs() / (up - down).abs().clamp(min=float(self.method.delta_eta or 0.0))
        return torch.where(torch.isfinite(weights), weights, 0.0)

    def _loss_rises(self, batch: Batch[Result]) -> Tensor:
        """By how much the losses of the instances are higher at ``w + a_K`` than at w, under the same masks."""
        masks_of: int | None = 0  # the clean losses are those of ascent pass 0
        if self._clean_losses is None:
            self._clean_losses, masks_of = self._losses(batch), None
        with self._perturbation.applied(), running(self._perturbation):
            losses = self._losses(batch, masks_of=masks_of)
        return torch.nan_to_num(losses.to(self._clean_losses) - self._clean_losses, nan=torch.inf)

    def _losses(self, batch: Batch[Result], share: float = 1, masks_of: int | None = None) -> Tensor:
        """Losses of the instances with the masks of the last pass or of an ascent pass, in float32 or better."""
        if masks_of is None:
            self._random.restore()
        else:
            self._set_masks(masks_of)
        self.measured.num_forwards += share
        buffers = copies(self.space.buffers)
        try:
            with torch.no_grad():
                losses = batch.losses()
        finally:
            copy_(self.space.buffers, buffers)
        return at_least_float32(losses)

    def _weights(self) -> WeightPerturbation:
        assert isinstance(self._perturbation, WeightPerturbation), "embeddings are only perturbed by their gradients"
        return self._perturbation

    def _set_masks(self, k: int) -> None:
        """Give ascent pass `k` its random state: that of the last pass, or a stream of its own."""
        if self.method.dropout == "fresh" and self.method.epsilon > 0:
            self._random.reseed(k)
        else:
            self._random.restore()

    # -- the descent -----------------------------------------------------------------------------------------------

    def descend(
        self,
        batch: Batch[Result],
        *,
        finish: bool = True,
        shared: bool = False,
        in_backward: bool = False,
        reduce: Reduce = local,
        offset: int | None = 0,
    ) -> Result:
        """Run the last pass at ``w + a_K`` and add the descent gradient to ``p.grad``.

        Args:
            batch: one micro-batch.
            finish: this is the last micro-batch that shares the perturbation.
            shared: the ascent saw all micro-batches of the update, so their gradients enter the descent as one.
            in_backward: combine gradients inside backward, before a hook of torch's DDP reduces them; only for
                methods that do not combine whole gradients.
            reduce: sums a gradient over the workers that share the perturbation.
            offset: number of instances of the shared ascent that come before this micro-batch's; None if it had
                none of them.

        Returns:
            What the pass returned.
        """
        prior = self.space.take_gradients()
        combine = functools.partial(self._combine, finish and shared, shared)
        hooks: list[Any] = []
        try:
            selected, share = self._select(batch, offset)
            with _gradient_hooks(self.space.tensors, prior, combine, hooks) if in_backward else nullcontext():
                with self._perturbation.applied(final=finish), running(self._perturbation):
                    result = selected.run()
                    self._perturbation.measure()
        except BaseException:
            self._perturbation.restore()
            _remove(hooks)
            self.space.put_gradients(prior)
            copy_(self.space.buffers, self._buffers)
            raise
        self._sample_size += float(result.sample_size)
        if not in_backward:
            self.space.put_gradients(self._combined(prior, self.space.take_gradients(), finish, shared, reduce))
        else:
            pairs = enumerate(zip(self.space.tensors, prior, strict=True))
            self.space.put_gradients([combine(i, g, None) if t.grad is None else t.grad for i, (t, g) in pairs])
        if self._clean_buffers:
            copy_(self.space.buffers, self._clean_buffers)
        self.measured.num_passes = self._ascent_passes + share
        return result

    def _select(self, batch: Batch[Result], offset: int | None) -> tuple[Batch[Result], float]:
        """The instances that the last pass sees, and which share of the micro-batch they are."""
        if self._rises is None or offset is None:
            return batch, 1
        number = max(1, round(float(self.method.esam_gamma or 1.0) * len(batch)))
        if number >= len(batch):
            return batch, 1
        rises = self._rises[offset : offset + len(batch)]
        chosen = sorted(torch.argsort(rises, descending=True, stable=True)[:number].tolist())  # ties: the first
        return batch.select(chosen), number / len(batch)

    def _combine(
        self, complete: bool, shared: bool, i: int, prior: Tensor | None, gradient: Tensor | None
    ) -> Tensor | None:
        """All that ``p.grad`` shall hold of parameter `i`, as plain accumulation adds."""
        if not shared:
            return add(prior, self._told(self._descent.combine(i, gradient)))
        accumulated = add(prior, gradient)  # enters the descent as one gradient, once the last micro-batch is in
        return self._told(self._descent.combine(i, accumulated)) if complete else accumulated

    def _told(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient, or an infinite one where a gradient scaler has to learn of the ascent."""
        if gradient is None or not self._scales_loss:
            return gradient
        overflows = self.measured.num_overflows > 0
        if isinstance(overflows, Tensor):
            return torch.where(overflows.to(gradient.device), torch.inf, dense(gradient))
        return torch.full_like(dense(gradient), torch.inf) if overflows else gradient

    def _combined(
        self, prior: Gradients, gradients: Gradients, finish: bool, shared: bool, reduce: Reduce
    ) -> Gradients:
        if shared:
            gradients, prior = add_all(prior, gradients, overwrite=True), [None] * len(prior)
            if not finish:
                return gradients
        if self.method.between == "reuse":
            self._keep_component(gradients, reduce)
        combined = self._descent.combine_all(gradients, self._sample_size, reduce)
        return add_all(prior, [self._told(gradient) for gradient in combined], overwrite=True)

    def _keep_component(self, gradients: Gradients, reduce: Reduce) -> None:
        """Remember the sharpness component; a step that did not move has none."""
        component: Gradients = [None] * len(gradients)
        moves = self._perturbation.moves
        if moves is not False and self._descent.first:
            component = sharpness_component(reduce(self._descent.first), reduce(gradients))
            if isinstance(moves, Tensor):
                component = [None if part is None else kept(part, moves) for part in component]
        self._memory.add_component(self.space, component)


@contextmanager
def _gradient_hooks(
    tensors: Sequence[Tensor],
    prior: Gradients,
    combine: Callable[[int, Tensor | None, Tensor | None], Tensor | None],
    handles: list[Any],
) -> Iterator[None]:
    """Turn each gradient that backward is about to accumulate into all that ``p.grad`` shall hold.

    A task may run backward several times in one pass; the sum so far replaces what the earlier call left. The hooks
    are put into `handles`.
    """
    raw: Gradients = [None] * len(tensors)

    def replace(i: int, tensor: Tensor, gradient: Tensor) -> Tensor | None:
        raw[i] = add(raw[i], gradient)
        tensor.grad = None
        return combine(i, prior[i], raw[i])

    try:
        for i, tensor in enumerate(tensors):
            handles.append(tensor.register_hook(functools.partial(replace, i, tensor)))  # type: ignore[no-untyped-call]
        yield
    finally:
        _remove(handles)


def _remove(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()
