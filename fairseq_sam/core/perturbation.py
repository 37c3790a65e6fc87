"""What is moved, and how far: a perturbation of the weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sam.core.backup import Backup, Room
from fairseq_sam.core.buckets import Part, at_once, bucketed
from fairseq_sam.core.groups import Groups
from fairseq_sam.core.measurements import Measurements, unset
from fairseq_sam.core.method import Method
from fairseq_sam.core.norms import vector_norm
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.rounding import HALF, round_stochastically
from fairseq_sam.core.scales import SCALES, ScaleOperator, build_scale
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.tensors import Flag, Gradients, at_least_float32, dense, kept, known, on_device, wide_dtype
from fairseq_sam.core.unperturbed import Places, none_runs
from fairseq_sam.core.vectors import ALL, Ball, Factor, Vector, add_all_scaled


class WeightPerturbation:
    """A perturbation of the weights, kept as ``T^-1 a`` so that T may be 0 (GA-SAM eq. 15-18).

    Args:
        method: the method.
        space: the trained parameters; their weights are backed up here and restored bit for bit after every pass.
        masks: for each parameter, what the perturbation is multiplied by, or None.
        room: memory for the backup; no other perturbation that is still used may have the same.
    """

    def __init__(
        self,
        method: Method,
        space: ParameterSpace,
        masks: Sequence[Tensor | None] | None = None,
        room: Room | None = None,
    ) -> None:
        self.method = method
        self.space = space
        self.measured = Measurements()
        self._masks: list[Tensor | float | None] = list(masks or [None] * len(space.tensors))
        self._backup = Backup(space.tensors, room or Room())
        self._active: list[int] = []  # parameters that have an ascent gradient and may move
        self._transformed: Vector | None = None  # T^-1 a of the active parameters
        self._scale: ScaleOperator | None = None
        self._is_scaled: Flag = False  # T is known
        self._moves: Flag = False
        self._ball = Ball(method.norm, method.epsilon)
        self._random: RandomState | None = None
        self._num_moves = 0
        self._is_moved = False
        self._is_folded = False  # T and the mask are multiplied in
        self._places = Places()  # where other weights stand in a call that is not perturbed

    @property
    def moves(self) -> Flag:
        """Whether anything is moved."""
        return False if self.method.epsilon == 0 else self._moves

    def begin(self, random: RandomState) -> None:
        """Start at 0."""
        self.measured = Measurements()
        self._active, self._transformed, self._scale = [], None, None
        self._is_scaled = self._moves = False
        self._is_folded = False
        self._random, self._num_moves = random, 0
        if self.method.mask == "random":
            keep = 1.0 - float(self.method.sparsity or 0.0)
            drawn = torch.rand(len(self._masks), generator=random.generator("mask"))
            self._masks = [1.0 / keep if number < keep else 0.0 for number in drawn.tolist()]

    # -- the ascent ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def advance(self, gradients: Gradients, unit: float, *, overwrite: bool = False) -> Flag:
        """Take an ascent step; a gradient that is zero or not finite makes the perturbation 0 and is counted.

        The host does not wait for a GPU to know: there, all is computed, and made 0 where that is so.

        Args:
            gradients: one for each parameter, or None.
            unit: factor that brings them into the method's unit.
            overwrite: nothing else needs them any more.

        Returns:
            Whether the gradient is finite.
        """
        first = not self._active
        if first:
            self._activate([i for i, gradient in enumerate(gradients) if gradient is not None])
        ascent = self._ascent(gradients, overwrite)
        norm = ascent.norm(2.0) * unit if self._active else torch.zeros(())
        if first:
            self.measured.gradient_norm = norm
        is_finite = torch.isfinite(norm)
        usable = known(is_finite & (norm > 0))
        if usable is not False:
            self._build_scale(ascent, unit, usable)
            usable = self._step_(ascent, unit, usable)
        self._moves = usable
        if usable is False:
            self._transformed = None
        self.measured.num_skipped = self.measured.num_skipped + unset(usable)
        self.measured.num_overflows = self.measured.num_overflows + unset(known(is_finite))
        return known(is_finite)

    @torch.no_grad()
    def advance_randomly(self, random: RandomState) -> None:
        """Take a step of length epsilon along a Gaussian direction, in the coordinates ``T^-1 a``."""
        if not self._active:  # else a clean pass has shown which parameters have a gradient
            self._activate(range(len(self.space.tensors)))
        direction = Vector(self._gaussian(random, "direction"))
        self._build_scale(direction, 1.0)
        self._transformed = self._ball.normalize_(direction).scale_(self.method.epsilon)
        self._moves = True

    def _activate(self, present: Sequence[int]) -> None:
        self._active = [i for i in present if self.space.perturbed[i] and self.space.tensors[i].numel()]
        groups = self._groups() if self.method.ball == "group" else ALL
        self._ball = Ball(self.method.norm, self.method.epsilon, groups)

    def _groups(self) -> Groups:
        return Groups(self.method.granularity, [self.space.layers[i] for i in self._active])

    def _ascent(self, gradients: Gradients, overwrite: bool) -> Vector:
        """The gradient of the active parameters, dense and in float32 or better."""
        tensors, is_owned = [], True
        for i in self._active:
            gradient, master = gradients[i], self.space.masters[i]
            dtype = wide_dtype((self.space.tensors[i] if master is None else master).dtype)
            tensor = torch.zeros_like(self._anchor(i)) if gradient is None else dense(gradient).to(dtype)
            if gradient is not None and not gradient.is_sparse and tensor.data_ptr() == gradient.data_ptr():
                is_owned = is_owned and overwrite
            tensors.append(tensor)
        return Vector(tensors, is_owned)

    def _anchor(self, i: int) -> Tensor:
        """Unperturbed weights of parameter `i` in float32 or better: the optimizer's masters where there are any."""
        master = self.space.masters[i]
        return at_least_float32(self._backup[i] if master is None else master.detach())

    def _build_scale(self, ascent: Vector, unit: float, usable: Flag = True) -> None:
        """Build T from the first usable gradient; the host may not know whether there was one."""
        if self._is_scaled is True:
            return
        kind = SCALES[self.method.scale]
        scale = build_scale(
            self.method.scale,
            self._groups(),
            Vector([self._anchor(i) for i in self._active], owned=False) if kind.weight_based else ascent,
            ascent,
            unit=unit,
            eta=self.method.asam_eta,
            max_scale=self.method.max_scale,
        )
        if not kind.gradient_based:
            usable = True
        if isinstance(usable, Tensor):
            scale = scale.kept(usable)
        if isinstance(self._is_scaled, Tensor) and self._scale is not None:
            scale, usable = scale.unless(self._is_scaled, self._scale), usable | self._is_scaled
        self._scale, self._is_scaled = scale, usable
        self.measured.num_capped = self._scale.num_capped

    def _step_(self, ascent: Vector, unit: float, usable: Flag) -> Flag:
        """Add a step to ``T^-1 a`` and project; return whether that could be done. Overwrites `ascent`."""
        if self._factors is not None:
            ascent.scale_(self._factors)
        norm = ascent.norm(2.0)
        fits = known(torch.isfinite(norm) & (norm > 0))
        usable = fits if usable is True else usable & fits
        if usable is False:
            return False
        for vector in (ascent, self._transformed):
            if isinstance(usable, Tensor) and vector is not None:
                vector.keep_if_(usable)
        if self.method.step_rule == "steepest":
            self._ball.steepest_(ascent).scale_(self.method.eta)
        else:
            ascent.scale_(self.method.eta * unit)
        if self._transformed is not None:
            ascent.add_(self._transformed)
        self._transformed = self._ball.project_(ascent)
        return usable

    @property
    def _factors(self) -> Tensor | list[Tensor] | None:
        """T, where it is not 1."""
        return None if self._scale is None else self._scale.factors

    @property
    def _moving_factors(self) -> Tensor | list[Tensor] | None:
        """T as the perturbation is multiplied by it: 0, and not infinite, where nothing moves."""
        if self._scale is None or not isinstance(self._moves, Tensor):
            return self._factors
        return self._scale.kept(self._moves).factors

    # -- the move --------------------------------------------------------------------------------------------------

    def applied(self, *, final: bool = False) -> AbstractContextManager[None]:
        """Move the weights for one pass; they are put back bit for bit, also after an exception.

        Args:
            final: it is the last move: what it was is measured, then forgotten, since it takes memory.
        """
        if self.method.epsilon == 0 or self._transformed is None:
            return nullcontext()
        return self._moved(self._perturbation, final)

    @contextmanager
    def shifted(self, direction: Sequence[Tensor], sign: float) -> Iterator[None]:
        """Move all perturbed weights along a direction for one pass.

        Args:
            direction: one tensor for each parameter that may move, from ``gaussian``.
            sign: 1 or -1.
        """
        with self._moved(lambda: ((i, d, sign) for i, d in zip(self._movable(), direction, strict=True))):
            yield

    def gaussian(self, random: RandomState) -> list[Tensor]:
        """Draw a Gaussian direction for all weights that may move, rescaled to 2-norm epsilon (delta-SAM 5.2)."""
        self._active = self._movable()
        direction = Vector(self._gaussian(random, "probe"))
        self._active = []
        return Ball(2.0).normalize_(direction).scale_(self.method.epsilon).numbers()

    @torch.no_grad()
    def measure(self) -> None:
        """Measure the change that the weights undergo: in float32 what is added to them, else what is left of it."""
        if self.method.epsilon == 0 or self._transformed is None:
            return
        survived = None
        if any(self.space.tensors[i].dtype in HALF for i in self._active):
            moved = [self.space.tensors[i].detach().to(self._anchor(i).dtype) - self._backup[i] for i in self._active]
            norm = vector_norm(moved, self.method.norm)
            survived = self._survived(moved)
        elif self._is_plain:
            norm = self._vector().norm(self.method.norm)
        else:
            norm = vector_norm(self._values(), self.method.norm)
        if isinstance(self._moves, Tensor):
            norm = kept(norm, self._moves)
            survived = None if survived is None else torch.where(self._moves, survived, 1.0)
        self.measured.perturbation_norm, self.measured.survived = norm, survived

    def _survived(self, moved: Sequence[Tensor]) -> Tensor:
        """The part of the perturbation that the change contains: ``<change, a> / <a, a>``, at most 1."""
        wanted = self._values()
        products = torch.stack([torch.sum(m * a, dtype=torch.float64) for m, a in zip(moved, wanted, strict=True)])
        square = vector_norm(wanted, 2.0) ** 2
        return (products.sum() / square.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0.0, 1.0)

    def restore(self) -> None:
        """Copy the unperturbed weights back."""
        self._places.put_back()
        with torch.no_grad():
            self._backup.restore()
        torch.clear_autocast_cache()
        self._is_moved = False
        none_runs()

    def call_unperturbed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model at the unperturbed weights while they are moved."""
        if not self._is_moved:
            return model(*args, **kwargs)
        weights = {id(tensor): self._backup[i] for i, tensor in enumerate(self.space.tensors)}
        return self._places.call(model, weights, args, kwargs)

    @property
    def _is_plain(self) -> bool:
        """Whether T and the mask are one number for each tensor at most."""
        is_whole = not self._is_masked or not any(isinstance(mask, Tensor) for mask in self._mask())
        return not isinstance(self._factors, list) and is_whole

    def _mask(self) -> list[Tensor | float | None]:
        """What each active parameter's perturbation is still to be multiplied by."""
        return [None if self._is_folded else self._masks[i] for i in self._active]

    @property
    def _is_masked(self) -> bool:
        return not self._is_folded and any(mask is not None for mask in self._masks)

    def _fold(self) -> None:
        """Multiply T and the mask in; no step can follow."""
        assert self._transformed is not None, "something is moved"
        if not self._is_plain:
            for factors in (self._moving_factors, self._mask()):
                if factors is not None:
                    self._transformed.scale_(factors)
            self._scale, self._is_folded = None, True

    def _vector(self) -> Vector:
        """The perturbation itself, where it is plain."""
        assert self._transformed is not None, "something is moved"
        vector = self._transformed.shared()
        factors = self._moving_factors
        if isinstance(factors, Tensor):
            vector.scale_(factors)
        if self._is_masked:
            numbers = [1.0 if mask is None else float(mask) for mask in self._mask()]
            vector.scale_(on_device(numbers, vector.tensors[0].device, torch.float64))
        return vector

    def _values(self) -> list[Tensor]:
        """The perturbation of each active parameter."""
        return [value if factor is None else value * factor for _, value, factor in self._perturbation()]

    def _perturbation(self) -> Iterator[Part]:
        assert self._transformed is not None, "something is moved"
        if self._is_plain:
            for i, (tensor, factor) in zip(self._active, self._vector().parts(), strict=True):
                yield i, tensor, factor
            return
        factors = self._moving_factors
        own = factors if factors is not None else [None] * len(self._active)
        for i, (tensor, factor), *others in zip(
            self._active, self._transformed.parts(), own, self._mask(), strict=True
        ):
            for each in others:
                tensor = tensor if each is None else tensor * each
            yield i, tensor, factor

    @contextmanager
    def _moved(self, parts: Callable[[], Iterable[Part]], final: bool = False) -> Iterator[None]:
        generators = self._generators(f"rounding{self._num_moves}")
        self._num_moves += 1
        try:
            self._is_moved = True
            with torch.no_grad():
                if final:
                    self._fold()
                self._add_all(parts(), generators)
            if final:
                self.measure()
                self._transformed, self._scale = None, None
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

    def _add_all(self, parts: Iterable[Part], generators: Callable[[torch.device], torch.Generator]) -> None:
        for bucket in bucketed(parts):
            self._add(bucket, generators)

    def _add(self, parts: Sequence[Part], generators: Callable[[torch.device], torch.Generator]) -> None:
        """Move the weights of some parameters by factors of values."""
        indices = [i for i, _, _ in parts]
        plain: list[tuple[Tensor, Tensor, Factor | None, Tensor]] = []
        for weight, place, (i, value, factor) in zip(*self._backup.before_move(indices), parts, strict=True):
            if weight.dtype == value.dtype and self.space.masters[i] is None:
                plain.append((weight, value, factor, place))
                continue
            anchor = self._anchor(i)
            moved = torch.add(anchor, value) if factor is None else anchor + value * factor
            if self.method.rounding == "stochastic" and weight.dtype in HALF:
                moved = round_stochastically(moved, weight.dtype, generators(weight.device))
            place.copy_(moved)
        if plain:
            add_all_scaled(*zip(*plain, strict=True), at_once=at_once(plain[0][0]))
        self._backup.after_move(indices)

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
