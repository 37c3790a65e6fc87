"""What is moved, and how far: perturbations of weights and of word embeddings."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sam.core.embeddings import WordEmbeddings
from fairseq_sam.core.groups import Groups
from fairseq_sam.core.method import Method
from fairseq_sam.core.norms import Norms, global_norms, normalize_, project_, scale_, steepest_direction_, vector_norm
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.rounding import HALF, round_stochastically
from fairseq_sam.core.scales import ScaleOperator, build_scale
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.tensors import Gradients, at_least_float32, dense, wide_dtype
from fairseq_sam.core.unperturbed import Places, none_runs


@dataclass
class Measurements:
    """What one step measured.

    Attributes:
        gradient_norm: 2-norm of the ascent gradient ``g_0`` in the method's unit, over all that is perturbed.
        perturbation_norm: p-norm of the change that the weights really underwent for the last pass; for embeddings,
            the largest of the sentences' norms.
        num_capped: groups whose T was capped.
        num_skipped: ascent steps without a usable gradient (zero, infinite or NaN); the perturbation is then 0.
        num_overflows: those of them whose gradient was infinite or NaN.
        num_passes: forward-backward passes, in passes over the whole batch.
        num_forwards: forward passes without gradient, in passes over the whole batch.
        survived: how much of the perturbation the rounding to half precision leaves, from 0 to 1; None in float32.
        moved_share: share of the batch that `survived` is the mean over.
    """

    gradient_norm: float | Tensor = 0.0
    perturbation_norm: float | Tensor = 0.0
    num_capped: int | Tensor = 0
    num_skipped: int = 0
    num_overflows: int = 0
    num_passes: float = 0
    num_forwards: float = 0
    survived: float | Tensor | None = None
    moved_share: float = 0

    def add(self, other: "Measurements", share: float) -> None:
        """Add what another part of the same batch measured.

        Args:
            other: its measurements.
            share: which share of the batch it is. Norms are averaged, passes count by their share.
        """
        self.gradient_norm = self.gradient_norm + share * other.gradient_norm
        self.perturbation_norm = self.perturbation_norm + share * other.perturbation_norm
        self.num_capped = self.num_capped + other.num_capped
        self.num_skipped += other.num_skipped
        self.num_overflows += other.num_overflows
        self.num_passes += share * other.num_passes
        self.num_forwards += share * other.num_forwards
        if other.survived is not None:
            moved = self.moved_share + share
            earlier = 0.0 if self.survived is None else self.survived * self.moved_share
            self.survived, self.moved_share = (earlier + share * other.survived) / moved, moved


class WeightPerturbation:
    """A perturbation of the weights, kept as ``T^-1 a`` so that T may be 0 (GA-SAM eq. 15-18).

    Args:
        method: the method.
        space: the trained parameters; their weights are backed up here and restored bit for bit after every pass.
        masks: for each parameter, what the perturbation is multiplied by, or None.
    """

    def __init__(self, method: Method, space: ParameterSpace, masks: Sequence[Tensor | None] | None = None) -> None:
        self.method = method
        self.space = space
        self.measured = Measurements()
        self._masks: list[Tensor | float | None] = list(masks or [None] * len(space.tensors))
        self._backup = [tensor.detach().clone() for tensor in space.tensors]
        self._active: list[int] = []  # parameters that have an ascent gradient and may move
        self._transformed: list[Tensor] = []  # T^-1 a of the active parameters
        self._scale = ScaleOperator([], 0)
        self._norms: Norms = global_norms
        self._random: RandomState | None = None
        self._num_moves = 0
        self._is_moved = False
        self._places = Places()  # where other weights stand in a call that is not perturbed

    @property
    def is_zero(self) -> bool:
        """Whether nothing is moved."""
        return not self._transformed or self.method.epsilon == 0

    def begin(self, random: RandomState) -> None:
        """Start at 0."""
        self.measured = Measurements()
        self._active, self._transformed, self._scale = [], [], ScaleOperator([], 0)
        self._random, self._num_moves = random, 0
        if self.method.mask == "random":
            keep = 1.0 - float(self.method.sparsity or 0.0)
            drawn = torch.rand(len(self._masks), generator=random.generator("mask"))
            self._masks = [1.0 / keep if number < keep else 0.0 for number in drawn.tolist()]

    # -- the ascent ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def advance(self, gradients: Gradients, unit: float) -> bool:
        """Take an ascent step; a gradient that is zero or not finite makes the perturbation 0 and is counted."""
        first = not self._active
        if first:
            self._activate([i for i, gradient in enumerate(gradients) if gradient is not None])
        ascent = [self._ascent_tensor(i, gradients[i]) for i in self._active]
        norm = vector_norm(ascent, 2.0) * unit if ascent else torch.zeros(())
        if first:
            self.measured.gradient_norm = norm
        is_finite = bool(torch.isfinite(norm))
        if is_finite and norm > 0:
            if not self._scale.factors:
                self._build_scale(ascent, unit)
            self._step_(ascent, unit)
        else:
            self._skip()
            self.measured.num_overflows += not is_finite
        return is_finite

    @torch.no_grad()
    def advance_randomly(self, random: RandomState) -> None:
        """Take a step of length epsilon along a Gaussian direction, in the coordinates ``T^-1 a``."""
        if not self._active:  # else a clean pass has shown which parameters have a gradient
            self._activate(range(len(self.space.tensors)))
        direction = self._gaussian(random, "direction")
        if not self._scale.factors:
            self._build_scale(direction, 1.0)
        normalize_(direction, self.method.norm, self._norms)
        scale_(direction, self.method.epsilon)
        self._transformed = direction

    def _activate(self, present: Sequence[int]) -> None:
        self._active = [i for i in present if self.space.perturbed[i] and self.space.tensors[i].numel()]
        if self.method.ball == "group":
            self._norms = self._groups().norms

    def _groups(self) -> Groups:
        return Groups(self.method.granularity, [self.space.layers[i] for i in self._active])

    def _ascent_tensor(self, i: int, gradient: Tensor | None) -> Tensor:
        """A copy of the gradient that may be overwritten, in float32 or better."""
        weight = self._anchor(i)
        if gradient is None:
            return torch.zeros_like(weight)
        return dense(gradient).to(weight.dtype, copy=True)

    def _anchor(self, i: int) -> Tensor:
        """Unperturbed weights of parameter `i` in float32 or better: the optimizer's masters where there are any."""
        master = self.space.masters[i]
        return at_least_float32(self._backup[i] if master is None else master.detach())

    def _build_scale(self, ascent: Sequence[Tensor], unit: float) -> None:
        self._scale = build_scale(
            self.method.scale,
            self._groups(),
            [self._anchor(i) for i in self._active],
            ascent,
            unit=unit,
            eta=self.method.asam_eta,
            max_scale=self.method.max_scale,
        )
        self.measured.num_capped = self._scale.num_capped

    def _step_(self, ascent: list[Tensor], unit: float) -> None:
        """Add a step to ``T^-1 a`` and project. Overwrites `ascent`."""
        for gradient, factor in zip(ascent, self._scale.factors, strict=True):
            if factor is not None:
                gradient.mul_(factor)
        norm = vector_norm(ascent, torch.inf)
        if not (torch.isfinite(norm) and norm > 0):
            self._skip()
            return
        if self.method.step_rule == "steepest":
            scale_(steepest_direction_(ascent, self.method.norm, self._norms), self.method.eta)
        else:
            scale_(ascent, self.method.eta * unit)
        if self._transformed:
            torch._foreach_add_(ascent, self._transformed)
        project_(ascent, self.method.norm, self.method.epsilon, self._norms)
        self._transformed = ascent

    def _skip(self) -> None:
        self.measured.num_skipped += 1
        self._transformed = []

    # -- the move --------------------------------------------------------------------------------------------------

    def applied(self) -> AbstractContextManager[None]:
        """Move the weights for one pass; they are copied back bit for bit, also after an exception."""
        return nullcontext() if self.is_zero else self._moved(self._perturbations)

    @contextmanager
    def shifted(self, direction: Sequence[Tensor], sign: float) -> Iterator[None]:
        """Move all perturbed weights along a direction for one pass.

        Args:
            direction: one tensor for each parameter that may move, from ``gaussian``.
            sign: 1 or -1.
        """
        with self._moved(lambda: ((i, sign * d) for i, d in zip(self._movable(), direction, strict=True))):
            yield

    def gaussian(self, random: RandomState) -> list[Tensor]:
        """Draw a Gaussian direction for all weights that may move, rescaled to 2-norm epsilon (delta-SAM 5.2)."""
        self._active = self._movable()
        direction = self._gaussian(random, "probe")
        self._active = []
        normalize_(direction, 2.0)
        scale_(direction, self.method.epsilon)
        return direction

    @torch.no_grad()
    def measure(self) -> None:
        """Measure the change that the weights undergo now."""
        if self.is_zero:
            return
        moved = [self.space.tensors[i].detach().to(self._anchor(i).dtype) - self._backup[i] for i in self._active]
        self.measured.perturbation_norm = vector_norm(moved, self.method.norm)
        if any(self._backup[i].dtype in HALF for i in self._active):
            self.measured.survived = self._survived(moved)

    def _survived(self, moved: Sequence[Tensor]) -> Tensor:
        """The part of the perturbation that the change contains: ``<change, a> / <a, a>``, at most 1."""
        wanted = [perturbation for _, perturbation in self._perturbations()]
        products = torch.stack([torch.sum(m * a, dtype=torch.float64) for m, a in zip(moved, wanted, strict=True)])
        square = vector_norm(wanted, 2.0) ** 2
        return (products.sum() / square.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0.0, 1.0)

    def restore(self) -> None:
        """Copy the unperturbed weights back."""
        self._places.put_back()
        with torch.no_grad():
            for tensor, value in zip(self.space.tensors, self._backup, strict=True):
                tensor.data.copy_(value)
        torch.clear_autocast_cache()
        self._is_moved = False
        none_runs()

    def call_unperturbed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model at the unperturbed weights while they are moved."""
        if not self._is_moved:
            return model(*args, **kwargs)
        weights = {id(tensor): value for tensor, value in zip(self.space.tensors, self._backup, strict=True)}
        return self._places.call(model, weights, args, kwargs)

    def _perturbations(self) -> Iterator[tuple[int, Tensor]]:
        for i, transformed, factor in zip(self._active, self._transformed, self._scale.factors, strict=True):
            perturbation = transformed if factor is None else transformed * factor
            mask = self._masks[i]
            yield i, perturbation if mask is None else perturbation * mask

    @contextmanager
    def _moved(self, perturbations: Callable[[], Iterable[tuple[int, Tensor]]]) -> Iterator[None]:
        generators = self._generators(f"rounding{self._num_moves}")
        self._num_moves += 1
        try:
            self._is_moved = True
            with torch.no_grad():
                for i, perturbation in perturbations():
                    self._put(i, self._anchor(i) + perturbation, generators)
            torch.clear_autocast_cache()  # an autocast around all passes would go on with casts of the unperturbed
            yield
        finally:
            # An interrupt may keep the context from being left: the caller restores then, and this runs when Python
            # deletes it, which may be updates later.
            if self._is_moved:
                try:
                    self.restore()
                except BaseException:  # an interrupt in the middle of the restore must not leave it half done
                    self.restore()
                    raise

    def _put(self, i: int, value: Tensor, generators: Callable[[torch.device], torch.Generator]) -> None:
        """Set the weights of parameter `i`."""
        tensor = self.space.tensors[i]
        if self.method.rounding == "stochastic" and tensor.dtype in HALF:
            value = round_stochastically(value, tensor.dtype, generators(tensor.device))
        tensor.data.copy_(value)

    def _generators(self, stream: str) -> Callable[[torch.device], torch.Generator]:
        """A generator for each device, made when it is asked for."""
        made: dict[torch.device, torch.Generator] = {}

        def of(device: torch.device) -> torch.Generator:
            if device not in made:
                assert self._random is not None, "begin comes first"
                made[device] = self._random.generator(stream, device)
            return made[device]

        return of

    def _movable(self) -> list[int]:
        return [i for i, perturbed in enumerate(self.space.perturbed) if perturbed and self.space.tensors[i].numel()]

    def _gaussian(self, random: RandomState, stream: str) -> list[Tensor]:
        self._random = random
        generators, anchors = self._generators(stream), [self._anchor(i) for i in self._active]
        return [
            torch.randn(anchor.shape, dtype=anchor.dtype, device=anchor.device, generator=generators(anchor.device))
            for anchor in anchors
        ]


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
    def is_zero(self) -> bool:
        """Whether nothing is moved."""
        return self.method.epsilon == 0

    def begin(self, random: RandomState) -> None:
        """Start at 0 or at uniform noise, drawn when the first pass shows the shapes."""
        self.measured = Measurements()
        self._deltas, self._leaves, self._random = [], {}, random

    @torch.no_grad()
    def advance(self, gradients: Gradients, unit: float) -> bool:
        """Take an ascent step along the gradients that the pass left at the embeddings."""
        if self.is_zero:
            return all(g is None or bool(torch.isfinite(g).all()) for g in gradients)
        leaves = [self._leaves[call].grad for call in range(len(self._deltas))] if self._leaves else []
        ascent = [torch.zeros_like(d) if g is None else g.clone() for d, g in zip(self._deltas, leaves, strict=True)]
        norm = vector_norm(ascent, 2.0) * unit if ascent else torch.zeros(())
        if not self.measured.gradient_norm:
            self.measured.gradient_norm = norm
        is_finite = bool(torch.isfinite(norm))
        if not is_finite or norm == 0:
            self.measured.num_skipped += 1
            self.measured.num_overflows += not is_finite
            self._deltas = [torch.zeros_like(delta) for delta in self._deltas]
            return is_finite
        norms = Groups("sentence").norms
        if self.method.step_rule == "steepest":
            scale_(steepest_direction_(ascent, self.method.norm, norms), self.method.eta)
        else:
            scale_(ascent, self.method.eta * unit)
        torch._foreach_add_(ascent, self._deltas)
        project_(ascent, self.method.norm, self.method.epsilon, norms)
        self._deltas = ascent
        return True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Add the perturbation to the embeddings' outputs for one pass."""
        if self.is_zero:
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
            norms = [norm.max() for norm in Groups("sentence").norms(self._deltas, self.method.norm)]
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
