#!/usr/bin/env python3
"""Time whole training steps through fairseq's Trainer, against the passes that they are made of.

    python benchmarks/steps.py --models "LSTM, 5M" "Transformer, 60M" --tokens 512 4000 --out steps.tsv

In one process, on the same batches, in turn: a forward-backward pass, a step of the base optimizer, a step of each
method. A method's floor is its passes and one update of the base optimizer, of the same round; what is written is the
median over the rounds of a method's time over its floor, and over the base optimizer's step. Before the rounds each is
run twice, unmeasured.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fairseq.benchmark  # noqa: E402, F401  registers the tasks
import torch  # noqa: E402

from benchmarks.models import MODELS, batches, quiet, trainer  # noqa: E402
from fairseq_sam.adapter.optimizers import unwrap  # noqa: E402
from fairseq_sam.analysis.tables import write_rows  # noqa: E402
from fairseq_sam.commands.common import Progress  # noqa: E402

WARM_UPS = 2
BASE = "adam"
METHODS = {
    "sam": "--optimizer sam",
    "asam": "--optimizer asam",
    "ga_sam": "--optimizer ga_sam --sam-norm linf --sam-epsilon 1e-4",
    "gsam": "--optimizer gsam --sam-epsilon-min 0.01 --sam-lr-max 1e-3",
    "delta_sam": "--optimizer delta_sam",
    "fisher_sam": "--optimizer fisher_sam",
    "efficient_sam": "--optimizer efficient_sam",
    "interval 5": "--optimizer sam --sam-interval 5",
    "look_sam": "--optimizer look_sam",
    "before the start": "--optimizer sam --sam-start-epoch 1000",
}


class Clock:
    """Seconds that work takes: wall-clock time, on a GPU that of its stream, or the processor's time.

    Args:
        device: ``cuda``, ``cpu`` or ``process``.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(self, work: Callable[[], Any]) -> float:
        """Run work and return its seconds."""
        if self._device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end)) / 1000
        now = time.process_time if self._device == "process" else time.perf_counter
        start = now()
        work()
        return now() - start


class Round(NamedTuple):
    """Seconds of one round.

    Attributes:
        one: a forward-backward pass.
        base: a step of the base optimizer.
        step: a step of the method.
        floor: the method's passes and one update of the base optimizer.
        passes: passes of the step.
        forwards: its further forward passes.
    """

    one: float
    base: float
    step: float
    floor: float
    passes: float
    forwards: float


def main(arguments: Sequence[str]) -> None:
    """Time each model, batch and method; write the table after each."""
    parser = parser_of(__doc__, "method", list(METHODS))
    parser.add_argument("--flags", default="", help="of fairseq-train, such as --fp16")
    args = parser.parse_args(arguments)
    write_table(
        args,
        "method",
        lambda name, tokens, method, clock, cuda: measured(name, tokens, METHODS[method], args, clock, cuda),
    )


def parser_of(description: str | None, kind: str, choices: list[str]) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes.

    Args:
        description: of the benchmark.
        kind: of what is timed on each model and batch.
        choices: which there are.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    made.add_argument("--tokens", nargs="+", type=int, default=[512, 4000], help="of a batch; default 512 4000")
    made.add_argument(f"--{kind}s", nargs="+", choices=choices, default=choices, metavar=kind.upper())
    made.add_argument("--rounds", type=int, default=10, help="default %(default)s")
    made.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    made.add_argument("--process-time", action="store_true", help="the processor's time, where other work runs")
    made.add_argument("--out", type=Path, required=True, help="the table")
    return made


