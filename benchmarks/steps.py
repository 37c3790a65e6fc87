#!/usr/bin/env python3
"""Time whole training steps through fairseq's Trainer, against the passes that they are made of.

    python benchmarks/steps.py --models "LSTM, 5M" "Transformer, 60M" --tokens 512 4000 --out steps.tsv

In one process, on the same batches, in turn and each time another one first: a forward-backward pass, a step of the
base optimizer, a step of the method, for delta-SAM a forward pass and a step of SAM. A method's floor is a step of the
base optimizer and its further passes, of the same round; what is written is the median over the rounds of a method's
time over its floor, over the base optimizer's step and over SAM's. "error" is the standard error of the first of them.
"beside" is how much longer a step is outside its passes and the update of the weights than the base optimizer's, as a
share of the step. "refresh" is what making the Fisher mask costs, as a share of the steps for which it is kept. Before
the rounds each is run twice, unmeasured, or until the mask is made.
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fairseq.benchmark  # noqa: E402, F401  registers the tasks
import torch  # noqa: E402

from benchmarks.measure import (  # noqa: E402
    WARM_UPS,
    Clock,
    error_of,
    parser_of,
    ratio,
    rounds_of,
    seconds_inside,
    write_table,
)
from benchmarks.models import MODELS, batches, quiet, sentences, trainer  # noqa: E402
from fairseq_sam.adapter.optimizers import unwrap  # noqa: E402
from fairseq_sam.commands.common import Progress  # noqa: E402

BASE = "adam"
METHODS = {
    "sam": "--optimizer sam",
    "asam": "--optimizer asam",
    "ga_sam": "--optimizer ga_sam --sam-norm linf --sam-epsilon 1e-4",
    "multistep_defense": "--optimizer multistep_defense",
    "gsam": "--optimizer gsam --sam-epsilon-min 0.01 --sam-lr-max 1e-3",
    "delta_sam": "--optimizer delta_sam",
    "fisher_sam": "--optimizer fisher_sam",
    "efficient_sam": "--optimizer efficient_sam",
    "interval 5": "--optimizer sam --sam-interval 5",
    "look_sam": "--optimizer look_sam",
    "before the start": "--optimizer sam --sam-start-epoch 1000",
}


class Round(NamedTuple):
    """Seconds of one round.

    Attributes:
        one: a forward-backward pass.
        base: a step of the base optimizer.
        step: a step of the method.
        floor: the method's passes and one update of the base optimizer.
        beside: outside passes and update, in the method's step.
        beside_base: outside passes and update, in the base optimizer's step.
        passes: passes of the step.
        forwards: its further forward passes.
        sam: a step of SAM; 0 where it is not run.
    """

    one: float
    base: float
    step: float
    floor: float
    beside: float
    beside_base: float
    passes: float
    forwards: float
    sam: float


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


def measured(name: str, tokens: int, method: str, args: Any, clock: Clock, cuda: bool) -> dict[str, Any]:
    """Time the steps of a method beside the base optimizer's; return the columns of the table."""
    model = MODELS[name]
    base = trainer(model, f"--optimizer {BASE}", tokens, cpu=not cuda, flags=args.flags)
    ours = trainer(model, f"{method} --base-optimizer {BASE}", tokens, cpu=not cuda, flags=args.flags)
    data = batches(model, tokens, len(base.task.source_dictionary))
    settings = unwrap(ours.optimizer).method
    refreshes = collecting_updates(ours, sentences(model, tokens))
    warm_ups = WARM_UPS + refreshes
    sam = trainer(model, f"{METHODS['sam']} --base-optimizer {BASE}", tokens, cpu=not cuda, flags=args.flags) if (
        settings.forwards
    ) else None  # fmt: skip
    progress, rounds, refresh = Progress(f"{name}, {tokens} tokens, {method}"), [], 0.0
    for number, is_warm_up in rounds_of(args.rounds, args.limit, warm_ups, settings.interval):
        passes, forwards = passes_of(ours)
        found = one_round(number, data[number % len(data)], clock, base, ours, sam)
        floor = found["base"][0] + (passes - 1) * found["one"][0] + forwards * found["forward"][0]
        step, beside = found["step"]
        if not is_warm_up:
            counts = {"passes": passes, "forwards": forwards}
            times = {"one": found["one"][0], "base": found["base"][0], "sam": found["sam"][0]}
            rounds.append(Round(**times, **counts, step=step, floor=floor, beside=beside, beside_base=found["base"][1]))
        elif number < refreshes:
            refresh += step - floor
        progress(number + 1, args.rounds + warm_ups)
    is_even = len({(each.passes, each.forwards) for each in rounds}) == 1  # else some updates are sharpness-aware
    average: Callable[[list[float]], float] = statistics.median if is_even else statistics.fmean
    step = average([each.step for each in rounds])
    return {
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "tensors": sum(1 for _ in base.model.parameters()),
        "passes": statistics.fmean(each.passes for each in rounds),
        "forwards": statistics.fmean(each.forwards for each in rounds),
        "pass (s)": average([each.one for each in rounds]),
        "base (s)": average([each.base for each in rounds]),
        "step (s)": step,
        "over base": ratio([(each.step, each.base) for each in rounds], is_even),
        "over floor": ratio([(each.step, each.floor) for each in rounds], is_even),
        "error": error_of([each.step / each.floor for each in rounds]) if is_even else "",
        "over SAM": ratio([(each.step, each.sam) for each in rounds]) if sam is not None else "",
        "beside": "" if cuda else ratio([(each.beside - each.beside_base, each.step) for each in rounds], is_even),
        "refresh": refresh / (step * settings.mask_interval) if refreshes else "",
        "rounds": len(rounds),
    }


