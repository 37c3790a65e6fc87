"""A method is a choice on each axis; a preset is a row of one table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fairseq_sam.core.axes import (
    CHOICES,
    DEFAULT_MAX_SCALE,
    SETTINGS,
    check_integer,
    check_number,
    check_pattern,
    flag,
    parse_norm,
    resolved,
)
from fairseq_sam.core.contradictions import CONTRADICTIONS
from fairseq_sam.core.scales import SCALES


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
        descent: gradient that the base optimizer gets: ``last`` (at ``w + a_K``), ``mean`` (of ``g_0 .. g_K``),
            ``mean_ascent`` (of ``g_0 .. g_{K-1}``, without a pass at ``a_K``; FreeLB's Hugging Face code), ``gsam``
            (``g_K - alpha (g_0 - projection of g_0 on g_K)``) or ``sds`` (last, on the instances whose loss rose
            most).
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
        ascent: what the ascent gradient is of: the ``batch``, the instance-``weighted`` batch (delta-SAM eq. 5-6),
            each ``instance`` on its own (delta-SAM eq. 2), or a ``random`` Gaussian direction in its place.
        ascent_fraction: share of the batch's instances, its first ones, that the ascent sees, in (0, 1].
        m: number of disjoint parts of the batch, each with its own perturbation, >= 1.
        ball: one ball for the whole ``model``, or one of radius epsilon for each ``group`` of the granularity.
        step_rule: ``steepest`` (a step of length `step_size` in the norm, eq. 15) or ``gradient`` (``step_size T^2 g``,
            not normalised; Zheng et al. 2021).
        mask: perturbed weights: all (``none``), those with the largest empirical ``fisher`` information (FSAM), or
            ``random`` tensors, kept with probability 1 - sparsity and divided by it (ESAM's SWP).
        sparsity: share of the weights (``fisher``) or tensors (``random``) that is not perturbed, in [0, 1).
        mask_interval: updates between refreshes of the Fisher mask, >= 1.
        fisher_samples: number of instances whose gradients the Fisher mask is made from, >= 1.
        gsam_alpha: weight of the component that GSAM subtracts, >= 0.
        esam_gamma: share of the instances that ``sds`` keeps, in (0, 1].
        delta_eta: floor of the denominator of delta-SAM's weights (eq. 5), > 0.
        between: what updates between two sharpness-aware ones do: ``plain`` steps, or steps that ``reuse`` the
            last sharpness component (Liu et al. 2022).
        look_alpha: weight of the reused component, in multiples of the gradient's norm, >= 0.
        where: what is perturbed: ``weights``, or the outputs of the word ``embeddings``.
        init: where the ascent starts: ``zero``, or ``uniform`` noise in the ball (embeddings only).
        epsilon_min: radius at the learning rate `lr_min`; the radius is linear in the learning rate and reaches
            `epsilon` at `lr_max` (GSAM). Default: the radius is constant.
        lr_max: learning rate at which the radius is `epsilon`, > 0; default the peak of the schedule.
        lr_min: learning rate at which the radius is `epsilon_min`, >= 0.
        end_epoch: last sharpness-aware epoch; plain steps after it. Default: none.
        end_update: number of updates after which steps are plain. Default: none.
        rounding: how perturbed weights in half precision are rounded: to the ``nearest`` number, or ``stochastic``, up
            or down at random so that the perturbation survives on average. Weights in float32 are not rounded.

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
    max_scale: float = DEFAULT_MAX_SCALE
    exclude: str = ""
    ascent: str = "batch"
    ascent_fraction: float = 1.0
    m: int = 1
    ball: str = "model"
    step_rule: str = "steepest"
    mask: str = "none"
    sparsity: float | None = None
    mask_interval: int | None = None
    fisher_samples: int | None = None
    gsam_alpha: float | None = None
    esam_gamma: float | None = None
    delta_eta: float | None = None
    between: str = "plain"
    look_alpha: float | None = None
    where: str = "weights"
    init: str = "zero"
    epsilon_min: float | None = None
    lr_max: float | None = None
    lr_min: float = 0.0
    end_epoch: int | None = None
    end_update: int | None = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        """Check every value, then every pair that can contradict."""
        object.__setattr__(self, "norm", parse_norm(self.norm))
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{flag(field)} must be one of {', '.join(choices)}, got {getattr(self, field)!r}")
        check_number("epsilon", self.epsilon, 0.0, "a finite number >= 0")
        check_number("asam_eta", self.asam_eta, 0.0, "a finite number >= 0")
        check_number("step_size", self.step_size, 0.0, "a finite number > 0", strict=True)
        check_number("max_scale", self.max_scale, 0.0, "a number > 0 (inf: no cap)", strict=True, finite=False)
        check_number("ascent_fraction", self.ascent_fraction, 0.0, "a number in (0, 1]", strict=True, most=1.0)
        check_number(
            "epsilon_min", self.epsilon_min, 0.0, f"a number in [0, epsilon = {self.epsilon}]", most=self.epsilon
        )
        check_number("lr_min", self.lr_min, 0.0, "a finite number >= 0")
        check_number("lr_max", self.lr_max, self.lr_min, f"a finite number > lr_min = {self.lr_min}", strict=True)
        for field, least in (("steps", 1), ("start_epoch", 1), ("start_update", 0), ("interval", 1), ("m", 1)):
            check_integer(field, getattr(self, field), least)
        check_integer("end_epoch", self.end_epoch, self.start_epoch)
        check_integer("end_update", self.end_update, self.start_update + 1)
        check_pattern("exclude", self.exclude)
        for field, setting in SETTINGS.items():
            value = resolved(field, getattr(self, field), setting, getattr(self, setting.axis))
            object.__setattr__(self, field, value)
        for refused in CONTRADICTIONS:
            if refused.applies(self):
                raise ValueError(refused.reason.format(m=self))

    @property
    def eta(self) -> float:
        """Length of one ascent step: `step_size`, or ``1.5 * epsilon / steps`` (GA-SAM 3.3)."""
        return 1.5 * self.epsilon / self.steps if self.step_size is None else self.step_size

    @property
    def num_ascents(self) -> int:
        """Ascent steps before the last pass."""
        return self.steps - 1 if self.descent == "mean_ascent" else self.steps

    @property
    def needs_clean_gradient(self) -> bool:
        """Whether the descent uses the gradients of the ascent passes."""
        return self.descent in ("mean", "mean_ascent", "gsam") or self.between == "reuse"

    @property
    def combines_whole_gradient(self) -> bool:
        """Whether the descent gradient needs all of the last gradient at once, not one tensor after the other."""
        partial = self.ascent_fraction < 1 and self.needs_clean_gradient
        return self.descent == "gsam" or self.between == "reuse" or partial

    @property
    def selects(self) -> bool:
        """Whether the last pass sees selected instances only."""
        return self.descent == "sds" and self.esam_gamma != 1.0

    @property
    def needs_instances(self) -> bool:
        """Whether the method slices batches or needs the losses of single instances."""
        return self.needs_losses or self.slices

    @property
    def slices(self) -> bool:
        """Whether some passes see parts of a batch."""
        return (
            self.ascent == "instance" or self.ascent_fraction < 1 or self.m > 1 or self.mask == "fisher" or self.selects
        )

    @property
    def has_first_pass(self) -> bool:
        """Whether a pass runs before the perturbation is found."""
        return self.ascent != "random" or self.needs_clean_gradient

    @property
    def measures_sharpness(self) -> bool:
        """Whether the first and the last pass see the same instances, so that their losses compare."""
        return self.has_first_pass and self.num_ascents > 0 and self.ascent_fraction == 1 and not self.selects

    @property
    def has_groups(self) -> bool:
        """Whether the granularity matters."""
        return self.scale != "one" or self.ball == "group"

    @property
    def needs_losses(self) -> bool:
        """Whether the method needs the losses of single instances, not only slices of batches."""
        return self.ascent == "weighted" or self.selects

    @property
    def passes(self) -> float:
        """Forward-backward passes of one sharpness-aware step, in passes over the whole batch."""
        ascents = self.num_ascents * self.ascent_fraction if self.has_first_pass else 0.0
        return ascents + (float(self.esam_gamma or 1.0) if self.selects else 1.0)

    @property
    def forwards(self) -> float:
        """Further forward passes without gradient of one sharpness-aware step."""
        weighing = 2 * self.ascent_fraction if self.ascent == "weighted" else 0.0
        clean_is_free = self.ascent_fraction == 1 and self.ascent in ("batch", "weighted")
        return weighing + (0.0 if not self.selects else 1.0 if clean_is_free else 2.0)

    @property
    def copies(self) -> float:
        """Copies of the weights that live beside model, gradient and base optimizer during the last pass.

        Weights: the backup, gradients that the descent keeps, the mask (a byte for each number), and the component of
        before while a new one is made, in case of an error. Embeddings: only gradients that the descent keeps.
        """
        kept = (1.0 if self.needs_clean_gradient else 0.0) + (1.0 if self.between == "reuse" else 0.0)
        if self.where == "embeddings":
            return kept
        return 1.0 + kept + (0.25 if self.mask == "fisher" else 0.0)

    def is_active(self, epoch: int, num_updates: int) -> bool:
        """Say whether the update is sharpness-aware.

        Args:
            epoch: current epoch, counted from 1.
            num_updates: number of updates done before this one.
        """
        since_start = num_updates - self.start_update
        on_time = epoch >= self.start_epoch and since_start >= 0 and not self.has_ended(epoch, num_updates)
        return on_time and since_start % self.interval == 0

    def has_ended(self, epoch: int, num_updates: int) -> bool:
        """Say whether the last sharpness-aware update lies behind; arguments as for ``is_active``."""
        past_epoch = self.end_epoch is not None and epoch > self.end_epoch
        return past_epoch or (self.end_update is not None and num_updates >= self.end_update)

    def at(self, learning_rate: float) -> "Method":
        """Return the method with the radius that belongs to a learning rate (GSAM, Algorithm 1).

        Args:
            learning_rate: of the coming update.
        """
        if self.epsilon_min is None or self.lr_max is None:
            return self
        progress = (learning_rate - self.lr_min) / (self.lr_max - self.lr_min)
        radius = self.epsilon_min + (self.epsilon - self.epsilon_min) * min(max(progress, 0.0), 1.0)
        return replace(self, epsilon=radius, epsilon_min=None, lr_max=None, lr_min=0.0)

    def with_radius(self, epsilon: float) -> "Method":
        """Return the method with another radius; `epsilon_min` keeps its share of it.

        Args:
            epsilon: the radius.
        """
        least = None if self.epsilon_min is None else self.epsilon_min * (epsilon / self.epsilon)
        return replace(self, epsilon=epsilon, epsilon_min=least)

    def with_peak(self, learning_rate: float) -> "Method":
        """Return the method with `lr_max` set, unless it is set or the radius is constant.

        Args:
            learning_rate: the schedule's largest.

        Raises:
            ValueError: if it is not above `lr_min`.
        """
        if self.epsilon_min is None or self.lr_max is not None:
            return self
        if not learning_rate > self.lr_min:
            raise ValueError(
                f"{flag('lr_min')} must be below the largest learning rate of the run, {learning_rate} (--lr), got "
                f"{self.lr_min}; change one of them, or say at which rate the radius is epsilon: {flag('lr_max')}"
            )
        return replace(self, lr_max=learning_rate)

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
        return replace(PRESETS[name], **_implied(PRESETS[name], given))


def _implied(preset: Method, given: dict[str, Any]) -> dict[str, Any]:
    """Add what follows from an override: a preset's other columns must not contradict it."""
    implied = dict(given)
    where = given.get("where", preset.where)
    if where == "weights" and given.get("scale") in SCALES and SCALES[given["scale"]].element_only:
        implied.setdefault("granularity", "element")  # the one granularity that the scale has
    if given.get("step_rule", preset.step_rule) != preset.step_rule:
        implied.setdefault("step_size", None)
    if given.get("where", preset.where) != preset.where:
        sentences = given["where"] == "embeddings"
        implied.setdefault("granularity", "sentence" if sentences else "model")
        implied.setdefault("ball", "group" if sentences else "model")
        implied.setdefault("init", "zero")
    if "epsilon" in given and preset.epsilon_min is not None and preset.epsilon > 0:
        implied.setdefault("epsilon_min", given["epsilon"] * preset.epsilon_min / preset.epsilon)
    for field, setting in SETTINGS.items():
        if given.get(setting.axis, getattr(preset, setting.axis)) != getattr(preset, setting.axis):
            implied.setdefault(field, None)
    return implied


