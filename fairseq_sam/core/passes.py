"""Passes of an update beside a step: its parts, the instances of a Fisher mask, updates without a perturbation."""

from itertools import accumulate, pairwise
from typing import Any

import torch

from fairseq_sam.core.batch import Batch, Result
from fairseq_sam.core.descent import Reduce, add_component, local
from fairseq_sam.core.fisher import SquaredGradients, squared_gradients
from fairseq_sam.core.memory import Memory
from fairseq_sam.core.method import Method
from fairseq_sam.core.random_state import RandomState
from fairseq_sam.core.space import ParameterSpace
from fairseq_sam.core.tensors import Gradients, add_all, copies, copy_


def split(method: Method, batch: Batch[Result]) -> list[tuple[Batch[Result], float]]:
    """Cut a batch into the parts that have a perturbation each, and which share of the batch each is.

    The first parts are larger by one instance where the number does not divide. Without a perturbation there is one.

    Args:
        method: the method.
        batch: a micro-batch.
    """
    if method.epsilon == 0 or (method.m == 1 and method.ascent != "instance"):
        return [(batch, 1)]  # without asking for its length: not every batch has one
    number = len(batch) if method.ascent == "instance" else min(method.m, len(batch))
    if number == 1:
        return [(batch, 1)]
    ends = [len(batch) * part // number for part in range(number + 1)]
    sizes = sorted((end - start for start, end in pairwise(ends)), reverse=True)
    starts = [0, *accumulate(sizes)]
    return [(batch.select(range(start, end)), (end - start) / len(batch)) for start, end in pairwise(starts)]


def fisher_information(
    space: ParameterSpace, batch: Batch[Any], number: int, unit: float, salt: str = ""
) -> SquaredGradients:
    """Sum squared gradients of single instances, chosen at random; everything else is as before afterwards.

    Args:
        space: the trained parameters.
        batch: the instances to choose from.
        number: how many, at most all.
        unit: see ``fisher.squared_gradients``.
        salt: names this choice among those of a run.
    """
    random = RandomState((t.device for t in space.tensors), salt)
    prior, buffers = space.take_gradients(), copies(space.buffers)
    chosen = torch.randperm(len(batch), generator=random.generator("fisher"))[:number].sort().values.tolist()
    try:
        return squared_gradients((batch.select([i]) for i in chosen), space, unit)
    finally:
        space.put_gradients(prior)
        copy_(space.buffers, buffers)
        random.restore()


def reuse(
    method: Method,
    space: ParameterSpace,
    memory: Memory,
    batch: Batch[Result],
    *,
    finish: bool = True,
    shared: bool = False,
    reduce: Reduce = local,
    num_workers: int = 1,
) -> Result:
    """Run one plain pass and add the sharpness component that the memory holds to its gradient.

    Args:
        method: the method, with `between` ``reuse``.
        space: the trained parameters.
        memory: holds the component of the last sharpness-aware update.
        batch: one micro-batch.
        finish: see ``SharpnessAwareStep.descend``, as for `shared` and `reduce`.
        shared: the component is added once, to the gradient of the whole update.
        reduce: sums a gradient over the workers that share it.
        num_workers: how many they are.

    Returns:
        What the pass returned.
    """
    result, prior, gradients = run_apart(space, batch)
    if shared:
        gradients, prior = add_all(prior, gradients, overwrite=True), [None] * len(prior)
    if finish or not shared:
        alpha, component = float(method.look_alpha or 0.0), memory.component_of(space)
        gradients = add_component(
            gradients, component, memory.length_of_component(component), alpha, reduce, num_workers
        )
    space.put_gradients(add_all(prior, gradients, overwrite=True))
    return result


def run_apart(space: ParameterSpace, batch: Batch[Result]) -> tuple[Result, Gradients, Gradients]:
    """Run one pass whose gradient is not added to what the parameters hold; after an error they hold it again.

    Args:
        space: the trained parameters; after the pass they hold no gradients.
        batch: one micro-batch.

    Returns:
        What the pass returned, the gradients before it, its own.
    """
    prior = space.take_gradients()
    try:
        result = batch.run()
    except BaseException:
        space.put_gradients(prior)
        raise
    return result, prior, space.take_gradients()