def one_round(number: int, sample: Any, clock: Clock, base: Any, ours: Any, sam: Any) -> dict[str, tuple[float, float]]:
    """Run each piece of work once; return its seconds, and those beside passes and update where it is a step.

    Args:
        number: of the round, which says what comes first.
        sample: a batch.
        clock: what counts the seconds.
        base: trainer of the base optimizer.
        ours: trainer of the method.
        sam: trainer of SAM, where forward passes and SAM's steps are measured too; else None.
    """
    works: dict[str, Callable[[], tuple[float, float]]] = {
        "one": lambda: (clock(lambda: forward_backward(base, sample)), 0.0),
        "base": lambda: step_of(base, sample, clock),
        "step": lambda: step_of(ours, sample, clock),
    }
    if sam is not None:
        works["forward"] = lambda: (clock(lambda: forward_only(base, sample)), 0.0)
        works["sam"] = lambda: step_of(sam, sample, clock)
    names = list(works)
    first = number % len(names)
    with quiet():
        found = {name: works[name]() for name in names[first:] + names[:first]}
    return {"forward": (0.0, 0.0), "sam": (0.0, 0.0), **found}


def step_of(made: Any, sample: Any, clock: Clock) -> tuple[float, float]:
    """Run a training step; return its seconds, and those outside its passes and the update (0 on a GPU)."""
    if clock.now is None:
        return clock(lambda: made.train_step([sample])), 0.0
    optimizer = unwrap(made.optimizer)
    base = made.optimizer if optimizer is None else optimizer.base
    places = (type(made.task), "train_step"), (type(made.criterion), "forward"), (base.optimizer, "step")
    with seconds_inside(clock.now, *places) as inside:
        step = clock(lambda: made.train_step([sample]))
    return step, step - inside[0]


def collecting_updates(made: Any, size: int) -> int:
    """In how many updates the Fisher mask is made, from batches of a size."""
    optimizer = unwrap(made.optimizer)
    assert optimizer is not None, "it is one of ours"
    return math.ceil(optimizer.method.fisher_samples / size) if optimizer.method.mask == "fisher" else 0


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


if __name__ == "__main__":
    main(sys.argv[1:])
