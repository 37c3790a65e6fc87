"""``--sam-gradient-log N``: the norms of all parameters' gradients, every N updates, beside the checkpoints."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from fairseq.trainer import Trainer
from torch import Tensor, nn

from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.analysis.gradients import log_lines
from fairseq_sam.core.tensors import at_least_float32, dense

FILE = "gradients.jsonl"


def log_gradients_when_clipped() -> None:
    """Wrap ``Trainer.clip_grad_norm``, once; it runs in each update when the gradient is complete."""
    if getattr(Trainer.clip_grad_norm, "logs_gradients", False):
        return
    plain = Trainer.clip_grad_norm

    @functools.wraps(plain)
    def clip_grad_norm(self: Trainer, clip_norm: float) -> Any:
        norm = plain(self, clip_norm)
        optimizer = unwrap(self.optimizer)
        every = optimizer.gradient_log if optimizer is not None else 0
        update = self.get_num_updates() + 1
        if every and update % every == 0 and self.data_parallel_rank == 0 and bool(torch.isfinite(norm)):
            log = vars(self).setdefault("_gradient_log", GradientLog(Path(self.cfg.checkpoint.save_dir) / FILE))
            log.add(optimizer.epoch, update, float(norm), gradient_norms(self.get_model(), float(norm)))  # type: ignore[union-attr]
        return norm

    clip_grad_norm.logs_gradients = True  # type: ignore[attr-defined]
    Trainer.clip_grad_norm = clip_grad_norm


def gradient_norms(model: nn.Module, norm: float) -> dict[str, float]:
    """Return the 2-norm of each parameter's gradient.

    What ``p.grad`` holds may be clipped, or multiplied by a loss scale: all norms are brought to the unit of the whole.

    Args:
        model: the model.
        norm: of the whole gradient, before clipping and in the optimizer's unit.
    """
    raw = {name: _norm(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}
    total = sum(value**2 for value in raw.values()) ** 0.5
    return {name: value * norm / total if total else 0.0 for name, value in raw.items()}


class GradientLog:
    """A file with a JSON object in each line: ``epoch``, ``update``, ``norm`` and ``norms`` by parameter.

    A run that is resumed goes on with the file: what came after its checkpoint is dropped.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_begun = False

    def add(self, epoch: int, update: int, norm: float, norms: dict[str, float]) -> None:
        """Add the gradient of an update.

        Args:
            epoch: counted from 1.
            update: counted from 1.
            norm: of the whole gradient.
            norms: by parameter.
        """
        if not self._is_begun:
            self._keep_before(update)
        row = {"epoch": epoch, "update": update, "norm": norm, "norms": norms}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=float) + "\n")

    def _keep_before(self, update: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = log_lines(self._path) if self._path.exists() else []
        kept = [line for line, row in lines if row["update"] < update]
        partial = self._path.with_suffix(".part")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(self._path)
        self._is_begun = True


def _norm(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(at_least_float32(dense(gradient)), dtype=torch.float64))
