"""Choices that make no sense together."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fairseq_sam.core.axes import DEFAULT_MAX_SCALE
from fairseq_sam.core.scales import SCALES

if TYPE_CHECKING:
    from fairseq_sam.core.method import Method


class Contradiction(NamedTuple):
    """A combination of choices that makes no sense, and why. The reason may name fields of the method as ``{m.…}``."""

    applies: Callable[["Method"], bool]
    reason: str


CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction(
        lambda m: SCALES[m.scale].element_only and m.granularity != "element" and m.where == "weights",
        "scale (--sam-scale) {m.scale} is a number per weight and needs granularity (--sam-granularity) element, "
        "got {m.granularity!r}; the norm of a group's weights is --sam-scale weight_norm",
    ),
    Contradiction(
        lambda m: m.asam_eta > 0 and m.scale != "weight_abs",
        "asam_eta (--sam-asam-eta) {m.asam_eta} is added to |w| by scale (--sam-scale) weight_abs, got {m.scale!r}; "
        "leave it out or use --sam-scale weight_abs",
    ),
    Contradiction(
        lambda m: m.step_rule == "gradient" and m.step_size is None,
        "step_rule (--sam-step-rule) gradient takes steps of step_size times the gradient and has no default for it; "
        "give step_size (--sam-step-size) > 0",
    ),
    Contradiction(
        lambda m: m.ascent == "random" and SCALES[m.scale].gradient_based,
        "scale (--sam-scale) {m.scale} is made from the ascent gradient, but ascent (--sam-ascent) random has none; "
        "use --sam-scale one, weight_abs, weight_norm or weight_over_sqrt_n",
    ),
    Contradiction(
        lambda m: m.descent == "mean_ascent" and m.steps == 1 and m.init == "zero",
        "descent (--sam-descent) mean_ascent averages the gradients before the last ascent step, and with steps "
        "(--sam-steps) 1 that is the base optimizer; use --sam-steps 2 or more, or --sam-descent mean",
    ),
    Contradiction(
        lambda m: m.max_scale != DEFAULT_MAX_SCALE and not SCALES[m.scale].gradient_based,
        "max_scale (--sam-max-scale) caps a scale made from the gradient, but scale (--sam-scale) is {m.scale}, got "
        "max_scale {m.max_scale}; leave it out or use --sam-scale gradient_strength",
    ),
    Contradiction(
        lambda m: m.lr_min != 0.0 and m.epsilon_min is None,
        "lr_min (--sam-lr-min) {m.lr_min} is only used with epsilon_min (--sam-epsilon-min): a radius that follows "
        "the learning rate; give both or neither",
    ),
    Contradiction(
        lambda m: m.ascent == "random" and m.step_size is not None,
        "ascent (--sam-ascent) random goes to the edge of the ball in one step, so step_size (--sam-step-size) "
        "{m.step_size} must be left out; the length is --sam-epsilon",
    ),
    Contradiction(
        lambda m: m.ascent == "random" and (m.steps > 1 or m.step_rule != "steepest" or m.ascent_fraction < 1),
        "ascent (--sam-ascent) random draws one direction: steps (--sam-steps) must be 1, step_rule "
        "(--sam-step-rule) steepest and ascent_fraction (--sam-ascent-fraction) 1, got {m.steps}, {m.step_rule}, "
        "{m.ascent_fraction}",
    ),
    Contradiction(
        lambda m: m.ascent == "weighted" and m.needs_clean_gradient,
        "ascent (--sam-ascent) weighted gives the gradient of the weighted batch, but descent (--sam-descent) "
        "{m.descent} and between (--sam-between) {m.between} need that of the unweighted batch at w; "
        "use --sam-descent last or sds, --sam-between plain",
    ),
    Contradiction(
        lambda m: m.ascent == "instance" and (m.m > 1 or m.ascent_fraction < 1 or m.descent == "sds"),
        "ascent (--sam-ascent) instance perturbs for each instance alone, so there is nothing to split or select "
        "within it: m (--sam-m) and ascent_fraction (--sam-ascent-fraction) must be 1 and descent (--sam-descent) "
        "not sds, got {m.m}, {m.ascent_fraction}, {m.descent}",
    ),
    Contradiction(
        lambda m: (m.ascent == "instance" or m.m > 1) and m.scope == "update",
        "scope (--sam-scope) update shares one perturbation, but ascent (--sam-ascent) {m.ascent} with m (--sam-m) "
        "{m.m} gives each part of the batch its own; use --sam-scope microbatch",
    ),
    Contradiction(
        lambda m: m.descent == "mean_ascent" and m.between == "reuse",
        "descent (--sam-descent) mean_ascent has no gradient at the end of the ascent from which between "
        "(--sam-between) reuse could take the sharpness component; use --sam-descent last",
    ),
    Contradiction(
        lambda m: (m.granularity == "sentence") != (m.where == "embeddings"),
        "granularity (--sam-granularity) sentence belongs to where (--sam-where) embeddings, and only it does; "
        "got granularity {m.granularity!r} with where {m.where!r}",
    ),
    Contradiction(
        lambda m: m.init == "uniform" and m.where != "embeddings",
        "init (--sam-init) uniform starts the ascent inside a sentence's ball and needs where (--sam-where) "
        "embeddings, got {m.where!r}",
    ),
    Contradiction(
        lambda m: (
            m.where == "embeddings" and (m.scale != "one" or m.ball != "group" or m.mask != "none" or bool(m.exclude))
        ),
        "where (--sam-where) embeddings perturbs the embeddings of each sentence in a ball of its own: scale "
        "(--sam-scale) must be one, ball (--sam-ball) group, mask (--sam-mask) none and exclude (--sam-exclude) "
        "empty, got {m.scale}, {m.ball}, {m.mask}, {m.exclude!r}",
    ),
    Contradiction(
        lambda m: (
            m.where == "embeddings"
            and (m.ascent != "batch" or m.ascent_fraction < 1 or m.m > 1 or m.descent == "sds" or m.scope == "update")
        ),
        "where (--sam-where) embeddings already perturbs each sentence by its own gradient: ascent (--sam-ascent) "
        "must be batch, ascent_fraction (--sam-ascent-fraction) and m (--sam-m) 1, descent (--sam-descent) not sds "
        "and scope (--sam-scope) microbatch, got {m.ascent}, {m.ascent_fraction}, {m.m}, {m.descent}, {m.scope}",
    ),
    Contradiction(
        lambda m: m.where == "embeddings" and m.rounding != "nearest",
        "rounding (--sam-rounding) {m.rounding} is of weights, but where (--sam-where) is embeddings; leave it out or "
        "use --sam-where weights",
    ),
    Contradiction(
        lambda m: m.where == "embeddings" and m.between == "reuse",
        "between (--sam-between) reuse keeps a component of the weights' sharpness, but where (--sam-where) is "
        "embeddings; use --sam-between plain",
    ),
    Contradiction(
        lambda m: m.lr_max is not None and m.epsilon_min is None,
        "lr_max (--sam-lr-max) {m.lr_max} is only used with epsilon_min (--sam-epsilon-min): a radius that follows "
        "the learning rate; give both or neither",
    ),
)
