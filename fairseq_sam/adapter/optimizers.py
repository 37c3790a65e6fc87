"""The presets as fairseq optimizers, which delegate everything to a base optimizer."""

import logging
from typing import Any

import torch
from fairseq import optim
from fairseq.optim import OPTIMIZER_REGISTRY, FairseqOptimizer, register_optimizer
from omegaconf import DictConfig

from fairseq_sam._version import __version__
from fairseq_sam.adapter.choices import base_config, check_base, gradient_log_of, method_of, rise_of
from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.flags import base_names, config_class
from fairseq_sam.adapter.radius import forget_others, settings_of
from fairseq_sam.adapter.state import STATE_FORMAT, STATE_KEY, checked_state
from fairseq_sam.core.memory import Memory
from fairseq_sam.core.method import PRESETS, Method
from fairseq_sam.core.signals import signals_wait

logger = logging.getLogger(__name__)


class SharpnessAwareOptimizer(FairseqOptimizer):
    """A base optimizer with a method's configuration and state beside it.

    Every operation is the base optimizer's. The training step reads `method` and writes `num_ascents` and
    `num_skipped`, which ride in the state dict under ``sharpness_aware``.

    Args:
        cfg: the preset's configuration.
        params: parameters to optimize, as fairseq passes them.

    Raises:
        ValueError: if the configuration is not valid.
    """

    preset: str

    def __init__(self, cfg: DictConfig, params: Any) -> None:
        super().__init__(cfg)
        check_base(cfg)
        self._method = method_of(self.preset, cfg)
        self.rise = rise_of(self.preset, cfg)  # None: the radius is given
        self.base: FairseqOptimizer = optim.build_optimizer(base_config(cfg), list(params))
        self.memory = Memory()
        self.gradient_log = gradient_log_of(cfg)
        self.epoch = 1
        self.logged: set[str] = set()  # what sharpness-aware updates have logged in this run
        self.has_warned_of_rounding = False
        self.has_new_masters = True  # fp32 masters may still be no more exact than the weights in half precision
        self.has_warned_of_search = False
        self.num_ascents = 0
        self.num_skipped: int | torch.Tensor = 0
        # None once the base has updated the weights.
        self._before_update: tuple[dict[str, Any], int, int | torch.Tensor] | None = None

    @property
    def method(self) -> Method:
        """The method, with the radius that this run has found if it was to."""
        if self.rise is None or self.memory.epsilon is None:
            return self._method
        return self._method.with_radius(self.memory.epsilon)

    @property
    def searches_radius(self) -> bool:
        """Whether the radius is still to be found."""
        return self.rise is not None and self.memory.epsilon is None

    @property
    def optimizer(self) -> Any:
        """The base's ``torch.optim.Optimizer``."""
        return self.base.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self.base.optimizer = optimizer

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The base's settings that override those of a checkpoint."""
        return self.base.optimizer_config

    @property
    def params(self) -> Any:
        """The base's parameters."""
        return self.base.params

    @property
    def param_groups(self) -> Any:
        """The base's parameter groups."""
        return self.base.param_groups

    @property
    def lr_scheduler(self) -> Any:
        """The base's own learning-rate scheduler, if it has one (composite)."""
        return getattr(self.base, "lr_scheduler", None)

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """As the base."""
        return self.base.supports_memory_efficient_fp16

    @property
    def supports_step_with_scale(self) -> bool:
        """As the base."""
        return self.base.supports_step_with_scale

    @property
    def supports_groups(self) -> bool:
        """As the base."""
        return self.base.supports_groups

    @property
    def supports_flat_params(self) -> bool:
        """As the base."""
        return self.base.supports_flat_params

    def __getstate__(self) -> Any:
        """Pickle as the base does."""
        return self.base.__getstate__()

    def get_lr(self) -> float:
        """Return the base's learning rate."""
        return self.base.get_lr()

    def set_lr(self, lr: float) -> None:
        """Set the base's learning rate."""
        self.base.set_lr(lr)

    def backward(self, loss: Any) -> None:
        """Run the base's backward pass."""
        self.base.backward(loss)

    def all_reduce_grads(self, module: Any) -> None:
        """Reduce gradients as the base does."""
        self.base.all_reduce_grads(module)

    def multiply_grads(self, c: Any) -> None:
        """Multiply gradients as the base does."""
        self.base.multiply_grads(c)

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Any:
        """Clip gradients as the base does."""
        return self.base.clip_grad_norm(max_norm, aggregate_norm_fn)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Let the base update the weights; an interrupt or a signal waits until it has."""
        with signals_wait():
            self._before_update = self.base.step(*args, **kwargs)  # None: the update is done

    def begin_update(self) -> None:
        """Remember the method's state, in case the update does not come to its end."""
        self._before_update = (dict(vars(self.memory)), self.num_ascents, self.num_skipped)

    def end_update(self) -> None:
        """Keep the method's state, also if the loss scaler has dropped the update."""
        self._before_update = None

    def undo_update(self, counts: bool = True) -> None:
        """Put the method's state back to ``begin_update``, unless the weights are updated by now.

        Args:
            counts: the numbers of ascents and of skipped ones as well.
        """
        if self._before_update is not None:
            memory, num_ascents, num_skipped = self._before_update
            vars(self.memory).update(memory)
            if counts:
                self.num_ascents, self.num_skipped = num_ascents, num_skipped

    def zero_grad(self) -> None:
        """Clear gradients as the base does."""
        self.base.zero_grad()

    def average_params(self) -> None:
        """Average the base's state over workers (BMUF)."""
        self.base.average_params()

    def broadcast_global_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Broadcast the base's state from the first worker."""
        return self.base.broadcast_global_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state with the method's beside it: that of before an update that is not finished."""
        self.undo_update()  # fairseq writes crash.pt while it runs
        own = {
            "format": STATE_FORMAT,
            "version": __version__,
            "preset": self.preset,
            "base": self.cfg.base_optimizer,
            "num_ascents": self.num_ascents,
            "num_skipped": int(self.num_skipped),
            **self.memory.state_dict(),
        }
        return {**self.base.state_dict(), STATE_KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        """Load a state of this class, or one that the base alone wrote (the method then starts anew).

        The base's part of another preset's state is loaded; that preset's own part is left, with a message.

        Raises:
            ConfigurationError: if the state is that of another base optimizer.
            CheckpointError: if the method's part is of a newer format, or not what a preset writes.
        """
        base_state = {key: value for key, value in state_dict.items() if key != STATE_KEY}
        own = checked_state(state_dict.get(STATE_KEY, {}))
        if own.get("base", self.cfg.base_optimizer) != self.cfg.base_optimizer:
            raise ConfigurationError(
                f"the checkpoint's optimizer state is that of --base-optimizer {own['base']}, but --base-optimizer is "
                f"{self.cfg.base_optimizer}; use the same one, or start the optimizer anew with --reset-optimizer"
            )
        if own.get("preset", self.preset) != self.preset:
            logger.warning(
                "the checkpoint is of --optimizer %s: %s goes on with its base optimizer's state and its weights; what "
                "%s remembered is left", own["preset"], self.preset, own["preset"],
            )  # fmt: skip
            own = {}
        self.base.load_state_dict(base_state, optimizer_overrides)
        self.num_ascents = own.get("num_ascents", 0)
        self.num_skipped = own.get("num_skipped", 0)
        self.memory.load_state_dict(own)
        if self.rise is not None:
            forget_others(self.memory, settings_of(self._method, self.rise))


def register_presets() -> None:
    """Register each preset as an optimizer of fairseq, once."""
    bases = base_names()
    config = config_class(bases)
    for name in PRESETS:
        if name not in OPTIMIZER_REGISTRY:
            class_name = "".join(part.capitalize() for part in name.split("_")) + "Optimizer"
            cls = type(class_name, (SharpnessAwareOptimizer,), {"preset": name, "__module__": __name__})
            register_optimizer(name, dataclass=config)(cls)


def unwrap(optimizer: Any) -> SharpnessAwareOptimizer | None:
    """Find our optimizer inside fairseq's precision and BMUF wrappers; None if the run does not use one."""
    while optimizer is not None and not isinstance(optimizer, SharpnessAwareOptimizer):
        inner = (vars(optimizer).get(name) for name in ("fp32_optimizer", "wrapped_optimizer", "_optimizer"))
        optimizer = next((candidate for candidate in inner if isinstance(candidate, FairseqOptimizer)), None)
    return optimizer
