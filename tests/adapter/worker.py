"""The workers of data-parallel runs on CPU (gloo); each runs one case after the other.

They are forks of one process, started by test_workers.py, that has imported everything.
"""

import itertools
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from fairseq.logging import metrics

import fairseq_sam  # noqa: F401
from fairseq_sam.adapter import workers
from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.adapter.workers import torch_ddp
from fairseq_sam.core.perturbation import WeightPerturbation
from tests.adapter import runs


def main() -> None:
    """Run the workers that lines of standard input ask for, and answer each line with their exit statuses."""
    with runs.quiet():
        runs.configuration(["/nowhere", *runs.common_flags(), *runs.TRANSLATION, "--optimizer", "sam"])
    for line in sys.stdin:
        request = json.loads(line)
        children = [fork(arguments, log) for arguments, log in zip(request["workers"], request["logs"], strict=True)]
        print(json.dumps(statuses(children, request["limit"])), flush=True)


def fork(arguments: list[str], log: str) -> int:
    child = os.fork()
    if child:
        return child
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # a full pipe would stop a worker
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def statuses(children: list[int], limit: float) -> list[int]:
    """Exit statuses of processes; those that have not ended when the seconds are over are killed."""
    end, found = time.monotonic() + limit, {}
    while len(found) < len(children):
        for child in children:
            if child not in found:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    found[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return [found[child] for child in children]


def work(rank: str, port: str, data: str, out: str, backend: str, cases: str, failures: str) -> None:
    reductions, collectives = [], []
    all_reduce = workers.all_reduce
    workers.all_reduce = lambda *args: reductions.append(1) or all_reduce(*args)
    for name in ("all_reduce", "all_gather", "broadcast", "reduce"):
        original = getattr(dist, name)
        setattr(dist, name, lambda *a, _original=original, **k: collectives.append(1) or _original(*a, **k))
    if backend == "pytorch_ddp":
        # fairseq names a CUDA device to torch's DDP; on CPU there is none.
        from fairseq.models import distributed_fairseq_model as wrapping

        ddp = wrapping.DistributedDataParallel
        wrapping.DistributedDataParallel = lambda *a, device_ids, output_device, **k: ddp(*a, **k)
    if backend == "slowmo":  # fairscale waits for a CUDA device
        torch.cuda.synchronize = lambda *args: None
    from fairseq.distributed import utils as distributed_utils

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=int(rank))
    distributed_utils._USE_XLA = False
    for name, flags in json.loads(cases).items():
        reductions.clear()
        collectives.clear()
        failing = {number for failing_rank, number in json.loads(failures).get(name, []) if failing_rank == int(rank)}
        trainer = train(data, rank, port, backend, flags, failing, collectives)
        state = {key: p.detach().clone() for key, p in trainer.get_model().named_parameters()}
        method = unwrap(trainer.optimizer).memory.state_dict() if unwrap(trainer.optimizer) else {}
        torch.save({"weights": state, "method": method}, Path(out) / f"{name}.{rank}.pt")
        (Path(out) / f"{name}.{rank}.json").write_text(
            json.dumps({"reductions": len(reductions), "collectives": len(collectives)})
        )


def out_of_memory(*args, **kwargs):
    raise RuntimeError("CUDA out of memory, as the test wants it")


def run_out_of_memory(trainer, failing: set[int | str]) -> None:
    """Let the passes with these numbers, counted from 1, fail for lack of memory before they begin.

    ``backward N`` fails in the middle of a backward pass, ``reduction`` and ``step`` in the engine's own arithmetic.
    """
    task = type(trainer.task)
    plain, count = getattr(task, "plain_train_step", task.train_step), itertools.count(1)
    task.plain_train_step = plain

    def train_step(self, sample, model, *args, **kwargs):
        number = next(count)
        if number in failing:
            out_of_memory()
        if f"backward {number}" in failing:
            weight = trainer.get_model().encoder.layers[0].fc1.weight
            handle = weight.register_hook(out_of_memory)
            try:
                return plain(self, sample, model, *args, **kwargs)
            finally:
                handle.remove()
        return plain(self, sample, model, *args, **kwargs)

    task.train_step = train_step
    if "reduction" in failing:
        workers.all_reduce = out_of_memory
    if "step" in failing:
        WeightPerturbation._step_ = out_of_memory


def count_buckets(trainer, collectives: list[int]) -> None:
    """Let torch's DDP count the buckets that it reduces in backward, which it does behind Python's back."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    for module in (trainer.model, trainer.criterion):
        replica = torch_ddp(module)
        if replica is not None:
            replica.register_comm_hook(
                None, lambda state, bucket: collectives.append(1) or allreduce_hook(state, bucket)
            )


def train(
    data: str, rank: str, port: str, backend: str, flags: list[str], failing: set[int | str], collectives: list[int]
):
    resumes = "--resume" in flags
    cfg = runs.configuration([
        data, *runs.common_flags(), *(flag for flag in flags if flag != "--resume"),
        "--distributed-world-size", "2", "--distributed-rank", rank,
        "--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-backend", "gloo",
        "--distributed-no-spawn", "--ddp-backend", backend,
    ])  # fmt: skip
    cfg.distributed_training.distributed_rank = int(rank)
    trainer, batches = runs.trainer_of(cfg)
    run_out_of_memory(trainer, failing)
    count_buckets(trainer, collectives)
    trainer.reset_dummy_batch(batches[0])
    for number in range(3):
        micro = batches[2 * number : 2 * number + 2]
        if number == 2 and rank == "1":
            micro = [{}, {}]  # a shard that has run out of data: fairseq runs dummy batches
        if number == 2 and resumes:
            trainer = resumed(trainer, cfg, batches, rank, flags)
        with metrics.aggregate():
            trainer.train_step(micro)
    return trainer


def resumed(trainer, cfg, batches, rank: str, flags: list[str]):
    """A new trainer that has loaded the checkpoint of another."""
    path = Path(cfg.checkpoint.save_dir) / f"resumed.{zlib.crc32(repr(flags).encode())}.pt"
    trainer.consolidate_optimizer()
    if rank == "0":
        trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1}, "val_loss": None})
    dist.barrier()
    other, _ = runs.trainer_of(cfg)
    other.load_checkpoint(str(path))
    other.begin_epoch(1)
    other.reset_dummy_batch(batches[0])
    return other


if __name__ == "__main__":
    main()
