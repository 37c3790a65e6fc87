"""``fairseq-train --user-dir fairseq_sam --help`` lists the methods and their flags by axis."""

import argparse
import functools
from dataclasses import fields
from typing import Any

from fairseq import options

from fairseq_sam.adapter.flags import FLAGS_BY_AXIS, Flag
from fairseq_sam.adapter.regularizers import PREDICTIONS
from fairseq_sam.core.axes import CHOICES
from fairseq_sam.core.method import PRESETS, SUMMARIES
from fairseq_sam.core.regularizers import REGULARIZERS


def flags_help() -> str:
    """Return the help text of our methods: ``--optimizer`` names, and flags grouped by axis."""
    parser = argparse.ArgumentParser(prog="fairseq-train", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    methods = parser.add_argument_group("sharpness-aware methods, --optimizer NAME")
    for name in PRESETS:
        methods.add_argument(f"--optimizer {name}", action="store_true", help=_literal(SUMMARIES[name]))
    shared = parser.add_argument_group("what every sharpness-aware method takes")
    text = "base optimizer, with its own flags and defaults (default: adam)"
    shared.add_argument("--base-optimizer", metavar="NAME", help=text)
    for axis, flags in FLAGS_BY_AXIS.items():
        group = parser.add_argument_group(f"sharpness-aware: {axis} (default: the method's value)")
        for flag in flags:
            group.add_argument(f"--sam-{flag.name.replace('_', '-')}", metavar=_metavar(flag), help=_literal(flag.help))
    criteria = parser.add_argument_group(
        "regularised criteria, --criterion BASE_SUFFIX; bases: " + ", ".join(PREDICTIONS)
    )
    for name, regularizer in REGULARIZERS.items():
        text = f"the base criterion with {regularizer.__name__}"
        criteria.add_argument(f"--criterion BASE_{name}", action="store_true", help=text)
        for field in fields(regularizer):
            flag_name, text = (
                f"--{field.name.replace('_', '-')}",
                f"{field.metadata['help']} (default: {field.default})",
            )
            criteria.add_argument(flag_name, metavar="VALUE" if field.metadata["choices"] else "X", help=_literal(text))
    return parser.format_help()


def show_flags_in_help() -> None:
    """Let fairseq's training parser end its help with our flags, once.

    fairseq adds an optimizer's flags only after its parser has seen ``--help``, so they would never be shown.
    """
    original = options.add_optimization_args
    if getattr(original, "shows_sharpness_aware_flags", False):
        return

    @functools.wraps(original)
    def add_optimization_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        plain_help = parser.format_help
        parser.format_help = lambda: f"{plain_help()}\n{flags_help()}"  # type: ignore[method-assign]
        return original(parser, *args, **kwargs)

    add_optimization_args.shows_sharpness_aware_flags = True  # type: ignore[attr-defined]
    options.add_optimization_args = add_optimization_args


def _metavar(flag: Flag) -> str:
    if flag.name in CHOICES:
        return "{" + ",".join(CHOICES[flag.name]) + "}"
    return {int: "N", float: "X", str: "VALUE"}.get(flag.type, "X")


def _literal(text: str) -> str:
    return text.replace("%", "%%")