# Defaults of epsilon, norm, steps and step size: sam, Foret et al. 2021 (rho 0.05, L2); asam, Kwon et al. 2021 (rho
# 0.5, L2); layer_sam and ga_sam, GA-SAM C.2.1; multistep_defense, GA-SAM C.2.3 and C.2.4; efficient_sam,
# sam-language-models 4.1 (rho 0.15, a quarter of the batch); fisher_sam, FSAM 4.2 (the middle of its grid);
# delta_sam and instance_sam, delta-SAM table 5 (BERT-base); gsam, Zhuang et al. 2022 (a radius that shrinks with
# the learning rate; the two ends are ours); model_perturbation, Zheng et al. 2021 (epsilon 0.5, rate 1, one step);
# awp, Wu et al. 2020 (gamma 5e-3); look_sam, Liu et al. 2022 (every fifth update); freelb, GA-SAM C.4.1 (En-Vi).
# msam, esam, random_sam: as sam.
PRESETS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("sam", epsilon=0.05),
        Method("asam", epsilon=0.5, scale="weight_abs", granularity="element"),
        Method("layer_sam", epsilon=1e-5, scale="weight_over_gradient", granularity="layer"),
        Method("multistep_defense", epsilon=5e-4, norm=math.inf, steps=2, descent="mean"),
        Method("ga_sam", epsilon=1e-4, norm=math.inf, scale="gradient_strength", granularity="layer", descent="mean"),
        Method("efficient_sam", epsilon=0.15, ascent_fraction=0.25),
        Method("msam", epsilon=0.05, m=4),
        Method("fisher_sam", epsilon=5e-3, mask="fisher"),
        Method("esam", epsilon=0.05, mask="random", descent="sds"),
        Method("gsam", epsilon=0.05, epsilon_min=0.01, descent="gsam"),
        Method("delta_sam", epsilon=0.05, ascent="weighted"),
        Method("instance_sam", epsilon=0.05, ascent="instance"),
        Method("random_sam", epsilon=0.05, ascent="random"),
        Method("model_perturbation", epsilon=0.5, step_rule="gradient", step_size=1.0),
        Method("awp", epsilon=5e-3, scale="weight_norm", granularity="layer", ball="group"),
        Method("look_sam", epsilon=0.05, interval=5, between="reuse"),
        Method(
            "freelb", epsilon=0.02, norm=math.inf, granularity="sentence", ball="group", descent="mean",
            where="embeddings", init="uniform",
        ),
    )
}  # fmt: skip

