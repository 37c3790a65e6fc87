"""The engine overwrites gradients that are its own, and no others; backups are made in the same memory."""

import pytest
import torch
from torch import nn

from fairseq_sam import PRESETS, InstanceBatch, SharpnessAware
from fairseq_sam.core.backup import Backup, Room, has_own_memory
from tests.core.models import SETTINGS, batch, closure_of, flat, mlp

# Those that take a closure.
CLOSURES = [name for name, method in PRESETS.items() if method.where == "weights" and not method.needs_instances]


def updated(preset, closure_from, **options):
    """Weights after two updates."""
    torch.manual_seed(1)
    model, data = mlp(dtype=torch.float32), batch(0, dtype=torch.float32)
    sam = SharpnessAware(
        torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset, **{**SETTINGS[preset], **options}
    )
    for _ in range(2):
        sam.step(closure_from(model, data))
    return model


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("preset", CLOSURES)
def test_gradients_that_are_views_are_not_overwritten(preset, norm):
    """As in the buckets of torch's DDP: the next backward writes to the memory that the last one's gradients are in."""

    def in_buckets(model, data):
        plain = closure_of(model, data)
        bucket = torch.zeros(sum(p.numel() for p in model.parameters()))

        def closure():
            loss = plain()
            for p, part in zip(model.parameters(), bucket.split([p.numel() for p in model.parameters()]), strict=True):
                p.grad = part.view_as(p).copy_(p.grad)
            return loss

        return closure

    found, expected = (updated(preset, closure, norm=norm) for closure in (in_buckets, closure_of))
    assert (flat(found.parameters()) == flat(expected.parameters())).all()


@pytest.mark.parametrize("preset", ["sam", "ga_sam", "gsam", "look_sam", "msam", "esam", "fisher_sam"])
def test_gradients_of_earlier_micro_batches_that_are_views_are_not_overwritten(preset):
    """Two micro-batches, each of as many passes as it takes, with every gradient in the same memory."""

    def accumulated(in_bucket):
        torch.manual_seed(1)
        model = mlp(dtype=torch.float32)
        bucket = torch.zeros(sum(p.numel() for p in model.parameters()))
        sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset, **SETTINGS[preset])

        def backward(loss):
            loss.backward()
            parts = bucket.split([p.numel() for p in model.parameters()])
            for p, part in zip(model.parameters(), parts, strict=True):
                p.grad = part.view_as(p).copy_(p.grad) if in_bucket else p.grad

        for number in range(4):
            data = batch(number, dtype=torch.float32)
            instances = InstanceBatch(lambda x, y: (model(x) - y).square().mean(1), *data, backward=backward)
            sam.accumulate(instances if sam.method.needs_instances else lambda part=instances: part.run().loss)
            if number % 2:
                sam.apply()
                sam.zero_grad()
        return flat(model.parameters())

    assert (accumulated(True) == accumulated(False)).all()


