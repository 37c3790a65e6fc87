"""An error, an interrupt, a signal or a lack of memory at any point of a step: all of the step happens, or nothing."""

import copy
import gc
import random

import pytest
import torch
from torch import nn

from fairseq_sam import PRESETS, SharpnessAware
from tests import interrupt
from tests.core.models import SETTINGS, batch, feed, model_for

PRIOR = 0.5  # in every gradient when the step begins, as from an earlier micro-batch


class Run:
    """A short run whose next step is the one that is interrupted: masks are half collected, components kept."""

    def __init__(self, preset, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(model_for(preset), nn.BatchNorm1d(2, dtype=torch.float64))
        if PRESETS[preset].needs_instances:
            self.model = self.model[0]  # statistics of a batch would couple its instances
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        steps = {} if PRESETS[preset].ascent == "random" else {"steps": 2}
        self.sam = SharpnessAware(optimizer, self.model, preset, **{**SETTINGS[preset], **steps, **options})
        self.sam.step(self.feed(0))
        self.sam.zero_grad()
        for p in self.model.parameters():
            p.grad = torch.full_like(p, PRIOR)
        torch.manual_seed(1)

    def feed(self, seed):
        return feed(self.sam.method, self.model, batch(seed, size=4))

    def accumulate(self):
        self.sam.accumulate(self.feed(1))

    def weights(self):
        return [t.detach().clone() for t in (*self.model.parameters(), *self.model.buffers())]

    def gradients(self):
        return [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]

    def memory(self):
        return copy.deepcopy(self.sam.state_dict())


def same(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


class Outcomes:
    """What a step leaves when it runs to its end, and what was there before it."""

    def __init__(self, preset, event, **options):
        self.make = lambda: Run(preset, **options)
        self.make().accumulate()  # what runs only once in a process is over
        run = self.make()
        self.before = (run.weights(), run.gradients(), run.memory())
        self.places = interrupt.trace(run.accumulate, event)
        self.after = (run.weights(), run.gradients(), run.memory())
        assert not same(self.before, self.after) and self.places
        self.event = event

    def check(self, number, error, again=True):
        run = self.make()
        with pytest.raises(interrupt.RAISED):
            interrupt.trace(run.accumulate, self.event, number, error)
        torch.set_grad_enabled(True)  # a signal may keep torch's own no_grad from being left
        found = (run.weights(), run.gradients(), run.memory())
        at = f"{error} at {self.places[number]}"
        gc.collect(1)  # of what the interruption left open
        assert same(found, (run.weights(), run.gradients(), run.memory())), f"changes when Python tidies up: {at}"
        assert same(found[0][: len(list(run.model.parameters()))], self.before[0][: len(list(run.model.parameters()))])
        assert same(found, self.before) or same(found, self.after), f"neither before nor after: {at}"
        if again and same(found, self.before):  # the step can be tried again, with the same result
            torch.manual_seed(1)
            run.accumulate()
            assert same((run.weights(), run.gradients(), run.memory()), self.after), f"cannot be tried again: {at}"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_line_of_a_step(preset):
    """The first and the last time that any line of the engine runs, each with one of four errors in turn."""
    outcomes = Outcomes(preset, "line")
    numbers = interrupt.first_and_last(outcomes.places)
    assert len(numbers) > 100
    for number in numbers:
        outcomes.check(number, list(interrupt.ERRORS)[number % 4], again=number % 8 < 4)


@pytest.mark.parametrize("error", interrupt.ERRORS)
@pytest.mark.parametrize("preset", ["ga_sam", "fisher_sam", "look_sam"])
def test_bytecodes_of_a_step(preset, error):
    """A signal does not wait for the end of a line: 150 moments between two bytecodes."""
    outcomes = Outcomes(preset, "opcode")
    for number in sorted(random.Random(0).sample(range(len(outcomes.places)), 150)):
        outcomes.check(number, error)


@pytest.mark.parametrize("error", interrupt.ERRORS)
def test_every_moment_of_a_move_and_a_restore(error):
    """Every bytecode that moves weights or copies them back, in all passes of a step."""
    outcomes = Outcomes("ga_sam", "opcode", rounding="stochastic")
    files = ("perturbation.py", "backup.py", "buckets.py")
    moved = [n for n, (file, _) in enumerate(outcomes.places) if file.endswith(files)]
    from fairseq_sam.core.backup import Backup
    from fairseq_sam.core.perturbation import WeightPerturbation as Weights

    functions = (
        Weights._moved.__wrapped__, Weights.restore, Weights._add, Weights._perturbation, Backup.before_move,
        Backup.restore, Backup._give_back,
    )  # fmt: skip
    codes = [f.__code__ for f in functions]
    starts = {code.co_firstlineno for code in codes}
    critical = [n for n in moved if outcomes.places[n][1] >> 16 in starts]
    assert len(critical) > 500
    for number in critical[:: 3 if error == "interrupt" else 10]:
        outcomes.check(number, error)
