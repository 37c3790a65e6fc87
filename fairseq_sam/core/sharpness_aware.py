"""The same methods in any PyTorch loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sam.core.method import Method
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.step import Gradients, Measurements, SharpnessAwareStep

Loss = Tensor | float


class SharpnessAware:
    """A sharpness-aware method around a base optimizer.

    The base optimizer updates the unperturbed weights with the method's descent gradient; its numerics are untouched.
    Clipping, gradient accumulation and learning-rate schedules work on the base optimizer as usual.

    Args:
        optimizer: the base optimizer; its parameters are the ones that are trained and perturbed.
        model: the module that owns them; gives names (`exclude`) and layers (`granularity`).
        method: name of a preset, see ``fairseq_sam.PRESETS``.
        options: values for single axes, the fields of ``fairseq_sam.Method``: the command-line flags without
            ``--sam-``. `scope` is what the closure covers here, and has no effect.

    Raises:
        ValueError: if an option is unknown, out of range or contradicts another.

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

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, method: str = "sam", **options: Any) -> None:
        self.optimizer = optimizer
        self.method = Method.from_preset(method, **options)
        self.epoch = 1
        self.num_updates = 0
        self.num_skipped = 0
        self.last_step = Measurements()
        self.sharpness: Loss | None = None
        self._model = model
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer must take one gradient per step, got LBFGS, which evaluates the loss by itself")
        self._space()
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Loss], *, sample_size: float = 1.0, loss_scale: float = 1.0) -> Loss:
        """Clear gradients, compute the method's gradient, and let the base optimizer step.

        Args:
            closure: forward and backward at the current weights, returns the loss. It runs once for each pass, and
                neither needs nor may expect gradients in ``p.grad``.
            sample_size: by what the closure's gradient is divided for `gradient` ``mean``; 1 for a mean loss.
            loss_scale: factor that a gradient scaler multiplied the loss with.

        Returns:
            The loss at the unperturbed weights, as the closure returned it.
        """
        self.zero_grad()
        loss = self.accumulate(closure, sample_size=sample_size, loss_scale=loss_scale)
        self.apply()
        return loss

    def accumulate(self, closure: Callable[[], Loss], *, sample_size: float = 1.0, loss_scale: float = 1.0) -> Loss:
        """Add the method's gradient of one micro-batch to ``p.grad``; see ``step`` for the arguments.

        For gradient accumulation: ``zero_grad``, then ``accumulate`` for each micro-batch, then ``apply``.

        Raises:
            ValueError: if `sample_size` or `loss_scale` is not positive.
            TypeError: if the closure does not return its loss.
        """
        for name, value in (("sample_size", sample_size), ("loss_scale", loss_scale)):
            if not value > 0:
                raise ValueError(f"{name} must be a number > 0, got {value!r}")
        if not self.method.is_active(self.epoch, self.num_updates):
            self.last_step, self.sharpness = Measurements(num_passes=1), None
            return closure()
        step: SharpnessAwareStep[Loss] = SharpnessAwareStep(self.method, self._space())
        unit = 1.0 / (loss_scale * (sample_size if self.method.gradient == "mean" else 1.0))

        def run_pass() -> Loss:
            with torch.enable_grad():
                loss = closure()
            if not isinstance(loss, Tensor | float | int):
                raise TypeError(f"the closure must return the loss, a tensor or a number, got {type(loss).__name__}")
            return loss.detach() if isinstance(loss, Tensor) else loss

        def ascent_gradient(gradients: Gradients, _: Loss) -> tuple[Gradients, float]:
            return gradients, unit

        clean = step.ascend(run_pass, ascent_gradient)
        self.sharpness = step.descend(run_pass) - clean
        self.last_step = step.measured
        self.num_skipped += step.measured.num_skipped
        return clean

    def apply(self) -> None:
        """Let the base optimizer step with the gradients in ``p.grad``.

        With a gradient scaler, call ``scaler.step(sam.optimizer)`` and ``scaler.update()`` instead.
        """
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state and the method's: what a resumed run needs to continue exactly."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "method": {"epoch": self.epoch, "num_updates": self.num_updates, "num_skipped": self.num_skipped},
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

    def _space(self) -> ParameterSpace:
        # Built anew each time: parameters may be frozen, thawed or added to the optimizer between steps.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return ParameterSpace.of({"": self._model}, parameters=parameters, exclude=self.method.exclude)
