"""What the benchmarks share: clocks, memory, rounds, tables."""

import argparse
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import MODELS, quiet
from fairseq_sam.analysis.tables import read_rows, write_rows
from scripts.recipes.obtained import commit

WARM_UPS = 2
FEWEST = 3  # rounds of a row, however long they take


class Clock:
    """Seconds that work takes: wall-clock time, on a GPU that of its stream, or the processor's time.

    Args:
        device: ``cuda``, ``cpu`` or ``process``.
    """

    def __init__(self, device: str) -> None:
        self.name = device

    @property
    def now(self) -> Callable[[], float] | None:
        """The clock itself; None on a GPU, where it is not the host's."""
        return {"cuda": None, "process": time.process_time}.get(self.name, time.perf_counter)

    def __call__(self, work: Callable[[], Any]) -> float:
        """Run work and return its seconds."""
        if self.now is None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end)) / 1000
        start = self.now()
        work()
        return self.now() - start


@contextmanager
def seconds_inside(now: Callable[[], float], *places: tuple[Any, str]) -> Iterator[list[float]]:
    """Count the seconds in some functions while the context is open, once where one calls another.

    Args:
        now: the clock.
        places: objects and the names of their functions.

    Yields:
        A list whose only number is the sum so far.
    """
    total, depth = [0.0], 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if not depth:
                    total[0] += now() - start

        return run

    own = [(holder, name, vars(holder).get(name), getattr(holder, name)) for holder, name in places]
    try:
        for holder, name, _, function in own:
            setattr(holder, name, counted(function))
        yield total
    finally:
        for holder, name, before, _ in own:
            if before is None:
                delattr(holder, name)
            else:
                setattr(holder, name, before)


def peak_bytes(build: Callable[[], Callable[[int], Any]], steps: int, cuda: bool) -> int:
    """Return the most bytes that are allocated at any moment while something is built and runs.

    Args:
        build: makes what takes a step, given its number.
        steps: how many are run.
        cuda: on the GPU; else on the CPU, where torch's profiler tells of every allocation.
    """
    gc.collect()

    def run() -> None:
        with quiet():
            step = build()
            for number in range(steps):
                step(number)

    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    found = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(found, key=lambda pair: pair[0])), default=0)


def rounds_of(most: int, limit: float, warm_ups: int = WARM_UPS, cycle: int = 1) -> Iterator[tuple[int, bool]]:
    """Count rounds until there are enough or they have taken too long.

    Args:
        most: how many there shall be.
        limit: seconds after which no further one begins, once there are ``FEWEST``.
        warm_ups: how many come before them.
        cycle: rounds that belong together, such as those of an interval: there are as many whole ones as it takes.

    Yields:
        The round's number, and whether it is only a warm-up.
    """
    start = time.monotonic()
    for number in range(-(-most // cycle) * cycle + warm_ups):
        is_enough = number >= FEWEST + warm_ups and (number - warm_ups) % cycle == 0
        if is_enough and time.monotonic() - start > limit:
            return
        yield number, number < warm_ups


def ratio(pairs: Sequence[tuple[float, float]], is_even: bool = True) -> float:
    """Return the median of the rounds' ratios, or that of the sums where rounds do different work."""
    if is_even:
        return statistics.median(first / second for first, second in pairs)
    return sum(first for first, _ in pairs) / sum(second for _, second in pairs)


def error_of(ratios: Sequence[float]) -> float | str:
    """Return the standard error of the ratios' median, as of a normal distribution; nothing for one ratio."""
    if len(ratios) < 2:
        return ""
    return math.sqrt(math.pi / 2 / len(ratios)) * statistics.stdev(ratios)


def parser_of(description: str | None, kind: str, choices: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes.

    Args:
        description: of the benchmark.
        kind: of what is measured on each model and batch.
        choices: which there are.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    made.add_argument("--tokens", nargs="+", type=int, default=[512, 4000], help="of a batch; default 512 4000")
    made.add_argument(f"--{kind}s", nargs="+", choices=choices, default=choices, metavar=kind.upper())
    made.add_argument("--rounds", type=int, default=10, help="default %(default)s")
    made.add_argument("--limit", type=float, default=120.0, help="seconds for a row's rounds; default %(default)s")
    made.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    made.add_argument("--process-time", action="store_true", help="the processor's time, where other work runs")
    made.add_argument("--out", type=Path, required=True, help="the table; what it has already is not measured again")
    return made


def write_table(args: argparse.Namespace, kind: str, measure: Callable[..., dict[str, Any]]) -> None:
    """Measure each model, batch and choice; write the table after each, behind the rows that it has already.

    Args:
        args: of ``parser_of``.
        kind: of the choices.
        measure: from a model's name, tokens, a choice, the clock and whether it is on a GPU, columns of the table.
    """
    cuda = torch.cuda.is_available() and not args.cpu
    clock = Clock("cuda" if cuda else "process" if args.process_time else "cpu")
    rows: list[dict[str, Any]] = list(read_rows(args.out))
    for name, tokens, chosen in itertools.product(args.models, args.tokens, getattr(args, f"{kind}s")):
        own = {"model": name, "tokens": tokens, kind: chosen, "device": "GPU" if cuda else "CPU"}
        # Rows that were measured in another way are others.
        way = {"clock": clock.name, "flags": getattr(args, "flags", ""), "threads": torch.get_num_threads()}
        key = {name: str(value) for name, value in {**own, **way}.items()}
        if any(key.items() <= {name: str(value) for name, value in row.items()}.items() for row in rows):
            continue
        rows.append({**own, **measure(name, tokens, chosen, clock, cuda), **way, "commit": commit()})
        write_rows(args.out, rows)
        gc.collect()
    print(f"written: {args.out}")