SUMMARIES: Mapping[str, str] = {
    "sam": "Sharpness-Aware Minimization (Foret et al. 2021)",
    "asam": "Adaptive SAM: perturbations proportional to each weight (Kwon et al. 2021)",
    "layer_sam": "layer-wise SAM: perturbations proportional to ||w_i|| / ||g_i|| (Liu et al. 2021)",
    "multistep_defense": "multi-step adversarial parameter defense, averaged loss (Zhang et al. 2021)",
    "ga_sam": "Gradient-Strength based Adaptive SAM, averaged loss (Zhang et al. 2022)",
    "efficient_sam": "SAM with the ascent on a quarter of the batch (Bahri et al. 2022)",
    "msam": "SAM on m disjoint parts of the batch, each with its own perturbation (Foret et al. 2021)",
    "fisher_sam": "SAM that perturbs the weights with the largest Fisher information (Zhong et al. 2022)",
    "esam": "Efficient SAM: random tensors perturbed, last pass on selected instances (Du et al. 2022)",
    "gsam": "surrogate Gap guided SAM, radius follows the learning rate (Zhuang et al. 2022)",
    "delta_sam": "SAM with dynamic reweighting of the instances, delta-SAM (Zhou et al. 2022)",
    "instance_sam": "a perturbation for every instance: delta-SAM's costly reference (Zhou et al. 2022)",
    "random_sam": "a Gaussian direction in place of the gradient: average-direction sharpness (Wen et al. 2023)",
    "model_perturbation": "Adversarial Model Perturbation: ascent by gradient steps of fixed rate (Zheng et al. 2021)",
    "awp": "Adversarial Weight Perturbation: each layer normalised on its own (Wu et al. 2020)",
    "look_sam": "LookSAM: SAM every n-th update, its sharpness component between (Liu et al. 2022)",
    "freelb": "FreeLB: attack on the word embeddings, averaged loss (Zhu et al. 2020)",
}
