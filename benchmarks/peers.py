#!/usr/bin/env python3
"""Time a step of this engine beside those of other implementations, on the same model and batches.

    python benchmarks/peers.py --models "Transformer, 5M" --tokens 512 4000 --out peers.tsv

All run in plain PyTorch with torch's Adam: pytorch_optimizer's SAM, GSAM and LookSAM, and the usual two-step loop. Each
has a model of its own with the same weights; in every round the two of a pair run one after the other, in turn. What is
written is the median over the rounds of the peer's time over this engine's, and by how much the most memory that is
allocated at any moment is above that of torch's Adam alone, in copies of the weights.
"""

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fairseq.benchmark  # noqa: E402, F401  registers the tasks
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.measure import (  # noqa: E402
    WARM_UPS,
    Clock,
    parser_of,
    peak_bytes,
    ratio,
    rounds_of,
    write_table,
)
from benchmarks.models import MODELS, batches, trainer  # noqa: E402
from fairseq_sam import SharpnessAware  # noqa: E402
from fairseq_sam.commands.common import Progress  # noqa: E402

Closure = Callable[[], Tensor]
Step = Callable[[Closure], Any]
RADIUS, RATE = 0.05, 1e-4
INTERVAL = 5  # of LookSAM
STEPS = INTERVAL + 1  # in which memory is measured


# -- peers: from a model, what takes a closure, which runs forward and backward and returns the loss -------------------


def ours(method: str, **options: Any) -> Callable[[nn.Module], Step]:
    """This engine."""

    def build(model: nn.Module) -> Step:
        adam = torch.optim.Adam(model.parameters(), lr=RATE)
        return SharpnessAware(adam, model, method, epsilon=RADIUS, **options).step

    return build


def plain(model: nn.Module) -> Step:
    """No sharpness-aware step."""
    adam = torch.optim.Adam(model.parameters(), lr=RATE)

    def step(closure: Closure) -> None:
        adam.zero_grad()
        closure()
        adam.step()

    return step


def two_step_loop(model: nn.Module) -> Step:
    """SAM as it is usually written: for each tensor the weights are stored, moved and put back."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=RATE)

    def step(closure: Closure) -> None:
        adam.zero_grad()
        closure()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm(p=2) for p in parameters if p.grad is not None]).norm(p=2)
            stored = {}
            for p in parameters:
                if p.grad is not None:
                    stored[p] = p.data.clone()
                    p.add_(p.grad * (RADIUS / (norm + 1e-12)))
        adam.zero_grad()
        closure()
        with torch.no_grad():
            for p, weight in stored.items():
                p.data = weight
        adam.step()

    return step


def packaged(name: str, interval: int = 1, **options: Any) -> Callable[[nn.Module], Step]:
    """SAM or LookSAM of pytorch_optimizer.

    Args:
        name: which.
        interval: steps from one first pass to the next. LookSAM's documentation has one in every step, and throws away
            those between.
        options: of the optimizer.
    """

    def build(model: nn.Module) -> Step:
        import pytorch_optimizer

        kind = getattr(pytorch_optimizer, name)
        optimizer = kind(model.parameters(), base_optimizer=torch.optim.Adam, rho=RADIUS, lr=RATE, **options)

        def again(closure: Closure) -> Tensor:
            optimizer.zero_grad()
            return closure()

        def step(closure: Closure) -> None:
            if interval == 1 or optimizer.get_step() % interval == 0:
                again(closure)
            optimizer.step(lambda: again(closure))

        return step

    return build


def packaged_gsam(model: nn.Module) -> Step:
    """GSAM of pytorch_optimizer."""
    import pytorch_optimizer

    adam = torch.optim.Adam(model.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.ConstantLR(adam, factor=1.0)
    radii = pytorch_optimizer.ProportionScheduler(rates, max_lr=RATE, min_lr=0.0, max_value=RADIUS, min_value=RADIUS)
    optimizer = pytorch_optimizer.GSAM(
        model.parameters(), base_optimizer=adam, model=model, rho_scheduler=radii, alpha=0.4
    )
    optimizer.update_rho_t()

    def step(closure: Closure) -> None:
        def both() -> tuple[None, Tensor]:
            adam.zero_grad()
            with torch.enable_grad():
                return None, closure()

        optimizer.step(both)

    return step


# Name, peer, this engine's counterpart.
PAIRS: dict[str, tuple[Callable[[nn.Module], Step], Callable[[nn.Module], Step]]] = {
    "two-step loop": (two_step_loop, ours("sam")),
    "pytorch_optimizer SAM": (packaged("SAM"), ours("sam")),
    "pytorch_optimizer GSAM": (packaged_gsam, ours("gsam", gsam_alpha=0.4, epsilon_min=RADIUS, lr_max=RATE)),
    "pytorch_optimizer LookSAM": (packaged("LookSAM", k=INTERVAL), ours("look_sam")),
    "pytorch_optimizer LookSAM, frugal": (packaged("LookSAM", INTERVAL, k=INTERVAL), ours("look_sam")),
}


def main(arguments: Sequence[str]) -> None:
    """Time each pair on each model and batch; write the table after each."""
    args = parser_of(__doc__, "peer", list(PAIRS)).parse_args(arguments)
    write_table(args, "peer", lambda name, tokens, peer, clock, cuda: compared(name, tokens, peer, args, clock, cuda))


def compared(name: str, tokens: int, peer: str, args: Any, clock: Clock, cuda: bool) -> dict[str, Any]:
    """Time the two steps of a pair; return the columns of the table."""
    peaks = []
    for build in (plain, *PAIRS[peer]):
        peaks.append(peak_bytes(functools.partial(Side, name, tokens, build, cuda), STEPS, cuda))
    sides = [Side(name, tokens, build, cuda) for build in PAIRS[peer]]
    weights = sides[0].weight_bytes
    progress, times = Progress(f"{name}, {tokens} tokens, {peer}"), []
    is_even = "Look" not in peer  # else steps differ, and the sums of whole intervals are compared
    for number, is_warm_up in rounds_of(args.rounds, args.limit, cycle=1 if is_even else INTERVAL):
        order = (0, 1) if number % 2 else (1, 0)
        found = {place: clock(lambda place=place, number=number: sides[place](number)) for place in order}
        if not is_warm_up:
            times.append((found[0], found[1]))
        progress(number + 1, args.rounds + WARM_UPS)
    return {
        "peer (s)": statistics.fmean(a for a, _ in times),
        "ours (s)": statistics.fmean(b for _, b in times),
        "peer over ours": ratio(times, is_even),
        "peer copies": (peaks[1] - peaks[0]) / weights,
        "our copies": (peaks[2] - peaks[0]) / weights,
        "rounds": len(times),
    }


class Side:
    """A model with the steps of one implementation."""

    def __init__(self, name: str, tokens: int, build: Callable[[nn.Module], Step], cuda: bool) -> None:
        model = MODELS[name]
        self._trainer = trainer(model, "--optimizer adam", tokens, cpu=not cuda)
        self._data = batches(model, tokens, len(self._trainer.task.source_dictionary))
        self._model: nn.Module = self._trainer.model
        self._step = build(self._model)

    def __call__(self, number: int) -> None:
        """Run step `number`."""
        sample, _ = self._trainer._prepare_sample(self._data[number % len(self._data)])
        self._model.train()
        self._step(lambda: self._closure(sample))

    def _closure(self, sample: Any) -> Tensor:
        loss, size, _ = self._trainer.criterion(self._model, sample)
        (loss / size).backward()
        return loss.detach() / size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())


if __name__ == "__main__":
    main(sys.argv[1:])
