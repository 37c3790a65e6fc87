"""``python -m fairseq_sam``: the methods, a method's settings, the folder for ``--user-dir``, analyses of models."""

import argparse
import importlib
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fairseq_sam._version import __version__
from fairseq_sam.core.guidance import WHEN_TO_USE
from fairseq_sam.core.method import PRESETS, SUMMARIES, Method

PATH = "path"


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


def own_settings(name: str) -> dict[str, str]:
    """Return the flags of a preset's row with their values: those that differ from SAM's, and those that scale it.

    Args:
        name: the preset.
    """
    method, plain = PRESETS[name], PRESETS["sam"]
    flags = {}
    for field in fields(Method):
        value = getattr(method, field.name)
        if field.name != "name" and (field.name in ("epsilon", "norm", "steps") or value != getattr(plain, field.name)):
            shown = "linf" if value == math.inf else "l2" if field.name == "norm" and value == 2 else value
            flags[f"--sam-{field.name.replace('_', '-')}"] = str(shown)
    return flags


def settings(name: str) -> str:
    """Return what a preset is, what it costs, what it is for, and its row.

    Args:
        name: the preset.
    """
    lines = [
        f"{name}: {SUMMARIES[name]}",
        f"passes {cost(PRESETS[name])}, copies of the weights {PRESETS[name].copies:g}",
        f"when to use it: {WHEN_TO_USE[name]}",
        "",
    ]
    return "\n".join(lines + [f"  {flag} {value}" for flag, value in own_settings(name).items()])


COMMANDS = {
    "robustness": "loss and scores after adversarial corruptions of the weights",
    "spectrum": "eigenvalues of Hessian and Fisher information, trace, density",
    "sharpness": "rise of the loss along the worst, the steepest and random directions, and for each instance",
    "landscape": "the loss on a line between two checkpoints, or on a plane",
    "gradients": "gradient norms by epoch and layer, from the log of --sam-gradient-log",
    "transfer": "fine-tuned encoders on tasks that they were not trained on",
    "theory": "GA-SAM's analytic trials on MNIST",
    "epsilon": "the radius at which a method raises the loss by a wanted fraction",
}


def with_closed_streams() -> None:
    """Let what is written go nowhere where the shell has closed standard output or error (``2>&-``)."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, or print the methods, the settings of one, or the folder for ``--user-dir``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # a scheduler that ends a job stops it as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with_closed_streams()
    if words and words[0] in COMMANDS:
        try:
            from fairseq_sam.commands import common

            common.quiet()
            module = importlib.import_module(f"fairseq_sam.commands.{words[0]}")
            return common.run(module.main, words[1:])
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
    commands = "\n".join(f"  {name:<11}{text}" for name, text in COMMANDS.items())
    path = f"  {PATH:<11}print the folder of the installed plugin, for --user-dir"
    parser = argparse.ArgumentParser(
        prog="fairseq-sam",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="List the methods: forward-backward passes of an update, copies of the weights held in the last\n"
        "pass beside model, gradient and base optimizer. Train with:\n"
        'fairseq-train ... --user-dir "$(fairseq-sam path)" --optimizer METHOD',
        epilog=f"{path}\n\nanalyses of trained models, each with --help:\n{commands}",
    )
    parser.add_argument("method", nargs="?", metavar="METHOD or COMMAND", help="show a method's settings, or run it")
    parser.add_argument("--version", action="version", version=f"fairseq_sam {__version__}")
    known, others = parser.parse_known_args(words)
    chosen = known.method
    if chosen is not None and chosen not in (*PRESETS, PATH):
        allowed = f"a method ({', '.join(PRESETS)}) or a command ({', '.join((PATH, *COMMANDS))})"
        parser.error(f"expected {allowed}, got {chosen!r}")
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    print(Path(__file__).resolve().parent if chosen == PATH else settings(chosen) if chosen else table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
