"""A perturbation of word embeddings."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.groups import Groups
from fairseq_sam.core.measurements import Measurements, unset
from fairseq_sam.core.method import Method
from fairseq_sam.core.norms import vector_norm
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.tensors import Flag, Gradients, known, wide_dtype
from fairseq_sam.core.unperturbed import none_runs
from fairseq_sam.core.vectors import Ball, Vector


class EmbeddingPerturbation:
    """A perturbation of word-embedding outputs, one ball for each sentence (FreeLB, Zhu et al. 2020, Algorithm 1).

    Padding never moves. Each side of an encoder-decoder is a sentence of its own.

    Args:
        method: the method.
        embeddings: the modules whose outputs are perturbed.
    """

    def __init__(self, method: Method, embeddings: WordEmbeddings) -> None:
        self.method = method
        self.embeddings = embeddings
        self.measured = Measurements()
        self._deltas: list[Tensor] = []  # one for each call in a pass, (B, T, C)
        self._leaves: dict[int, Tensor] = {}  # the same as autograd sees them in the current pass
        self._random: RandomState | None = None

    @property
    def moves(self) -> bool:
        """Whether anything is moved."""
        return self.method.epsilon > 0

    def begin(self, random: RandomState) -> None:
        """Start at 0 or at uniform noise, drawn when the first pass shows the shapes."""
        self.measured = Measurements()
        self._deltas, self._leaves, self._random = [], {}, random

    @torch.no_grad()
    def advance(self, gradients: Gradients, unit: float, *, overwrite: bool = False) -> Flag:
        """Take an ascent step along the gradients that the pass left at the embeddings."""
        if not self.moves:
            present = [g for g in gradients if g is not None]
            return known(torch.isfinite(vector_norm(present, 2.0))) if present else True
        leaves = [self._leaves[call].grad for call in range(len(self._deltas))] if self._leaves else []
        ascent = Vector([torch.zeros_like(d) if g is None else g for d, g in zip(self._deltas, leaves, strict=True)])
        norm = ascent.norm(2.0) * unit if ascent.tensors else torch.zeros(())
        if not torch.is_tensor(self.measured.gradient_norm):
            self.measured.gradient_norm = norm
        is_finite = torch.isfinite(norm)
        usable = known(is_finite & (norm > 0))
        self.measured.num_skipped = self.measured.num_skipped + unset(usable)
        self.measured.num_overflows = self.measured.num_overflows + unset(known(is_finite))
        if usable is False:
            self._deltas = [torch.zeros_like(delta) for delta in self._deltas]
            return known(is_finite)
        deltas = Vector(self._deltas)
        for vector in (ascent, deltas):
            if isinstance(usable, Tensor):
                vector.keep_if_(usable)
        ball = Ball(self.method.norm, self.method.epsilon, Groups("sentence"))
        if self.method.step_rule == "steepest":
            ball.steepest_(ascent).scale_(self.method.eta)
        else:
            ascent.scale_(self.method.eta * unit)
        self._deltas = ball.project_(ascent.add_(deltas)).numbers()
        return known(is_finite)

    @contextmanager
    def applied(self, *, final: bool = False) -> Iterator[None]:
        """Add the perturbation to the embeddings' outputs for one pass."""
        if not self.moves:
            yield
            return
        self._leaves = {}
        with self.embeddings.perturbed(self._perturb):
            yield

    def restore(self) -> None:
        """Take the perturbation off the embeddings, also after an interrupt; weights are not moved."""
        self.embeddings.restore()
        none_runs()

    def call_unperturbed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model without the perturbation of its embeddings."""
        with self.embeddings.paused():
            return model(*args, **kwargs)

    def measure(self) -> None:
        """Nothing to do before the pass: the last ascent step knows the perturbation."""
        if self._deltas:
            norms = [norm.max() for norm in Groups("sentence").norms(Vector(self._deltas), self.method.norm)]
            self.measured.perturbation_norm = torch.stack(norms).max()

    def _perturb(self, call: int, is_token: Tensor, output: Tensor) -> Tensor:
        if call == len(self._deltas):
            self._deltas.append(self._initial(call, is_token, output))
        leaf = self._deltas[call].detach().clone().requires_grad_(torch.is_grad_enabled())
        self._leaves[call] = leaf
        # The product keeps padding where it is, and its gradient 0.
        return output + (leaf * is_token).to(output.dtype)

    @torch.no_grad()
    def _initial(self, call: int, is_token: Tensor, output: Tensor) -> Tensor:
        """Zero, or uniform noise that fills the ball's cube: ``|x_j| <= epsilon / n^(1/p)`` for n numbers."""
        dtype = wide_dtype(output.dtype)
        delta = torch.zeros_like(output, dtype=dtype)
        if self.method.init == "zero" or self._random is None:
            return delta
        generator = self._random.generator(f"init{call}", output.device)
        delta.uniform_(-1.0, 1.0, generator=generator).mul_(is_token)
        if self.method.norm == math.inf:
            return delta.mul_(self.method.epsilon)
        number = is_token.expand_as(output).flatten(1).sum(1).clamp(min=1).to(dtype)
        bound = self.method.epsilon / number ** (1.0 / self.method.norm)
        return delta.mul_(bound.view(-1, *[1] * (output.dim() - 1)))
