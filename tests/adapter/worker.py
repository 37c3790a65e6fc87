"""One of two workers of data-parallel runs on CPU (gloo); started by test_workers.py, runs one case after the other."""

import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fairseq_sam  # noqa: F401
from fairseq_sam.adapter import seam
from fairseq_sam.adapter.optimizers import unwrap
from tests.adapter import runs


def main() -> None:
    rank, port, data, out, backend, cases, failures = sys.argv[1:]
    reductions = []
    all_reduce = seam._all_reduce
    seam._all_reduce = lambda *args: reductions.append(1) or all_reduce(*args)
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
        failing = {number for failing_rank, number in json.loads(failures).get(name, []) if failing_rank == int(rank)}
        trainer = train(data, rank, port, backend, flags, failing)
        state = {key: p.detach().clone() for key, p in trainer.get_model().named_parameters()}
        method = unwrap(trainer.optimizer).memory.state_dict() if unwrap(trainer.optimizer) else {}
        torch.save({"weights": state, "method": method}, Path(out) / f"{name}.{rank}.pt")
        (Path(out) / f"{name}.{rank}.json").write_text(json.dumps({"reductions": len(reductions)}))


def run_out_of_memory(task: type, failing: set[int]) -> None:
    """Let the passes with these numbers, counted from 1, fail for lack of memory; before they begin."""
    plain, count = getattr(task, "plain_train_step", task.train_step), itertools.count(1)
    task.plain_train_step = plain

    def train_step(*args, **kwargs):
        if next(count) in failing:
            raise RuntimeError("CUDA out of memory, as the test wants it")
        return plain(*args, **kwargs)

    task.train_step = train_step


def train(data: str, rank: str, port: str, backend: str, flags: list[str], failing: set[int]):
    from fairseq.logging import metrics

    cfg = runs.configuration([
        data, *runs.common_flags(), *flags, "--distributed-world-size", "2", "--distributed-rank", rank,
        "--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-backend", "gloo",
        "--distributed-no-spawn", "--ddp-backend", backend,
    ])  # fmt: skip
    cfg.distributed_training.distributed_rank = int(rank)
    trainer, batches = runs.trainer_of(cfg)
    run_out_of_memory(type(trainer.task), failing)
    trainer.reset_dummy_batch(batches[0])
    for number in range(3):
        micro = batches[2 * number : 2 * number + 2]
        if number == 2 and rank == "1":
            micro = [{}, {}]  # a shard that has run out of data: fairseq runs dummy batches
        with metrics.aggregate():
            trainer.train_step(micro)
    return trainer


if __name__ == "__main__":
    main()
