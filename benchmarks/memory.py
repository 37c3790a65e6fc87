#!/usr/bin/env python3
"""Measure the memory of training steps through fairseq's Trainer, beside the base optimizer's.

    python benchmarks/memory.py --models "Transformer, 5M" --tokens 512 4000 --out memory.tsv

Each is made and trained for some steps; what is compared is the most that is allocated at any moment, in copies of the
weights (gradients are as large as one). The card's number is of what lives when the last pass begins.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fairseq.benchmark  # noqa: E402, F401  registers the tasks

from benchmarks.measure import Clock, parser_of, peak_bytes, write_table  # noqa: E402
from benchmarks.models import MODELS, batches, trainer  # noqa: E402
from benchmarks.steps import BASE, METHODS, unwrap  # noqa: E402

STEPS = 6  # LookSAM's period and one more
CHOSEN = {name: flags for name, flags in METHODS.items() if name not in ("interval 5", "before the start")}


def main(arguments: Sequence[str]) -> None:
    """Measure each model, batch and method; write the table after each."""
    parser = parser_of(__doc__, "method", list(CHOSEN))
    parser.add_argument("--flags", default="", help="of fairseq-train, such as --fp16")
    args = parser.parse_args(arguments)
    bases: dict[tuple[str, int], int] = {}

    def measure(name: str, tokens: int, method: str, clock: Clock, cuda: bool) -> dict[str, Any]:
        facts: dict[str, float] = {}
        if (name, tokens) not in bases:
            bases[name, tokens] = peak(name, tokens, f"--optimizer {BASE}", args.flags, cuda, {})
        base = bases[name, tokens]
        own = peak(name, tokens, f"{CHOSEN[method]} --base-optimizer {BASE}", args.flags, cuda, facts)
        return {
            "parameters": facts["parameters"], "base (bytes)": base, "method (bytes)": own,
            "over base": own / base, "copies": (own - base) / facts["bytes"], "card's copies": facts["copies"],
        }  # fmt: skip

    write_table(args, "method", measure)


def peak(name: str, tokens: int, flags: str, extra: str, cuda: bool, facts: dict[str, float]) -> int:
    """Return the most bytes that a training of some steps has allocated.

    Args:
        name: of the model.
        tokens: of a batch.
        flags: of the optimizer.
        extra: further flags.
        cuda: on the GPU.
        facts: are filled with the number of parameters, their bytes and the copies that the method's card tells of.
    """

    def build() -> Callable[[int], Any]:
        made = trainer(MODELS[name], flags, tokens, cpu=not cuda, flags=extra)
        data = batches(MODELS[name], tokens, len(made.task.source_dictionary))
        facts["parameters"] = sum(p.numel() for p in made.model.parameters())
        facts["bytes"] = sum(p.numel() * p.element_size() for p in made.model.parameters())
        optimizer = unwrap(made.optimizer)
        facts["copies"] = 0.0 if optimizer is None else optimizer.method.copies
        return lambda number: made.train_step([data[number % len(data)]])

    return peak_bytes(build, STEPS, cuda)


if __name__ == "__main__":
    main(sys.argv[1:])
