"""``--optimizer amsgrad``: AMSGrad, which fairseq's Adam can do but has no flag for."""

from typing import Any

from fairseq.optim import OPTIMIZER_REGISTRY, FairseqOptimizer, register_optimizer
from fairseq.optim.adam import Adam, FairseqAdam, FairseqAdamConfig

from fairseq_sam.adapter.errors import ConfigurationError

NAME = "amsgrad"


class Amsgrad(FairseqAdam):
    """fairseq's Adam that divides by the largest second moment so far (Reddi et al. 2018), with Adam's flags.

    The update is fairseq's own, without apex's fused kernel, which refuses AMSGrad. It needs one more copy of the
    weights than Adam.

    Args:
        cfg: Adam's configuration.
        params: parameters to optimize.

    Raises:
        ConfigurationError: if Adam's state is asked for in half precision, which the fused kernel alone has.
    """

    def __init__(self, cfg: Any, params: Any) -> None:
        if getattr(cfg, "fp16_adam_stats", False):
            raise ConfigurationError("--fp16-adam-stats cannot be used with amsgrad; leave it out, or use adam")
        FairseqOptimizer.__init__(self, cfg)
        self._optimizer = Adam(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Adam's settings and ``amsgrad``."""
        return {**super().optimizer_config, "amsgrad": True}


def register_amsgrad() -> None:
    """Register the optimizer, once; presets that are registered later can wrap it."""
    if NAME not in OPTIMIZER_REGISTRY:
        register_optimizer(NAME, dataclass=FairseqAdamConfig)(Amsgrad)
