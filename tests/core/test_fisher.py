"""The Fisher mask: exact count, ties, bounded memory, when it is made, what a checkpoint holds of it."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from fairseq_sam import InstanceBatch, SharpnessAware
from fairseq_sam.core import fisher
from fairseq_sam.core.fisher import top_mask
from tests.core.models import batch, feed, mlp


def by_sorting(values: list[torch.Tensor], kept: int) -> torch.Tensor:
    flat = torch.cat([v.reshape(-1).double() for v in values])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:kept]] = True
    return mask


def cases():
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(3000, generator=generator).square()
    yield "gradients", [normal[:1000].view(20, 50), normal[1000:]]
    yield "double", [normal.double(), torch.rand(77, generator=generator, dtype=torch.float64)]
    yield "mixed", [normal, torch.rand(77, generator=generator, dtype=torch.float64) * 1e-300]
    yield "ties", [torch.tensor([1.0, 2.0, 2.0, 2.0]), torch.tensor([[2.0, 0.0], [3.0, 2.0]])]
    yield "all equal", [torch.ones(5, 5), torch.ones(7)]
    yield "zeros", [torch.zeros(30), torch.tensor([1e-45, 0.0, 5e-324])]
    yield "wide range", [10.0 ** torch.linspace(-44, 38, 400), torch.full((3,), math.inf)]
    yield "scalar and empty", [torch.tensor(0.5), torch.empty(0), torch.rand(9, generator=generator)]


@pytest.mark.parametrize(("name", "values"), list(cases()), ids=[name for name, _ in cases()])
def test_the_largest_are_kept_in_exact_number_and_ties_by_position(name, values, monkeypatch):
    monkeypatch.setattr(fisher, "CHUNK", 64)
    total = sum(v.numel() for v in values)
    for kept in {0, 1, 2, 3, total // 3, total // 2, total - 1, total}:
        masks = top_mask(values, kept)
        assert [m.shape for m in masks] == [v.shape for v in values]
        found = torch.cat([m.reshape(-1) for m in masks])
        assert int(found.sum()) == kept
        assert torch.equal(found, by_sorting(values, kept))


def test_nothing_is_sorted_and_nothing_of_the_model_s_size_is_made(monkeypatch):
    """Beside the values and the masks, no tensor is larger than a chunk or one tensor's keys."""
    monkeypatch.setattr(fisher, "CHUNK", 1000)
    values = [torch.rand(5000) for _ in range(20)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            assert "sort" not in str(function) and "topk" not in str(function)
            out = function(*arguments, **(keywords or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        masks = top_mask(values, 30_000)
    assert sum(int(m.sum()) for m in masks) == 30_000
    assert largest <= max(5000, 1 << fisher.DIGIT)


def instance_batch(model, data, calls=None):
    def losses(x, y):
        if calls is not None:
            calls.append(len(x))
        return (model(x) - y).square().mean(1)

    return InstanceBatch(losses, *data)


def make(model, **options):
    options = {"sparsity": 0.7, "fisher_samples": 8, "mask_interval": 4, "epsilon": 0.2, **options}
    return SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.05), model, method="fisher_sam", **options)


def test_the_mask_is_refreshed_at_its_interval():
    model, calls, masks = mlp(), [], []
    sam = make(model)
    for number in range(9):
        calls.append("step")
        sam.step(instance_batch(model, batch(number), calls))
        masks.append(copy.deepcopy(sam.state_dict()["method"]["fisher"]["mask"]))
    with_instances = [bool("1" in "".join(map(str, part.split()))) for part in _steps(calls)]
    assert with_instances == [number % 4 == 0 for number in range(9)]
    changed = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(masks)]
    assert changed == [number % 4 == 0 for number in range(1, 9)]
    assert all(sum(int(m.sum()) for m in mask.values()) == round(0.3 * 77) for mask in masks)


def _steps(calls):
    return " ".join(map(str, calls)).split("step")[1:]


def test_more_samples_than_a_batch_are_collected_over_updates():
    model, calls = mlp(), []
    sam = make(model, fisher_samples=20, mask_interval=10)
    for number in range(5):
        calls.append("step")
        sam.step(instance_batch(model, batch(number), calls))
    assert [part.split().count("1") for part in _steps(calls)] == [8, 8, 4, 0, 0]
    assert sam.state_dict()["method"]["fisher"]["sums"] is None, "the sums are given up when the mask is complete"


def test_a_resumed_collection_continues_exactly():
    def run(steps, model, sam):
        for number in steps:
            torch.manual_seed(number)
            sam.step(instance_batch(model, batch(number)))

    whole = mlp()
    sam = make(whole, fisher_samples=20, mask_interval=10)
    run(range(12), whole, sam)
    for stop in (1, 2, 3, 10, 11):
        first = mlp()
        sam = make(first, fisher_samples=20, mask_interval=10)
        run(range(stop), first, sam)
        state = copy.deepcopy(sam.state_dict())
        second = mlp()
        second.load_state_dict(first.state_dict())
        sam = make(second, fisher_samples=20, mask_interval=10)
        sam.load_state_dict(state)
        run(range(stop, 12), second, sam)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)), stop


