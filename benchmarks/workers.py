"""Steps of several data-parallel workers on one machine, each a process with one thread or one GPU."""

import functools
import os
import socket
import statistics
import sys
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import WARM_UPS, Clock  # noqa: E402

MODEL, TOKENS = "Transformer, 5M", 512


def seconds_of_workers(number: int, rounds: int, cuda: bool, *optimizers: str) -> list[float]:
    """Time steps of several optimizers in turn, with as many workers.

    Args:
        number: of the workers.
        rounds: how many are timed.
        cuda: each on a GPU of its own.
        optimizers: flags.

    Returns:
        For each optimizer the median over the rounds of the slowest worker's seconds.
    """
    context = multiprocessing.get_context("spawn")
    queue: Queue[list[list[float]]] = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        context.Process(target=_work, args=(rank, number, port, rounds, cuda, optimizers, queue))
        for rank in range(number)
    ]
    for worker in workers:
        worker.start()
    found = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    return [statistics.median(map(max, zip(*times, strict=True))) for times in zip(*found, strict=True)]


def _work(
    rank: int, number: int, port: int, rounds: int, cuda: bool, optimizers: tuple[str, ...], queue: "Queue[Any]"
) -> None:
    import fairseq.benchmark  # noqa: F401  registers the tasks
    from fairseq.distributed import utils as distributed_utils
    from fairseq.models import distributed_fairseq_model as wrapping

    from benchmarks.models import MODELS, batches, quiet, trainer

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    backend = "nccl" if cuda else "gloo"
    distributed.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", world_size=number, rank=rank)
    distributed_utils._USE_XLA = False
    if not cuda:  # fairseq wraps as if there were a GPU
        wrapping.DistributedDataParallel = functools.partial(_on_cpu, wrapping.DistributedDataParallel)
    flags = (
        f"--distributed-world-size {number} --distributed-rank {rank} --distributed-no-spawn "
        f"--distributed-init-method tcp://127.0.0.1:{port} --distributed-backend {backend} --ddp-backend pytorch_ddp"
    )
    made = []
    for optimizer in optimizers:
        base = "" if "--optimizer adam" in optimizer else " --base-optimizer adam"
        made.append(trainer(MODELS[MODEL], optimizer + base, TOKENS, cpu=not cuda, flags=flags if number > 1 else ""))
    data = batches(MODELS[MODEL], TOKENS, len(made[0].task.source_dictionary))
    clock, times = Clock("cuda" if cuda else "cpu"), [[] for _ in made]  # type: list[list[float]]
    for step in range(rounds + WARM_UPS):
        for each, seconds in zip(made, times, strict=True):
            distributed.barrier()
            with quiet():
                spent = clock(lambda each=each, step=step: each.train_step([data[step % len(data)]]))
            if step >= WARM_UPS:
                seconds.append(spent)
    queue.put(times)
    distributed.barrier()


def _on_cpu(wrapper: Any, *args: Any, device_ids: Any, output_device: Any, **named: Any) -> Any:
    return wrapper(*args, **named)
