"""What the engine asks of a batch: passes over all of it or over some of its instances."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fairseq_sam.core.tensors import on_device

Loss = Tensor | float
Weigh = Callable[..., Tensor]  # weights of instances from their losses and further numbers of each, all of shape (n,)


class Sized(Protocol):
    """What a pass returns."""

    @property
    def sample_size(self) -> Any:
        """By what the gradient of the pass is divided: tokens, sentences or instances."""


Result = TypeVar("Result", bound=Sized)


class Batch(Protocol[Result]):
    """A batch of instances, and the passes over it.

    Each pass runs at the model's weights as they are. A backward pass adds the gradient of the **sum** over instances
    to ``p.grad``; `sample_size` of the result is what the caller divides it by.
    """

    def __len__(self) -> int:
        """Return the number of instances."""

    def run(self) -> Result:
        """Run forward and backward."""

    def run_with_losses(self) -> tuple[Result, Tensor]:
        """Run forward and backward; return the losses of the instances as well, shape (N,)."""

    def run_weighted(self, weigh: Weigh, *numbers: Tensor) -> tuple[Result, Tensor]:
        """Run forward, and backward of ``sum_i weights_i l_i``.

        Args:
            weigh: from the losses of some instances and the rest of their `numbers`, their weights.
            numbers: of every instance, shape (N,) each.

        Returns:
            The result of the unweighted batch, and the losses of the instances, shape (N,).
        """

    def losses(self) -> Tensor:
        """Run forward without gradient; return the losses of the instances, shape (N,)."""

    def select(self, indices: Sequence[int]) -> "Batch[Result]":
        """Return a batch of some instances, in the given order."""


class PassResult(NamedTuple):
    """What a pass of a plain PyTorch loop returns."""

    loss: Loss
    sample_size: float


class ClosureBatch:
    """A closure as a batch whose instances cannot be told apart.

    Args:
        closure: forward and backward at the current weights, returns the loss.
        sample_size: by what the closure's gradient is divided; 1 for a mean loss.
        parameters: of which at least one must have a gradient afterwards; none for no check.
    """

    def __init__(
        self, closure: Callable[[], Loss], sample_size: float = 1.0, parameters: Sequence[Tensor] = ()
    ) -> None:
        self._closure = closure
        self._sample_size = sample_size
        self._parameters = parameters

    def __len__(self) -> int:
        """Return 1: the closure is one piece."""
        return 1

    def run(self) -> PassResult:
        """Run the closure.

        Raises:
            TypeError: if it does not return its loss.
            ValueError: if it leaves no gradient.
        """
        with torch.enable_grad():
            loss = self._closure()
        if not isinstance(loss, Tensor | float | int):
            raise TypeError(f"the closure must return the loss, a tensor or a number, got {type(loss).__name__}")
        if self._parameters and all(p.grad is None for p in self._parameters):
            raise ValueError("the closure left no gradient in any trained parameter; call loss.backward() in it")
        return PassResult(loss.detach() if isinstance(loss, Tensor) else loss, self._sample_size)

    def run_with_losses(self) -> tuple[PassResult, Tensor]:
        """Refuse."""
        raise self.refusal()

    def run_weighted(self, weigh: Weigh, *numbers: Tensor) -> tuple[PassResult, Tensor]:
        """Refuse."""
        raise self.refusal()

    def losses(self) -> Tensor:
        """Refuse."""
        raise self.refusal()

    def select(self, indices: Sequence[int]) -> "ClosureBatch":
        """Refuse."""
        raise self.refusal()

    @staticmethod
    def refusal(method: str = "this method") -> TypeError:
        """Return the error that says what to pass in place of a closure."""
        return TypeError(
            f"{method} needs single instances of the batch, and a closure is one piece; pass a batch instead, such "
            "as fairseq_sam.InstanceBatch(losses, inputs, targets)"
        )


class InstanceBatch:
    """A batch for methods that need single instances, in a plain PyTorch loop. Its loss is the mean over instances.

    Args:
        losses: from `data`, the loss of every instance, a differentiable tensor of shape (N,).
        data: tensors whose first dimension is the instance, N >= 1 of them.
        backward: runs backward from a loss; for a gradient scaler, ``lambda loss: scaler.scale(loss).backward()``.

    Raises:
        ValueError: if `data` is empty or its tensors disagree on N.

    Examples:
        >>> model = torch.nn.Linear(3, 1)
        >>> batch = InstanceBatch(lambda x: model(x).square().mean(1), torch.ones(4, 3))
        >>> len(batch), len(batch.select([0, 2]))
        (4, 2)
    """

    def __init__(
        self, losses: Callable[..., Tensor], *data: Tensor, backward: Callable[[Tensor], None] | None = None
    ) -> None:
        sizes = {len(tensor) for tensor in data}
        if len(sizes) != 1 or sizes == {0}:
            raise ValueError(f"expected tensors with one common first dimension >= 1, got {[t.shape for t in data]}")
        self._losses = losses
        self._data = data
        self._backward = backward or Tensor.backward

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self._data[0])

    def run(self) -> PassResult:
        """Run forward and backward."""
        return self.run_with_losses()[0]

    def run_with_losses(self) -> tuple[PassResult, Tensor]:
        """Run forward and backward; return the losses of the instances as well."""
        losses = self._forward()
        self._backward(losses.sum())
        return self._result(losses), losses.detach()

    def run_weighted(self, weigh: Weigh, *numbers: Tensor) -> tuple[PassResult, Tensor]:
        """Run forward, and backward of the weighted sum of the losses; return the losses of the instances as well."""
        losses = self._forward()
        self._backward((weigh(losses.detach(), *numbers).to(losses) * losses).sum())
        return self._result(losses), losses.detach()

    def losses(self) -> Tensor:
        """Run forward without gradient; return the losses of the instances."""
        with torch.no_grad():
            return self._forward()

    def select(self, indices: Sequence[int]) -> "InstanceBatch":
        """Return a batch of some instances."""
        data = [tensor[_rows(indices, tensor.device)] for tensor in self._data]
        return InstanceBatch(self._losses, *data, backward=self._backward)

    def _forward(self) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            losses = self._losses(*self._data)
        if losses.shape != (len(self),):
            raise ValueError(
                f"losses must return one loss for each instance: expected shape {(len(self),)}, got "
                f"{tuple(losses.shape)}"
            )
        return losses

    def _result(self, losses: Tensor) -> PassResult:
        return PassResult(losses.detach().mean(), float(len(self)))


def _rows(indices: Sequence[int], device: torch.device) -> Tensor | slice:
    """What picks rows of a tensor on a device, without waiting for it."""
    if isinstance(indices, range) and indices.step == 1 and indices.start >= 0:
        return slice(indices.start, indices.stop)
    return on_device(list(indices), device, torch.long)
