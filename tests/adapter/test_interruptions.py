"""An error, an interrupt, a signal or a lack of memory at any point of an update inside fairseq."""

import copy
import gc
import inspect
import random

import pytest
import torch
from fairseq import optim

from fairseq_sam import PRESETS
from tests import interrupt
from tests.adapter import runs

FLAGS = [*runs.TRANSLATION, "--max-tokens", "60", "--update-freq", "2", "--sam-epsilon", "0.01"]
NUM_PLACES = 40  # for each preset and scope


def few(preset):
    return ["--sam-fisher-samples", "12"] if PRESETS[preset].mask == "fisher" else []


class Update:
    """The second update of a run, of two micro-batches; its trainer can be put back to the start of it."""

    def __init__(self, data, *flags):
        self.trainer, batches = runs.build_trainer(data, *FLAGS, *flags)
        batches = sorted(batches, key=lambda sample: len(sample["id"]))
        self.trainer.train_step(batches[:2])
        self.samples = batches[1:3]
        self.start = self._snapshot()
        self.before = self.state()

    def _snapshot(self):
        model = {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}
        return model, copy.deepcopy(self.trainer.optimizer.state_dict())

    def rewind(self):
        model, optimizer = self.start
        self.trainer.model.load_state_dict(model)
        self.trainer.optimizer.load_state_dict(copy.deepcopy(optimizer))
        self.trainer.zero_grad()
        self.trainer.set_num_updates(1)

    def state(self):
        return copy.deepcopy((self.trainer.model.state_dict(), self.trainer.optimizer.state_dict()))

    def run(self):
        self.trainer.train_step(self.samples)

    def gradients(self):
        return [None if p.grad is None else p.grad.clone() for p in self.trainer.model.parameters()]

    def gradients_between(self, monkeypatch):
        """All states of the accumulated gradients that are not between: before, and after each micro-batch."""
        from fairseq_sam.adapter.seam import SharpnessAwareTrainStep

        original, found = SharpnessAwareTrainStep.__call__, []

        def recorded(*args, **kwargs):
            found.append(self.gradients())
            result = original(*args, **kwargs)
            found.append(self.gradients())
            return result

        with monkeypatch.context() as patched:
            patched.setattr(SharpnessAwareTrainStep, "__call__", recorded)
            self.run()
        return [*found, self.gradients(), [None] * len(found[0])]


@pytest.mark.parametrize("error", ["interrupt", "SIGTERM"])
@pytest.mark.parametrize("base", ["adam", "adafactor"])
def test_signals_wait_for_the_base_optimizer(translation_data, monkeypatch, base, error):
    """Anywhere in its update of the weights, which is a loop over parameters: all of them are updated, then it ends."""
    update = Update(translation_data, "--optimizer", "look_sam", "--base-optimizer", base)
    update.run()
    after = update.state()
    update.rewind()
    monkeypatch.setattr(interrupt, "FILES", (inspect.getfile(optim.OPTIMIZER_REGISTRY[base]),))
    places = [n for n, _ in enumerate(interrupt.trace(update.run))]
    assert len(places) > 100
    for number in random.Random(0).sample(places, 25):
        update.rewind()
        with pytest.raises(interrupt.RAISED):
            interrupt.trace(update.run, at=number, error=error)
        found = update.state()
        assert runs.same_state(found, after) or runs.same_state(found, update.before), number


@pytest.mark.parametrize("start", ["0", "10"], ids=["sharpness-aware", "plain"])
def test_an_error_in_the_middle_of_backward_leaves_earlier_gradients(translation_data, monkeypatch, start):
    """Also in a plain update, whose passes add to what earlier micro-batches left."""
    update = Update(translation_data, "--optimizer", "sam", "--sam-start-update", start)
    allowed = update.gradients_between(monkeypatch)
    update.rewind()
    parameter, calls = update.trainer.model.encoder.layers[0].fc1.weight, []

    def fail(gradient):
        calls.append(1)
        if len(calls) == (2 if start == "10" else 3):
            raise ValueError("in backward")

    handle = parameter.register_hook(fail)
    with pytest.raises(ValueError, match="in backward"):
        update.run()
    handle.remove()
    assert runs.same_state(update.gradients(), allowed[1]) and not is_zero(allowed[1])
    assert runs.same_state(update.state(), update.before)


def is_zero(gradients):
    return all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize(("preset", "scope"), runs.SCOPED)
def test_at_any_line_of_an_update(translation_data, monkeypatch, preset, scope):
    """The weights, the optimizer's state and the method's are those of before the update or after it."""
    update = Update(translation_data, "--optimizer", preset, "--sam-scope", scope, *few(preset))
    gradients = update.gradients_between(monkeypatch)
    after = update.state()
    assert not runs.same_state(update.before, after)
    update.rewind()
    places = interrupt.trace(update.run)
    assert runs.same_state(update.state(), after), "the update can be repeated"
    numbers = interrupt.first_and_last(places)
    not_reached = 0
    for number in random.Random(preset).sample(numbers, NUM_PLACES):
        error = list(interrupt.ERRORS)[number % 4]
        if error == "out of memory" and not places[number][0].startswith(str(interrupt.ENGINE)):
            error = "interrupt"  # what takes memory is in the engine
        update.rewind()
        gc.collect()  # weights whose memory an interrupted step still has take another way, of other lines
        at = f"{error} at {places[number]}"
        try:
            seen = interrupt.trace(update.run, at=number, error=error)
        except interrupt.RAISED:
            pass
        else:  # in a micro-batch, fairseq drops an update that is out of memory, and goes on
            is_over = len(seen) <= number  # the steps' number differs by few where memory was held by something else
            assert error == "out of memory" or is_over, f"passed over: {at}"
            not_reached += is_over
        torch.set_grad_enabled(True)
        found = update.state()
        is_before = runs.same_state(found, update.before)
        assert is_before or runs.same_state(found, after), f"neither before nor after: {at}"
        left = update.gradients()
        assert is_zero(left) or any(runs.same_state(left, allowed) for allowed in gradients), at
        if is_before and number % 8 < 4:
            update.trainer.set_num_updates(1)
            update.run()
            assert runs.same_state(update.state(), after), f"cannot be tried again: {at}"
    assert not_reached < NUM_PLACES / 4