@pytest.mark.parametrize("spoil", [lambda tensor: tensor[:-1], lambda tensor: tensor[None]], ids=["short", "deep"])
@pytest.mark.parametrize("part", ["mask", "sums"])
def test_what_does_not_fit_the_model_is_collected_anew(part, spoil):
    model = mlp()
    sam = make(model, fisher_samples=20)
    sam.step(instance_batch(model, batch(0)))
    state = copy.deepcopy(sam.state_dict())
    kept = state["method"]["fisher"][part]
    name = next(iter(kept))
    kept[name] = spoil(kept[name])
    sam.load_state_dict(state)
    sam.step(instance_batch(model, batch(1)))
    found = sam.state_dict()["method"]["fisher"]
    assert {name: mask.shape for name, mask in found["mask"].items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert sum(int(mask.sum()) for mask in found["mask"].values()) == round(0.3 * 77)


def test_excluded_and_frozen_parameters_do_not_count():
    model = nn.ModuleDict({"net": mlp(), "frozen": nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)})
    sam = make(model, exclude="bias")

    def losses(x, y):
        return (model["net"](x) - y).square().mean(1)

    sam.step(InstanceBatch(losses, *batch(0)))
    mask = sam.state_dict()["method"]["fisher"]["mask"]
    assert all(name.endswith("weight") and not name.startswith("frozen") for name in mask)
    assert sum(int(m.sum()) for m in mask.values()) == round(0.3 * (24 + 30 + 10))


def test_an_instance_that_overflows_does_not_count():
    model = mlp()
    sam = make(model)

    def losses(x, y):
        return (model(x) - y).square().mean(1) * torch.where(x[:, 0] == x.new_tensor(bad), math.inf, 1.0)

    x, y = batch(0)
    bad = float(x[3, 0])
    clean = make(mlp())
    clean.step(instance_batch(clean._model, (torch.cat([x[:3], x[4:]]), torch.cat([y[:3], y[4:]]))))
    sam.step(InstanceBatch(losses, x, y))
    found, expected = (s.state_dict()["method"]["fisher"] for s in (sam, clean))
    assert found["num_instances"] == expected["num_instances"] == 7
    assert all(torch.equal(found["mask"][name], expected["mask"][name]) for name in found["mask"])


def test_instances_leave_gradients_random_state_and_buffers_alone():
    model, data = mlp(), batch(0)
    sam = make(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    before = torch.get_rng_state()

    def losses(x, y):
        torch.rand(3)
        if len(x) == 1 and x[0, 0] == data[0][5, 0]:
            raise RuntimeError("out of memory")
        return (model(x) - y).square().mean(1)

    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        sam.accumulate(InstanceBatch(losses, *data))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p.grad, torch.full_like(p, 0.25)) for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_sparse_gradients_count():
    torch.manual_seed(0)
    masks = []
    for sparse in (False, True):
        model = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 1)).double()
        with torch.no_grad():
            for number, p in enumerate(model.parameters()):
                p.copy_(torch.linspace(-1, 1 + number, p.numel()).view(p.shape))
        sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method="fisher_sam", sparsity=0.5)
        words = torch.tensor([[0, 1], [2, 3], [1, 1]])
        sam.step(InstanceBatch(lambda x, model=model: model(x).square().mean(1), words))
        masks.append(sam.state_dict()["method"]["fisher"]["mask"])
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_at_least_one_weight_is_perturbed():
    model = mlp()
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method="fisher_sam", sparsity=0.999999)
    sam.step(feed(sam.method, model, batch(0)))
    assert sum(int(mask.sum()) for mask in sam.state_dict()["method"]["fisher"]["mask"].values()) == 1


def test_a_collection_that_cannot_end_is_warned_of_once(caplog):
    model = mlp()
    sam = SharpnessAware(
        torch.optim.SGD(model.parameters(), lr=0.1), model, method="fisher_sam", mask_interval=2, fisher_samples=100
    )
    for number in range(7):
        sam.step(feed(sam.method, model, batch(number)))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "only 16 of 100 (--sam-fisher-samples)" in message and "2 updates (--sam-mask-interval)" in message


def test_ties_are_found_in_bounded_memory(monkeypatch):
    """Most weights have no Fisher information at all: words that do not occur. The zeros that are kept are ties."""
    largest, nonzero = [], torch.Tensor.nonzero
    monkeypatch.setattr(fisher, "CHUNK", 1000)

    def watch(tensor, *args, **kwargs):
        largest.append(tensor.numel())
        return nonzero(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "nonzero", watch)
    values = [torch.zeros(30_000), torch.ones(100), torch.zeros(5_000)]
    masks = fisher.top_mask(values, 20_000)
    assert [int(mask.sum()) for mask in masks] == [19_900, 100, 0] and masks[0][:19_900].all()
    assert max(size for size in largest if size != 1 << fisher.DIGIT) <= 1000
