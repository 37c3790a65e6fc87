"""torch's DistributedDataParallel around a model in a plain loop: two workers are one with both their batches."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fairseq_sam import InstanceBatch, SharpnessAware
from tests.core.models import SETTINGS, batch, mlp

pytestmark = pytest.mark.slow
# Methods whose choices do not depend on the worker: the same instances in each part, the same random directions.
METHODS = ("sam", "ga_sam", "gsam", "look_sam", "delta_sam", "random_sam")


def trained(method, model, data, *, bucket_view=None):
    """Weights after three updates of two micro-batches each; the model is a replica if `bucket_view` is given."""
    module = model if bucket_view is None else DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = SharpnessAware(optimizer, module, method=method, **SETTINGS[method])
    for number in range(6):
        x, y = data(number)
        sam.accumulate(
            InstanceBatch(lambda x, y: (module(x) - y).square().mean(1), x, y)
            if sam.method.needs_instances
            else _closure(module, x, y)
        )
        if number % 2:
            sam.apply()
            sam.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _closure(module, x, y):
    def closure():
        loss = (module(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


def work(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for method in METHODS:
        for bucket_view in (False, True):
            model = mlp()
            mine = lambda number: tuple(part[rank::2] for part in batch(number))  # noqa: E731
            found[method, bucket_view] = trained(method, model, mine, bucket_view=bucket_view)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_are_one_with_both_their_batches(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for method in METHODS:
        model = mlp()
        expected = trained(method, model, batch)
        for bucket_view in (False, True):
            key = method, bucket_view
            assert torch.equal(first[key], second[key]), f"{key}: replicas diverge"
            torch.testing.assert_close(first[key], expected, rtol=1e-9, atol=1e-12, msg=str(key))
