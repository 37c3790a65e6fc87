"""An update of fairseq reads no more numbers with a method than its passes do; on a GPU each would make the host wait.

What is logged of it is read when fairseq itself has waited for the update's end.
"""

import pytest

pytest.importorskip("fairseq")

import torch
from fairseq.logging import metrics
from fairseq.tasks.fairseq_task import FairseqTask
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_sam.adapter.seam import SharpnessAwareTrainStep
from fairseq_sam.core import descent, norms, tensors
from tests.adapter import runs


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("preset", "passes"),
    [("sam", 2), ("asam", 2), ("ga_sam", 2), ("multistep_defense", 3), ("gsam", 2), ("awp", 2), ("look_sam", 1)],
)
@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_only_what_the_passes_read(translation_data, monkeypatch, preset, passes, scope):
    """Two micro-batches, two updates: what the model reads of each pass (whether there is padding), and no more."""
    monkeypatch.setattr(tensors, "READABLE", ())
    # These read, on a processor.
    monkeypatch.setattr(norms, "_cpu_norm", lambda tensor, p: None)
    monkeypatch.setattr(descent, "_cpu_dot", lambda pairs: None)
    inside, whole = Reads(), Reads()
    plain, call = FairseqTask.train_step, SharpnessAwareTrainStep.__call__
    numbers = []

    def pass_of(self, *args, **kwargs):
        numbers.append(1)
        with inside:
            return plain(self, *args, **kwargs)

    def micro_batch(self, *args, **kwargs):
        with whole:
            return call(self, *args, **kwargs)

    monkeypatch.setattr(FairseqTask, "train_step", pass_of)
    monkeypatch.setattr(SharpnessAwareTrainStep, "__call__", micro_batch)
    flags = [*runs.TRANSLATION, "--optimizer", preset, "--sam-scope", scope, "--update-freq", "2"]
    trainer, batches = runs.build_trainer(translation_data, *flags)
    with metrics.aggregate(new_root=True) as logged:
        trainer.train_step(batches[:2])
        inside.number = whole.number = 0
        numbers.clear()
        trainer.train_step(batches[2:4])
    assert len(numbers) == 2 * passes and inside.number > 0
    assert whole.number == inside.number
    assert logged["sam_eps"].avg > 0 and logged["sam_passes"].avg == {"look_sam": 1.5}.get(preset, passes)
    assert not torch.is_tensor(logged["sam_eps"].avg) and not torch.is_tensor(logged["sam_skipped"].val)
