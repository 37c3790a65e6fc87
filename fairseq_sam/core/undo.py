"""All of it or nothing: what an update has changed is put back after an error."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from fairseq_sam.core.tensors import copies, copy_


@contextmanager
def all_or_nothing(tensors: Sequence[Tensor], buffers: Sequence[Tensor], *holders: object) -> Iterator[None]:
    """Put everything back as it was when anything is raised inside.

    Args:
        tensors: parameters whose ``grad`` is put back, by reference.
        buffers: what is copied back.
        holders: objects whose attributes are put back, by reference.
    """
    gradients = [tensor.grad for tensor in tensors]
    values = copies(buffers)
    attributes = [dict(vars(holder)) for holder in holders]
    try:
        yield
    except GeneratorExit:  # an interrupt came after the block's end; Python closes this later, when all is done
        raise
    except BaseException:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        copy_(buffers, values)
        for holder, before in zip(holders, attributes, strict=True):
            vars(holder).update(before)
        raise
