"""A method is a choice on each axis; a preset is a row of one table."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fairseq_sam.core.scales import SCALES

GRANULARITIES = ("element", "filter", "tensor", "layer", "model")
DESCENTS = ("last", "mean")
GRADIENTS = ("mean", "sum")
SCOPES = ("microbatch", "update")
DROPOUTS = ("same", "fresh")

# Granularities whose groups are cut along tensors; they have no meaning on a flattened parameter vector.
TENSOR_GRANULARITIES = ("filter", "tensor", "layer")

CHOICES: dict[str, tuple[str, ...]] = {
    "scale": tuple(SCALES),
    "granularity": GRANULARITIES,
    "descent": DESCENTS,
    "gradient": GRADIENTS,
    "scope": SCOPES,
    "dropout": DROPOUTS,
}


def flag(field: str) -> str:
    """Name a field as a plain-PyTorch user and a command-line user know it."""
    return f"{field} (--sam-{field.replace('_', '-')})"


def parse_norm(value: str | float) -> float:
    """Return the order `p` of a norm given as ``l2``, ``linf`` or a number.

    Args:
        value: ``"l2"``, ``"linf"`` (any case), or a number in (1, inf], also as a string.

    Returns:
        The order, a float in (1, inf].

    Raises:
        ValueError: if the value is none of these.
    """
    names = {"l2": 2.0, "linf": math.inf}
    try:
        order = names[value.lower()] if isinstance(value, str) and value.lower() in names else float(value)
    except (TypeError, ValueError):
        order = math.nan
    if not order > 1.0:
        raise ValueError(f"{flag('norm')} must be l2, linf or a number > 1, got {value!r}")
    return order


@dataclass(frozen=True)
class Method:
    """One sharpness-aware method: a choice on each axis.

    The perturbation of K steps is, from ``a_0 = 0`` (GA-SAM eq. 15-18, p-norm ball in the coordinates ``T^-1 a``)::

        u_k = step_size * T sgn(g) |T g|^(1/(p-1)) / || |T g|^(1/(p-1)) ||_p
        a_k = projection of a_{k-1} + u_k onto { a : || T^-1 a ||_p <= epsilon }

    Args:
        name: name of the preset that the method started from.
        epsilon: radius of the ball, >= 0; 0 is the base optimizer bit for bit.
        norm: order p of the norm, ``l2``, ``linf`` or a number in (1, inf].
        steps: number K of ascent steps, >= 1. A step of training costs K + 1 forward-backward passes.
        step_size: length of one ascent step, > 0; default ``1.5 * epsilon / steps`` (GA-SAM 3.3, after Zhang et al.
            2021). With one step this equals a step of length `epsilon`.
        scale: the diagonal operator T, a key of ``SCALES``.
        granularity: what one group of T is: ``element``, ``filter`` (slices of a tensor's first dimension),
            ``tensor``, ``layer`` (the parameters that one module owns directly) or ``model``.
        descent: gradient that the base optimizer gets: ``last`` (at ``w + a_K``) or ``mean`` (of ``g_0 .. g_K``).
        gradient: unit in which T sees gradients: ``mean`` divides by the sample size, ``sum`` does not.
        start_epoch: first epoch (counted from 1) that is sharpness-aware; plain steps before it.
        start_update: number of plain updates before the first sharpness-aware one.
        interval: every n-th update is sharpness-aware, plain steps between; >= 1.
        scope: ``microbatch`` (each micro-batch of each worker has its own perturbation) or ``update`` (one
            perturbation from the gradient of the whole update).
        dropout: ``same`` random masks in every pass, or ``fresh`` masks in the ascent passes.
        asam_eta: added to ``|w|`` by the scale ``weight_abs``, >= 0 (default 0: GA-SAM's ASAM; Kwon et al. use 0.01).
        max_scale: a gradient-based T is capped at this multiple of its model-wise value, > 0; ``inf`` switches the
            cap off. Differs from the paper, which has none: a group whose gradient is rounding noise would explode.
        exclude: regular expression; parameters whose name it matches (`re.search`) are trained but not perturbed.

    Raises:
        ValueError: if a value is out of range or two values contradict each other; names flag, value and range.
    """

    name: str
    epsilon: float
    norm: float = 2.0
    steps: int = 1
    step_size: float | None = None
    scale: str = "one"
    granularity: str = "model"
    descent: str = "last"
    gradient: str = "mean"
    start_epoch: int = 1
    start_update: int = 0
    interval: int = 1
    scope: str = "microbatch"
    dropout: str = "same"
    asam_eta: float = 0.0
    max_scale: float = 1000.0
    exclude: str = ""

    def __post_init__(self) -> None:
        """Check every value, then every pair that can contradict."""
        object.__setattr__(self, "norm", parse_norm(self.norm))
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{flag(field)} must be one of {', '.join(choices)}, got {getattr(self, field)!r}")
        self._check_number("epsilon", 0.0, "a finite number >= 0")
        self._check_number("asam_eta", 0.0, "a finite number >= 0")
        self._check_number("step_size", 0.0, "a finite number > 0", strict=True)
        self._check_number("max_scale", 0.0, "a number > 0 (inf: no cap)", strict=True, finite=False)
        for field, least in (("steps", 1), ("start_epoch", 1), ("start_update", 0), ("interval", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{flag(field)} must be an integer >= {least}, got {value!r}")
        try:
            re.compile(self.exclude)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{flag('exclude')} must be a regular expression, got {self.exclude!r}: {error}"
            ) from error
        self._check_contradictions()

    def _check_number(
        self, field: str, least: float, allowed: str, *, strict: bool = False, finite: bool = True
    ) -> None:
        value = getattr(self, field)
        if value is None and field == "step_size":
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value > least if strict else value >= least) or (finite and math.isinf(value)):
            raise ValueError(f"{flag(field)} must be {allowed}, got {value!r}")

    def _check_contradictions(self) -> None:
        if SCALES[self.scale].element_only and self.granularity != "element":
            raise ValueError(
                f"{flag('scale')} {self.scale} is a number per weight and needs {flag('granularity')} element, "
                f"got {self.granularity!r}; the norm of a group's weights is --sam-scale weight_norm"
            )
        if self.asam_eta > 0 and self.scale != "weight_abs":
            raise ValueError(
                f"{flag('asam_eta')} is only used by --sam-scale weight_abs, got asam_eta {self.asam_eta} "
                f"with scale {self.scale!r}; leave it out or change the scale"
            )

    @property
    def eta(self) -> float:
        """Length of one ascent step: `step_size`, or ``1.5 * epsilon / steps`` (GA-SAM 3.3)."""
        return 1.5 * self.epsilon / self.steps if self.step_size is None else self.step_size

    @property
    def passes(self) -> int:
        """Forward-backward passes of one sharpness-aware step."""
        return self.steps + 1

    def is_active(self, epoch: int, num_updates: int) -> bool:
        """Say whether the update is sharpness-aware.

        Args:
            epoch: current epoch, counted from 1.
            num_updates: number of updates done before this one.
        """
        since_start = num_updates - self.start_update
        return epoch >= self.start_epoch and since_start >= 0 and since_start % self.interval == 0

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "Method":
        """Build a method from a row of ``PRESETS``.

        Args:
            name: key of ``PRESETS``.
            overrides: values for single axes; None keeps the preset's value.

        Returns:
            The method.

        Raises:
            ValueError: if the preset or an axis is unknown or a value is not allowed.
        """
        if name not in PRESETS:
            raise ValueError(f"method must be one of {', '.join(PRESETS)}, got {name!r}")
        known = {field.name for field in fields(cls)} - {"name"}
        given = {key: value for key, value in overrides.items() if value is not None}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r} of method {name!r}; known: {', '.join(sorted(known))}")
        scale = given.get("scale")
        if scale in SCALES and SCALES[scale].element_only:
            # The scale has one meaningful granularity, so a preset's other one is not a contradiction.
            given.setdefault("granularity", "element")
        return replace(PRESETS[name], **given)


# Defaults of epsilon, norm and steps: sam, Foret et al. 2021 (rho 0.05, L2); asam, Kwon et al. 2021 (rho 0.5, L2);
# layer_sam, GA-SAM C.2.1; multistep_defense, GA-SAM C.2.3 and C.2.4; ga_sam, GA-SAM C.2.1.
PRESETS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("sam", epsilon=0.05),
        Method("asam", epsilon=0.5, scale="weight_abs", granularity="element"),
        Method("layer_sam", epsilon=1e-5, scale="weight_over_gradient", granularity="layer"),
        Method("multistep_defense", epsilon=5e-4, norm=math.inf, steps=2, descent="mean"),
        Method("ga_sam", epsilon=1e-4, norm=math.inf, scale="gradient_strength", granularity="layer", descent="mean"),
    )
}
