"""The mean loss of a model over some data, as a function of its weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_sam.core.method import Method
from fairseq_sam.core.norms import scale_
from fairseq_sam.core.perturbation import WeightPerturbation
from fairseq_sam.core.space import ParameterSpace

# From model and batch to the batch's summed loss, a scalar with gradient, and its weight, such as its number of tokens.
LossSum = Callable[[nn.Module, Any], tuple[Tensor, float]]


class Objective:
    """``L(w)``: the sum of all batches' losses, divided by the sum of their weights.

    The model is in evaluation mode while something is measured and each of its modules in its own mode afterwards;
    ``p.grad`` is not touched.

    Attributes:
        weight: sum of the batches' weights, 0 before the first pass over them.

    Args:
        model: the model.
        batches: the data; iterated once for each pass over it.
        loss_sum: from model and batch to the batch's summed loss (a scalar with gradient) and its weight, such as its
            number of tokens or instances.
        exclude: regular expression; parameters whose name it matches are held constant.

    Raises:
        ValueError: if no parameter is left.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss_sum: LossSum, *, exclude: str = "") -> None:
        self.model = model
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        self.space = _only_perturbed(ParameterSpace.of({"": model}, exclude=exclude))
        self.weight = 0.0
        self._loss_sum = loss_sum

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weights w."""
        return self.space.tensors

    @property
    def size(self) -> int:
        """How many numbers w has."""
        return sum(parameter.numel() for parameter in self.parameters)

    def loss(self) -> float:
        """Return ``L(w)``."""
        with torch.no_grad(), evaluating(self.model):
            pairs = [self._loss_sum(self.model, batch) for batch in self.batches]
        self._weigh(sum(weight for _, weight in pairs))
        return sum(float(loss) for loss, _ in pairs) / self.weight

    def loss_and_gradient(self) -> tuple[float, list[Tensor]]:
        """Return ``L(w)`` and its gradient, a tensor for each parameter."""
        total, weight = 0.0, 0.0
        gradients = self.zeros()
        with evaluating(self.model), differentiable():
            for batch in self.batches:
                loss, size = self._loss_sum(self.model, batch)
                self._add_gradient(gradients, loss)
                total, weight = total + float(loss.detach()), weight + size
        self._weigh(weight)
        scale_(gradients, 1.0 / weight)
        return total / weight, gradients

    def gradient_of(self, batch: Any) -> tuple[list[Tensor], float]:
        """Return the gradient of one batch's summed loss, and its weight."""
        gradients = self.zeros()
        with evaluating(self.model), differentiable():
            loss, weight = self._loss_sum(self.model, batch)
            self._add_gradient(gradients, loss)
        return gradients, weight

    def hessian_product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``H v``, H the Hessian of L at w.

        Args:
            vectors: v, a tensor of each parameter's shape.

        Returns:
            The product, in the same shapes.
        """
        products, weight = self.zeros(), 0.0
        with evaluating(self.model), twice_differentiable():
            for batch in self.batches:
                loss, size = self._loss_sum(self.model, batch)
                weight += size
                first = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
                pairs = [(g, v) for g, v in zip(first, vectors, strict=True) if g is not None and g.requires_grad]
                if pairs:  # else the loss is linear
                    along = sum((g * v).sum() for g, v in pairs)
                    self._add_gradient(products, along)
        self._weigh(weight)
        scale_(products, 1.0 / weight)
        return products

    def perturbation(self, method: Method) -> WeightPerturbation:
        """Return a perturbation of w by a method, at 0; its ``applied()`` moves w and restores it bit for bit."""
        return WeightPerturbation(method, self.space)

    @contextmanager
    def moving(self) -> Iterator[Callable[[Sequence[Tensor]], None]]:
        """Move the weights, and copy them back bit for bit at the end.

        Yields:
            A function that puts the weights at ``w + d``, given d, a tensor of each parameter's shape.
        """
        backup = [parameter.detach().clone() for parameter in self.parameters]

        def move(displacement: Sequence[Tensor]) -> None:
            with torch.no_grad():
                for parameter, origin, shift in zip(self.parameters, backup, displacement, strict=True):
                    parameter.data.copy_(origin + shift)

        try:
            yield move
        finally:
            with torch.no_grad():
                for parameter, origin in zip(self.parameters, backup, strict=True):
                    parameter.data.copy_(origin)

    def zeros(self) -> list[Tensor]:
        """A zero for each parameter, in its shape."""
        return [torch.zeros_like(parameter) for parameter in self.parameters]

    def _weigh(self, weight: float) -> None:
        if not weight > 0:
            raise ValueError(f"expected batches with a positive total weight, got {weight:g} in all")
        self.weight = weight

    def _add_gradient(self, totals: list[Tensor], loss: Any) -> None:
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def differentiable() -> Iterator[None]:
    """Let recurrent layers run by kernels that have derivatives in evaluation mode, which cuDNN's have not."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Let attention and recurrent layers run by kernels that have second derivatives."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


def _only_perturbed(space: ParameterSpace) -> ParameterSpace:
    chosen = [i for i, perturbed in enumerate(space.perturbed) if perturbed]
    return ParameterSpace(
        names=tuple(space.names[i] for i in chosen),
        tensors=tuple(space.tensors[i] for i in chosen),
        layers=tuple(space.layers[i] for i in chosen),
        perturbed=(True,) * len(chosen),
        masters=(None,) * len(chosen),
        buffers=space.buffers,
    )
