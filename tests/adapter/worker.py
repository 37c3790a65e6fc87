"""One of two workers of a data-parallel run on CPU (gloo); started by test_workers.py."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fairseq_sam  # noqa: F401
from fairseq_sam.adapter import seam
from tests.adapter import runs


def main() -> None:
    rank, port, data, out, backend, *flags = sys.argv[1:]
    reductions = []
    all_reduce = seam._all_reduce
    seam._all_reduce = lambda *args: reductions.append(1) or all_reduce(*args)
    if backend == "pytorch_ddp":
        # fairseq names a CUDA device to torch's DDP; on CPU there is none.
        from fairseq.models import distributed_fairseq_model as wrapping

        ddp = wrapping.DistributedDataParallel
        wrapping.DistributedDataParallel = lambda *a, device_ids, output_device, **k: ddp(*a, **k)
        seam.DistributedDataParallel = ddp
    from fairseq.distributed import utils as distributed_utils
    from fairseq.logging import metrics

    cfg = runs.configuration([
        data, *runs.common_flags(), *flags, "--distributed-world-size", "2", "--distributed-rank", rank,
        "--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-backend", "gloo",
        "--distributed-no-spawn", "--ddp-backend", backend,
    ])  # fmt: skip
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=int(rank))
    cfg.distributed_training.distributed_rank = int(rank)
    distributed_utils._USE_XLA = False
    trainer, batches = runs.trainer_of(cfg)
    trainer.reset_dummy_batch(batches[0])
    for number in range(3):
        micro = batches[2 * number : 2 * number + 2]
        if number == 2 and rank == "1":
            micro = [{}, {}]  # a shard that has run out of data: fairseq runs dummy batches
        with metrics.aggregate():
            trainer.train_step(micro)
    state = {name: p.detach().clone() for name, p in trainer.get_model().named_parameters()}
    torch.save(state, Path(out) / f"{rank}.pt")
    (Path(out) / f"{rank}.json").write_text(json.dumps({"reductions": len(reductions)}))


if __name__ == "__main__":
    main()
