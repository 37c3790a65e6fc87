"""The flags of the presets, and those of the base optimizers beside them."""

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterable
from dataclasses import Field, field, fields, make_dataclass
from functools import cache
from typing import Any, NamedTuple, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY, OPTIMIZER_REGISTRY

from fairseq_sam.analysis.epsilon import FRACTION
from fairseq_sam.core.method import PRESETS


class Flag(NamedTuple):
    """A flag without its ``--sam-``."""

    name: str
    type: Any
    help: str


# The flags by axis. A flag that is not given keeps the preset's value.
FLAGS_BY_AXIS: dict[str, tuple[Flag, ...]] = {
    "ball": (
        Flag(
            "epsilon",
            Any,
            "radius of the perturbation, >= 0 (0: the base optimizer bit for bit), or auto: the radius at which the "
            "perturbation raises the loss by --sam-rise, measured in the first 8 updates that would be sharpness-aware",
        ),
        Flag(
            "rise",
            float,
            f"with --sam-epsilon auto: wanted rise of the loss, as a fraction of it, > 0 (default: {FRACTION:g})",
        ),
        Flag("norm", str, "norm of the ball: l2, linf or a number > 1"),
        Flag("ball", str, "one ball for the whole model, or one for each group of the granularity"),
        Flag("epsilon_min", float, "radius at learning rate --sam-lr-min, in [0, epsilon]; linear between (GSAM)"),
        Flag(
            "lr_max",
            float,
            "learning rate at which the radius is epsilon, > --sam-lr-min (default: the schedule's peak)",
        ),
        Flag("lr_min", float, "learning rate at which the radius is --sam-epsilon-min, >= 0"),
    ),
    "ascent steps": (
        Flag("steps", int, "number K of ascent steps, >= 1; an update costs K + 1 passes"),
        Flag("step_size", float, "length of one ascent step, > 0 (default: 1.5 epsilon / K)"),
        Flag(
            "step_rule",
            str,
            "steps of length --sam-step-size along the steepest ascent, or of --sam-step-size times the gradient",
        ),
        Flag("init", str, "the ascent starts at zero, or at uniform noise in the ball (--sam-where embeddings only)"),
        Flag("dropout", str, "random masks of the ascent passes: those of the last pass, or fresh ones"),
    ),
    "ascent gradient": (
        Flag(
            "ascent",
            str,
            "gradient of the batch, of the batch with delta-SAM's weights, of each instance, or a random direction",
        ),
        Flag("ascent_fraction", float, "share of the batch that the ascent sees, in (0, 1]"),
        Flag("m", int, "number of parts of the batch, each with its own perturbation, >= 1"),
        Flag("delta_eta", float, "floor of the denominator of delta-SAM's weights, > 0"),
        Flag(
            "gradient",
            str,
            "unit of the gradient that T sees: per unit of sample size (token, sentence), or as the criterion sums it",
        ),
    ),
    "scale T": (
        Flag("scale", str, "diagonal scale operator T, by which the ball is stretched"),
        Flag("granularity", str, "what one group of T is (sentence: --sam-where embeddings only)"),
        Flag("asam_eta", float, "added to |w| by the scale weight_abs, >= 0"),
        Flag("max_scale", float, "cap of a gradient-based T, in multiples of its model-wise value, > 0 (inf: no cap)"),
    ),
    "mask": (
        Flag("mask", str, "perturb all weights, those with most Fisher information, or random tensors"),
        Flag(
            "sparsity",
            float,
            "share of weights (fisher) or tensors (random; 1 - beta) that is not perturbed, in [0, 1)",
        ),
        Flag("mask_interval", int, "updates between refreshes of the Fisher mask, >= 1"),
        Flag("fisher_samples", int, "instances that the Fisher mask is made from, >= 1"),
        Flag("exclude", str, "regular expression: parameters with a matching name are trained but not perturbed"),
    ),
    "descent gradient": (
        Flag(
            "descent",
            str,
            "gradient of the update: at the last point, mean of all K + 1, mean of the first K, GSAM's "
            "decomposition, or the last on the instances whose loss rose most (ESAM)",
        ),
        Flag("gsam_alpha", float, "weight of the component that gsam subtracts, >= 0"),
        Flag("esam_gamma", float, "share of the instances that sds keeps, in (0, 1]"),
    ),
    "where": (
        Flag("where", str, "perturb weights, or outputs of the word embeddings"),
        Flag(
            "rounding",
            str,
            "half-precision weights at w + a: to nearest, or at random: small perturbations survive on average",
        ),
        Flag("scope", str, "one perturbation for each micro-batch of each worker, or one for the whole update"),
    ),
    "when": (
        Flag("start_epoch", int, "first sharpness-aware epoch, >= 1; plain steps before it"),
        Flag("start_update", int, "number of plain updates before the first sharpness-aware one, >= 0"),
        Flag("end_epoch", int, "last sharpness-aware epoch, >= --sam-start-epoch; plain steps after it"),
        Flag("end_update", int, "number of updates after which steps are plain, > --sam-start-update"),
        Flag("interval", int, "every n-th update is sharpness-aware, >= 1"),
        Flag("between", str, "updates between: plain steps, or with the last sharpness component (LookSAM)"),
        Flag("look_alpha", float, "weight of the reused component, in multiples of the gradient's norm, >= 0"),
    ),
    "log": (
        Flag(
            "gradient_log",
            int,
            "write each parameter's gradient norm every n-th update into gradients.jsonl of --save-dir, >= 1",
        ),
    ),
}
SAM_FLAGS: tuple[Flag, ...] = tuple(flag for flags in FLAGS_BY_AXIS.values() for flag in flags)


