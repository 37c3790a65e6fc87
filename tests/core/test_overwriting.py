"""The engine overwrites gradients that are its own, and no others; backups are made in the same memory."""

import pytest
import torch
from torch import nn

from fairseq_sam import PRESETS, SharpnessAware
from fairseq_sam.core.backup import Backup, Room
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


def test_a_backup_is_of_before_the_first_move():
    """In the weights' strides; only of those that move; weights that got other memory meanwhile get theirs back."""
    weights = [nn.Parameter(torch.randn(4, 6).t()), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    before, places = [w.detach().clone() for w in weights], [w.data_ptr() for w in weights]
    backup = Backup(weights, Room())
    for factor in (2.0, 3.0):
        backup.before_move([0])[0].mul_(factor)
        assert not torch.equal(weights[0], before[0]) and torch.equal(backup[0], before[0])
        assert backup[0].stride() == weights[0].stride() and not backup[0].requires_grad
        assert backup[1].data_ptr() == weights[1].data_ptr(), "it does not move"
    weights[1].data = torch.zeros(3)
    weights[0].data = torch.zeros(6, 4)
    assert torch.equal(backup.before_move([0])[0], 6.0 * before[0]) and torch.equal(weights[0], 6.0 * before[0])
    backup.restore()
    assert all(torch.equal(w, value) for w, value in zip(weights, before, strict=True))
    assert [w.data_ptr() for w in weights] == places
