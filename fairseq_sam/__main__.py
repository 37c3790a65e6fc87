"""``python -m fairseq_sam``: the methods, what each costs, and a method's settings."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import fields

from fairseq_sam.core.method import PRESETS, SUMMARIES, Method


def cost(method: Method) -> str:
    """Say what an update costs, in forward-backward passes and in further forward passes.

    Args:
        method: the method.
    """
    text = f"{method.passes:g}"
    if method.forwards:
        text += f" + {method.forwards:g} forward"
    if method.interval > 1:
        average = (method.passes + method.interval - 1) / method.interval
        text += f" in 1 of {method.interval} updates, else 1 (mean {average:g})"
    if method.mask == "fisher":
        text += f" + {method.fisher_samples:g} instances every {method.mask_interval:g} updates"
    return text


def table() -> str:
    """Return the list of methods: name, passes for an update, copies of the weights, one line."""
    rows = [("method", "passes", "copies", "")]
    rows += [(name, cost(method), f"{method.copies:g}", SUMMARIES[name]) for name, method in PRESETS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    note = "passes: forward and backward in one update; copies: of the weights, beside model, gradient, base optimizer"
    lines = ["  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), "", note])


def settings(name: str) -> str:
    """Return a preset's row: each flag that differs from SAM's, and those that scale the method.

    Args:
        name: the preset.
    """
    method, plain = PRESETS[name], PRESETS["sam"]
    lines = [f"{name}: {SUMMARIES[name]}", f"passes {cost(method)}, copies of the weights {method.copies:g}", ""]
    for field in fields(Method):
        value = getattr(method, field.name)
        if field.name != "name" and (field.name in ("epsilon", "norm", "steps") or value != getattr(plain, field.name)):
            shown = "linf" if value == math.inf else "l2" if field.name == "norm" and value == 2 else value
            lines.append(f"  --sam-{field.name.replace('_', '-')} {shown}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the methods, or the settings of one."""
    parser = argparse.ArgumentParser(
        prog="fairseq-sam",
        description="List the methods: forward-backward passes of an update, copies of the weights held in the last "
        "pass beside model, gradient and base optimizer. Train with: fairseq-train ... --user-dir fairseq_sam "
        "--optimizer METHOD",
    )
    parser.add_argument("method", nargs="?", choices=list(PRESETS), metavar="METHOD", help="show its settings")
    chosen = parser.parse_args(arguments).method
    print(settings(chosen) if chosen else table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