@cache
def base_flags(name: str) -> dict[str, tuple[Any, Field[Any]]]:
    """Return type and dataclass field of each flag of a base optimizer, by destination.

    Optimizers with a dataclass give their fields; the legacy ones give what their ``add_args`` adds to a parser.

    Args:
        name: a name in fairseq's optimizer registry.
    """
    config = OPTIMIZER_DATACLASS_REGISTRY.get(name)
    if config is not None:
        return {f.name: (f.type, f) for f in fields(config) if not f.name.startswith("_")}
    parser = ArgumentParser(allow_abbrev=False, add_help=False)
    adder = getattr(OPTIMIZER_REGISTRY[name], "add_args", None)
    if adder is not None:
        adder(parser)
    flags: dict[str, tuple[Any, Field[Any]]] = {}
    for action in parser._actions:
        kind = bool if action.nargs == 0 else action.type if isinstance(action.type, type) else Any
        metadata = {"help": action.help}
        if len(action.option_strings) > 1:
            metadata["argparse_alias"] = action.option_strings[1]
        default = None if action.default is SUPPRESS else action.default
        declared: Any = field(default=default, metadata=metadata)
        flags[action.dest] = (kind, declared)
    return flags


def is_interpolation(default: Any) -> bool:
    """Whether a flag's default is another section's value."""
    return isinstance(default, str) and default.startswith("${")


def _base_fields(bases: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """Union of the bases' flags, each optional: None means the base's own default."""
    owners: dict[str, list[str]] = {}
    for base in bases:
        for name in base_flags(base):
            owners.setdefault(name, []).append(base)
    union = []
    for name, holders in owners.items():
        versions = [base_flags(base)[name] for base in holders]
        kind, first = versions[0]
        if is_interpolation(first.default):
            union.append((name, kind, field(default=first.default)))
            continue
        metadata: dict[str, Any] = {"help": f"[{', '.join(holders)}] {first.metadata.get('help') or ''}".strip()}
        for _, version in versions:
            if "argparse_alias" in version.metadata:
                metadata["argparse_alias"] = version.metadata["argparse_alias"]
        same = all(other == kind for other, _ in versions)
        union.append(
            (name, Optional[kind] if same and kind is not Any else Any, field(default=None, metadata=metadata))
        )
    return union


def config_class(bases: tuple[str, ...]) -> type:
    """Build the dataclass of the presets' flags and those of the base optimizers.

    Args:
        bases: names in fairseq's optimizer registry.
    """
    own: list[tuple[str, Any, Any]] = [
        (f"sam_{name}", kind if kind is Any else Optional[kind], field(default=None, metadata={"help": text}))
        for name, kind, text in SAM_FLAGS
    ]
    base = ("base_optimizer", str, field(default="adam", metadata={"help": f"base optimizer: {', '.join(bases)}"}))
    return make_dataclass(
        "SharpnessAwareConfig",
        [base, *own, *_base_fields(bases)],
        bases=(FairseqDataclass,),
    )


def base_names() -> tuple[str, ...]:
    """Names of the optimizers that a preset can wrap: all that are registered and not ours."""
    return tuple(sorted(name for name in OPTIMIZER_REGISTRY if name not in PRESETS))
