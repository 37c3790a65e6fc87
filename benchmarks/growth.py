#!/usr/bin/env python3
"""Measure how the cost of a sharpness-aware step grows: with parameters, batch, ascent steps, tensors and workers.

    python benchmarks/growth.py --cpu --out growth.tsv

Each axis has a table of its own rows: what is varied, the seconds that are measured, and beside the last row of an axis
the fitted slope next to the expected one. Slopes are those of logarithms (1 is proportional, 0 does not depend), for K
that of passes per step by K. What "own" seconds are: a step less its passes and its update of the weights, which are
timed inside it. "passes" are synthetic where the number of tensors is varied: gradients are written, not computed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fairseq.benchmark  # noqa: E402, F401  registers the tasks
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.measure import WARM_UPS, Clock, rounds_of, seconds_inside  # noqa: E402
from benchmarks.models import MODELS, batches, quiet, trainer  # noqa: E402
from benchmarks.slopes import AXES  # noqa: E402
from benchmarks.steps import BASE, METHODS, step_of  # noqa: E402
from benchmarks.workers import seconds_of_workers  # noqa: E402
from fairseq_sam import SharpnessAware  # noqa: E402
from fairseq_sam.analysis.tables import read_rows, write_rows  # noqa: E402
from fairseq_sam.commands.common import Progress  # noqa: E402

SIZES = [
    "Transformer, 1M",
    "Transformer, 5M",
    "Transformer, 20M",
    "Transformer, 60M",
    "Transformer, 200M",
    "BART, 400M",
]
TOKENS = [128, 256, 512, 1024, 2048, 4096]
STEPS = [1, 2, 3, 4]
TENSORS = [16, 64, 256, 1024, 4096]
WORKERS = [1, 2]
NUMBERS = 4 * 2**20  # parameters where their tensors are varied


def main(arguments: Sequence[str]) -> None:
    """Measure each axis; write the table after each row."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    made.add_argument("--models", nargs="+", choices=SIZES, default=SIZES, metavar="MODEL", help="of `parameters`")
    made.add_argument("--rounds", type=int, default=10, help="default %(default)s")
    made.add_argument("--limit", type=float, default=120.0, help="seconds for a row's rounds; default %(default)s")
    made.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    made.add_argument("--out", type=Path, required=True, help="the table; what it has already is not measured again")
    args = made.parse_args(arguments)
    cuda = torch.cuda.is_available() and not args.cpu
    rows: list[dict[str, Any]] = list(read_rows(args.out))
    for axis in args.axes:
        for value, measure in settings(axis, args, cuda):
            own = {"axis": axis, "value": value}
            if any(all(row[key] == str(each) for key, each in own.items()) for row in rows):
                continue
            rows.append({**own, **measure()})
            write_rows(args.out, rows)
    print(f"written: {args.out}")


def settings(axis: str, args: argparse.Namespace, cuda: bool) -> Iterator[tuple[Any, Callable[[], dict[str, Any]]]]:
    """Return each value of an axis, and what measures it."""
    clock = Clock("cuda" if cuda else "cpu")

    def on_model(name: str, tokens: int, flags: str) -> Callable[[], dict[str, Any]]:
        return lambda: of_model(name, tokens, flags, args, clock, cuda)

    if axis == "parameters":
        yield from ((name, on_model(name, 512, METHODS["sam"])) for name in args.models)
    elif axis == "tokens":
        yield from ((tokens, on_model("Transformer, 5M", tokens, METHODS["sam"])) for tokens in TOKENS)
    elif axis == "K":
        flags = "--optimizer multistep_defense --sam-norm l2 --sam-epsilon 0.01 --sam-steps"
        yield from ((k, on_model("Transformer, 5M", 512, f"{flags} {k}")) for k in STEPS)
    elif axis == "tensors":
        yield from ((number, lambda number=number: of_tensors(number, args, clock, cuda)) for number in TENSORS)
    else:
        yield from ((number, lambda number=number: of_workers(number, args, cuda)) for number in WORKERS)


def of_model(name: str, tokens: int, flags: str, args: Any, clock: Clock, cuda: bool) -> dict[str, Any]:
    """Time steps of a method on a model."""
    base = trainer(MODELS[name], f"--optimizer {BASE}", tokens, cpu=not cuda)
    ours = trainer(MODELS[name], f"{flags} --base-optimizer {BASE}", tokens, cpu=not cuda)
    data = batches(MODELS[name], tokens, len(base.task.source_dictionary))
    progress, found = Progress(f"{name}, {tokens} tokens, {flags}"), []
    for number, is_warm_up in rounds_of(args.rounds, args.limit):
        sample = data[number % len(data)]
        with quiet():
            plain, beside_base = step_of(base, sample, clock)
            step, beside = step_of(ours, sample, clock)
        if not is_warm_up:
            found.append((plain, step, beside - beside_base, plain - beside_base))
        progress(number + 1, args.rounds + WARM_UPS)
    plain, step, own, one = (statistics.median(column) for column in zip(*found, strict=True))
    return {
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "base (s)": plain, "step (s)": step, "own (s)": "" if cuda else own, "over base": step / plain,
        "step over pass": step / one, "rounds": len(found),
    }  # fmt: skip


def of_tensors(number: int, args: Any, clock: Clock, cuda: bool) -> dict[str, Any]:
    """Time what a step does beside its passes, for as many weights in more tensors."""
    device = "cuda" if cuda else "cpu"
    model = nn.ParameterList(torch.randn(NUMBERS // number, device=device) for _ in range(number))
    gradients = [torch.randn_like(p) for p in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, foreach=True)
    sam = SharpnessAware(optimizer, nn.ModuleList([model]), "sam")

    def closure() -> float:
        for p, gradient in zip(model, gradients, strict=True):
            p.grad = gradient.clone()
        return 0.0

    passes, found = SimpleNamespace(run=closure), []
    for _, is_warm_up in rounds_of(args.rounds, args.limit):
        if clock.now is None:
            step = clock(lambda: sam.step(closure))
            own = step - 2 * clock(closure) - clock(optimizer.step)
        else:
            with seconds_inside(clock.now, (optimizer, "step"), (passes, "run")) as inside:
                step = clock(lambda: sam.step(passes.run))
            own = step - inside[0]
        if not is_warm_up:
            found.append((step, own))
    step, own = (statistics.median(column) for column in zip(*found, strict=True))
    return {"parameters": NUMBERS, "step (s)": step, "own (s)": own, "rounds": len(found)}


def of_workers(number: int, args: Any, cuda: bool) -> dict[str, Any]:
    """Time steps of several workers, each with a batch of its own."""
    plain, step = seconds_of_workers(number, args.rounds, cuda, f"--optimizer {BASE}", METHODS["sam"])
    return {"base (s)": plain, "step (s)": step, "over base": step / plain, "rounds": args.rounds}


if __name__ == "__main__":
    main(sys.argv[1:])
