"""The same methods in any PyTorch loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fairseq_sam.core.batch import Batch, ClosureBatch, Loss, PassResult
from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.measurements import Measurements
from fairseq_sam.core.memory import Memory
from fairseq_sam.core.method import Method
from fairseq_sam.core.passes import fisher_information, reuse, split
from fairseq_sam.core.signals import signals_wait
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.step import SharpnessAwareStep
from fairseq_sam.core.tensors import Gradients, add_all
from fairseq_sam.core.undo import all_or_nothing


class SharpnessAware:
    """A sharpness-aware method around a base optimizer.

    The base optimizer updates the unperturbed weights with the method's descent gradient; its numerics are untouched.
    Clipping, gradient accumulation and learning-rate schedules work on the base optimizer as usual.

    Args:
        optimizer: the base optimizer; its parameters are the ones that are trained and perturbed.
        model: the module that owns them; gives names (`exclude`) and layers (`granularity`).
        method: name of a preset, see ``fairseq_sam.PRESETS``.
        embeddings: for methods that perturb word embeddings; default all ``nn.Embedding`` modules of the model.
        options: values for single axes, the fields of ``fairseq_sam.Method``: the command-line flags without
            ``--sam-``. `scope` is what the closure covers here, and has no effect. `lr_max` defaults to the largest
            learning rate of the parameter groups (their ``initial_lr``, where a schedule has set it).

    Raises:
        TypeError: if `optimizer` has no parameter groups or `model` is no module.
        ValueError: if an option is unknown, out of range or contradicts another, or the optimizer trains no parameter
            of the model.

    Methods that need single instances (``Method.needs_instances``) take a batch in place of the closure: an
    ``InstanceBatch``, or any object with its methods (the protocol ``fairseq_sam.core.batch.Batch``).

    Examples:
        >>> model = nn.Linear(3, 1)
        >>> sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method="ga_sam", epsilon=1e-4)
        >>> def closure():
        ...     loss = model(torch.ones(2, 3)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = sam.step(closure)
        >>> sam.last_step.num_passes
        2

    References:
        GA-SAM: Zhang et al. 2022, Algorithm 1; SAM: Foret et al. 2021, Algorithm 1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        method: str = "sam",
        *,
        embeddings: WordEmbeddings | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(optimizer, "param_groups") or not isinstance(model, nn.Module):
            raise TypeError(
                "expected SharpnessAware(optimizer, model), a torch optimizer and the model whose weights it trains, "
                f"got {type(optimizer).__name__} and {type(model).__name__}"
            )
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("the optimizer trains no parameter of the model; give both of the same model")
        self.optimizer = optimizer
        rates = [group.get("initial_lr", group.get("lr", 0.0)) for group in optimizer.param_groups]
        self.method = Method.from_preset(method, **options).with_peak(float(max(rates)))
        self.epoch = 1
        self.num_updates = 0
        self.num_skipped: int | torch.Tensor = 0
        self.last_step = Measurements()
        self.sharpness: Loss | None = None
        self._model = model
        self._memory = Memory()
        self._index = 0  # of the next micro-batch in its update
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer must take one gradient per step, got LBFGS, which evaluates the loss by itself")
        self._space()
        self._embeddings = embeddings
        if self.method.where == "embeddings" and embeddings is None:
            self._embeddings = WordEmbeddings.of(model)
        # Counted where the base optimizer steps, so that GradScaler.step(sam.optimizer) counts as well.
        optimizer.register_step_post_hook(self._count_update)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.optimizer.param_groups

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 1 (only `start_epoch` needs it).

        Raises:
            ValueError: if `epoch` is below 1.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1:
            raise ValueError(f"epoch must be an integer >= 1, got {epoch!r}")
        self.epoch = epoch

    def _count_update(self, *_: Any) -> None:
        self.num_updates += 1
        self._index = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base optimizer's parameters: an update begins."""
        self._index = 0
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(
        self, closure: Callable[[], Loss] | Batch[Any], *, sample_size: float = 1.0, loss_scale: float = 1.0
    ) -> Loss:
        """Clear gradients, compute the method's gradient, and let the base optimizer step.

        Args:
            closure: forward and backward at the current weights, returns the loss; it runs once for each pass, and
                neither needs nor may expect gradients in ``p.grad``. Or a batch of instances, such as
                ``InstanceBatch``, whose loss is the mean over them.
            sample_size: by what a closure's gradient is divided for `gradient` ``mean``; 1 for a mean loss.
            loss_scale: factor that a gradient scaler multiplied the loss with. If it is not 1, an ascent gradient that
                is not finite makes the update's infinite, so that the scaler skips the update and learns of it.

        Returns:
            The loss at the unperturbed weights, as the closure returned it. A method without a pass there (a random
            direction, an attack on embeddings) returns that of its first pass.
        """
        self.zero_grad()
        loss = self.accumulate(closure, sample_size=sample_size, loss_scale=loss_scale)
        self.apply()
        return loss

    def accumulate(
        self, closure: Callable[[], Loss] | Batch[Any], *, sample_size: float = 1.0, loss_scale: float = 1.0
    ) -> Loss:
        """Add the method's gradient of one micro-batch to ``p.grad``; see ``step`` for the arguments.

        For gradient accumulation: ``zero_grad``, then ``accumulate`` for each micro-batch, then ``apply``. After an
        error everything is as before the call.

        Raises:
            ValueError: if `sample_size` or `loss_scale` is not positive.
            TypeError: if the closure does not return its loss, or the method needs a batch of instances.
            ValueError: if the closure leaves no gradient.
        """
        for name, value in (("sample_size", sample_size), ("loss_scale", loss_scale)):
            if not value > 0:
                raise ValueError(f"{name} must be a number > 0, got {value!r}")
        if callable(closure) and self.method.needs_instances and self.method.epsilon > 0:
            raise ClosureBatch.refusal(self.method.name)
        space = self._space()
        with all_or_nothing(space.tensors, space.buffers, self, self._memory):
            if callable(closure):
                return self._accumulate(ClosureBatch(closure, sample_size, space.tensors), space, loss_scale).loss
            return self._accumulate_sums(closure, space, loss_scale)

    def _accumulate_sums(self, batch: Batch[Any], space: ParameterSpace, loss_scale: float) -> Loss:
        """Batches give gradients of sums over instances: divide what this one adds by its sample size."""
        prior = space.take_gradients()
        new: Gradients = [None] * len(prior)
        try:
            result = self._accumulate(batch, space, loss_scale)
            new = [None if p.grad is None else p.grad / result.sample_size for p in space.tensors]
        finally:
            space.put_gradients(add_all(prior, new))
        return result.loss

    def _accumulate(self, batch: Batch[Any], space: ParameterSpace, loss_scale: float) -> PassResult:
        """Leave the method's gradient in ``p.grad``; return the clean loss and the sample size of the last pass."""
        index, self._index = self._index, self._index + 1
        method = self.method.at(max(group.get("lr", 0.0) for group in self.param_groups))
        self.last_step, self.sharpness = Measurements(), None
        if not method.is_active(self.epoch, self.num_updates):
            self.last_step.num_passes = 1
            reuses = self._memory.component and not method.has_ended(self.epoch, self.num_updates)
            result = reuse(method, space, self._memory, batch) if reuses else batch.run()
            return PassResult(result.loss, result.sample_size)
        if index == 0:
            self._memory.component = None  # that of this update is the sum over its micro-batches

        def unit(result: Any) -> float:
            return 1.0 / (loss_scale * (float(result.sample_size) if method.gradient == "mean" else 1.0))

        self.last_step.num_passes = self._refresh_mask(method, space, batch, loss_scale)
        salt = f"{self.num_updates}.{index}"
        step: SharpnessAwareStep[Any] = SharpnessAwareStep(
            method, space, self._memory, self._embeddings, salt, scales_loss=loss_scale != 1.0
        )
        parts = split(method, batch)
        clean, last = [], []
        for part, share in parts:
            first = step.ascend(part, lambda gradients, result: (gradients, unit(result)))
            last.append(step.descend(part))
            clean.append(last[-1] if first is None else first)
            self.last_step.add(step.measured, share)
        shares = [share for _, share in parts]
        self.num_skipped = self.num_skipped + self.last_step.num_skipped
        if method.measures_sharpness:
            self.sharpness = _mean_loss(last, shares) - _mean_loss(clean, shares)
        return PassResult(_mean_loss(clean, shares), sum(float(result.sample_size) for result in last))

    def _refresh_mask(self, method: Method, space: ParameterSpace, batch: Batch[Any], loss_scale: float) -> float:
        """Collect instances for the Fisher mask where they are wanted; return what share of a pass they cost."""
        wanted = self._memory.instances_wanted(method, space, self.num_updates)
        if not wanted:
            return 0.0
        squares = fisher_information(space, batch, wanted, 1.0 / loss_scale, str(self.num_updates))
        self._memory.add_squares(method, space, squares)
        return min(wanted, len(batch)) / len(batch)

    def apply(self) -> None:
        """Let the base optimizer step with the gradients in ``p.grad``.

        With a gradient scaler, call ``scaler.step(sam.optimizer)`` and ``scaler.update()`` instead.
        """
        with signals_wait():
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state and the method's: what a resumed run needs to continue exactly."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "method": {
                "epoch": self.epoch,
                "num_updates": self.num_updates,
                "num_skipped": int(self.num_skipped),
                **self._memory.state_dict(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ValueError: if `state` is not of that form.
        """
        if not {"optimizer", "method"} <= state.keys():
            raise ValueError(f"expected a state with the keys optimizer and method, got {sorted(state)}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["method"]["epoch"]
        self.num_updates = state["method"]["num_updates"]
        self.num_skipped = state["method"]["num_skipped"]
        self._memory.load_state_dict(state["method"])

    def _space(self) -> ParameterSpace:
        # Built anew each time: parameters may be frozen, thawed or added to the optimizer between steps.
        return ParameterSpace.of({"": self._model}, parameters=self._parameters(), exclude=self.method.exclude)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _mean_loss(results: list[Any], shares: list[float]) -> Loss:
    """Loss of the whole batch from those of its parts."""
    if len(results) == 1:
        loss: Loss = results[0].loss
        return loss
    total: Loss = sum(share * result.loss for share, result in zip(shares, results, strict=True))
    return total