@pytest.mark.parametrize("preset", CLOSURES)
def test_gradients_of_earlier_micro_batches_stay_as_they_are(preset):
    """An error in a later one puts them back by reference."""
    model, data = mlp(), batch(0)
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, method=preset, **SETTINGS[preset])
    sam.zero_grad()
    sam.accumulate(closure_of(model, data))
    gradients = [p.grad for p in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    sam.accumulate(closure_of(model, batch(1)))
    assert all(torch.equal(g, value) for g, value in zip(gradients, values, strict=True))
    assert not any(torch.equal(p.grad, value) for p, value in zip(model.parameters(), values, strict=True))


def test_a_backup_stays_in_its_memory():
    room, weights = Room(), [torch.randn(3, 2), torch.randn(4).to(torch.bfloat16)]
    places = [tensor.data_ptr() for tensor in room.of(weights)]
    assert [tensor.data_ptr() for tensor in room.of(weights)] == places
    for changed in ([torch.randn(2, 3), weights[1]], [weights[0].double(), weights[1]], weights[:1]):
        for tensor, weight in zip(room.of(changed), changed, strict=True):
            assert (tensor.shape, tensor.dtype) == (weight.shape, weight.dtype)


@pytest.mark.parametrize("alone", [True, False])
def test_a_backup_is_of_before_the_first_move(alone):
    """In the weights' strides; only of those that move; weights that got other memory meanwhile get theirs back."""
    weights = [nn.Parameter(torch.randn(4, 6).t()), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    before, places = [w.detach().clone() for w in weights], [w.data_ptr() for w in weights]
    views = [] if alone else [w.detach() for w in weights]
    backup = Backup(weights, Room())
    for factor in (2.0, 3.0):
        (weight,), (place,) = backup.before_move([0])
        place.copy_(weight * factor)
        backup.after_move([0])
        assert not torch.equal(weights[0], before[0]) and torch.equal(backup[0], before[0])
        assert backup[0].stride() == weights[0].stride() and not backup[0].requires_grad
        assert backup[1].data_ptr() == weights[1].data_ptr(), "it does not move"
        assert (weights[0].data_ptr() != places[0]) == alone
        assert all(torch.equal(w, view) for w, view in zip(weights, views, strict=bool(views))), "who reads sees it too"
    weights[1].data = torch.zeros(3)
    weights[0].data = torch.zeros(6, 4)
    (weight,), (place,) = backup.before_move([0])
    assert torch.equal(weight, before[0] if alone else 6.0 * before[0])
    backup.restore()
    assert all(torch.equal(w, value) for w, value in zip(weights, before, strict=True))
    assert [w.data_ptr() for w in weights] == places


def test_only_memory_that_nothing_else_reads_stays_behind():
    weight = nn.Parameter(torch.randn(4, 3))
    assert has_own_memory(weight)
    turned = nn.Parameter(torch.randn(4, 3).t())
    assert has_own_memory(turned)
    loss = (weight @ torch.ones(3)).sum()
    assert has_own_memory(weight), "a graph has the parameter, not its memory"
    loss.backward()
    torch.optim.Adam([weight]).step()
    assert has_own_memory(weight)
    whole = torch.randn(12)
    rows = nn.Parameter(whole.view(4, 3))
    assert not has_own_memory(rows), "what it is a view of reads it"
    del whole
    assert has_own_memory(rows)
    view = rows.t()
    assert not has_own_memory(rows) and view is not None
    assert not has_own_memory(nn.Parameter(torch.randn(4, 3)[1:])), "a part of its memory"
    assert not has_own_memory(nn.Parameter(torch.randn(3)).share_memory_()), "other processes read it"
    assert not has_own_memory(nn.Parameter(torch.randn(0))) and not has_own_memory(weight.to("meta"))


def test_a_torch_that_does_not_tell_who_reads(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert not has_own_memory(nn.Parameter(torch.randn(4, 3)))


@pytest.mark.parametrize("preset", CLOSURES)
def test_weights_with_views_take_the_same_steps(preset):
    """Copied there and back, or put in other places: the same numbers."""
    views = []

    def viewed(model, data):
        views.extend(p.detach() for p in model.parameters())
        return closure_of(model, data)

    found, expected = (updated(preset, closure) for closure in (viewed, closure_of))
    assert (flat(found.parameters()) == flat(expected.parameters())).all() and views


@pytest.mark.parametrize("at", [0, 1, 2])
def test_views_that_a_pass_makes_follow_the_weights(at):
    """Made in the first, the second or the last of three passes, and kept: a cached transpose, a state dict."""
    model, data, views, number = mlp(), batch(0), [], [0]
    sam = SharpnessAware(
        torch.optim.SGD(model.parameters(), lr=0.1), model, method="multistep_defense", **SETTINGS["multistep_defense"]
    )
    plain = closure_of(model, data)

    def closure():
        if number[0] == at:
            views.extend([model[0].weight.detach().t(), model.state_dict()["2.weight"]])
        elif number[0] > at:
            assert torch.equal(views[0].t(), model[0].weight) and torch.equal(views[1], model[2].weight)
        number[0] += 1
        return plain()

    for _ in range(3):
        sam.step(closure)
        assert torch.equal(views[0].t(), model[0].weight) and torch.equal(views[1], model[2].weight)
    plain_model = mlp()
    other = SharpnessAware(
        torch.optim.SGD(plain_model.parameters(), lr=0.1), plain_model, method="multistep_defense",
        **SETTINGS["multistep_defense"],
    )  # fmt: skip
    for _ in range(3):
        other.step(closure_of(plain_model, data))
    assert (flat(model.parameters()) == flat(plain_model.parameters())).all()