def write_table(args: argparse.Namespace, kind: str, measure: Callable[..., dict[str, Any]]) -> None:
    """Measure each model, batch and choice; write the table after each.

    Args:
        args: of ``parser_of``.
        kind: of the choices.
        measure: from a model's name, tokens, a choice, the clock and whether it is on a GPU, columns of the table.
    """
    cuda = torch.cuda.is_available() and not args.cpu
    clock = Clock("cuda" if cuda else "process" if args.process_time else "cpu")
    rows: list[dict[str, Any]] = []
    for name, tokens, chosen in itertools.product(args.models, args.tokens, getattr(args, f"{kind}s")):
        own = {"model": name, "tokens": tokens, kind: chosen, "device": "GPU" if cuda else "CPU"}
        rows.append({**own, **measure(name, tokens, chosen, clock, cuda)})
        write_rows(args.out, rows)
    print(f"written: {args.out}")


def measured(name: str, tokens: int, method: str, args: argparse.Namespace, clock: Clock, cuda: bool) -> dict[str, Any]:
    """Time the steps of a method beside the base optimizer's; return the columns of the table."""
    model = MODELS[name]
    base = trainer(model, f"--optimizer {BASE}", tokens, cpu=not cuda, flags=args.flags)
    ours = trainer(model, f"{method} --base-optimizer {BASE}", tokens, cpu=not cuda, flags=args.flags)
    data = batches(model, tokens, len(base.task.source_dictionary))
    progress, rounds = Progress(f"{name}, {tokens} tokens, {method}"), []
    for number in range(args.rounds + WARM_UPS):
        sample = data[number % len(data)]
        passes, forwards = passes_of(ours)
        with quiet():
            one = clock(lambda sample=sample: forward_backward(base, sample))
            forward = clock(lambda sample=sample: forward_only(base, sample)) if forwards else 0.0
            plain = clock(lambda sample=sample: base.train_step([sample]))
            step = clock(lambda sample=sample: ours.train_step([sample]))
        rounds.append(Round(one, plain, step, plain + (passes - 1) * one + forwards * forward, passes, forwards))
        progress(number + 1, args.rounds + WARM_UPS)
    kept = rounds[WARM_UPS:]
    is_even = len({(each.passes, each.forwards) for each in kept}) == 1  # else some updates are sharpness-aware
    average = statistics.median if is_even else statistics.fmean
    found = {
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "tensors": sum(1 for _ in base.model.parameters()),
        "passes": statistics.fmean(each.passes for each in kept),
        "forwards": statistics.fmean(each.forwards for each in kept),
        "pass (s)": average([each.one for each in kept]),
        "base (s)": average([each.base for each in kept]),
        "step (s)": average([each.step for each in kept]),
        "over base": ratio([(each.step, each.base) for each in kept], is_even),
        "over floor": ratio([(each.step, each.floor) for each in kept], is_even),
        "rounds": len(kept),
    }
    gc.collect()
    return found


def forward_backward(made: Any, sample: Any) -> None:
    """Run one pass as a training step does."""
    made.model.train()
    made.zero_grad()
    prepared, is_dummy = made._prepare_sample(sample)
    made.task.train_step(prepared, made.model, made.criterion, made.optimizer, made.get_num_updates(), is_dummy)


def forward_only(made: Any, sample: Any) -> None:
    """Run the forward half of a pass."""
    made.model.train()
    prepared, _ = made._prepare_sample(sample)
    with torch.no_grad():
        made.criterion(made.model, prepared)


def passes_of(made: Any) -> tuple[float, float]:
    """Passes and further forward passes of the trainer's next step."""
    optimizer = unwrap(made.optimizer)
    assert optimizer is not None, "it is one of ours"
    method = optimizer.method
    if not method.is_active(optimizer.epoch, made.get_num_updates()):
        return 1.0, 0.0
    return method.passes, method.forwards


def ratio(pairs: Sequence[tuple[float, float]], is_even: bool) -> float:
    """Return the median of the rounds' ratios, or that of the sums where rounds do different work."""
    if is_even:
        return statistics.median(first / second for first, second in pairs)
    return sum(first for first, _ in pairs) / sum(second for _, second in pairs)


if __name__ == "__main__":
    main(sys.argv[1:])
