"""Calls of a model that a pass leaves out of the perturbation: for losses of which only a part is made robust.

Where a loss runs the model twice, ``L(h_1(w), h_2(w))``, and calls it for ``h_1`` by ``call_unperturbed``, a step looks
for the perturbation a of ``h_2`` alone, and descends at it::

    a = argmax over ||a|| <= epsilon of L(h_1(w), h_2(w + a)),   gradient of L(h_1(w), h_2(w + a)) by w
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fairseq_sam.core.method import Method


class Perturbation(Protocol):
    """What is moved in a pass."""

    method: Method

    def call_unperturbed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model as if nothing were moved."""


class _Pass(NamedTuple):
    perturbation: Perturbation
    ascends: bool


_running: list[_Pass] = []  # the pass that runs, if it belongs to a sharpness-aware step


@contextmanager
def running(perturbation: Perturbation, *, ascends: bool = False) -> Iterator[None]:
    """Say that a pass of a step runs.

    Args:
        perturbation: what is moved in it.
        ascends: its gradient is one to ascend.
    """
    try:
        _running[:] = [_Pass(perturbation, ascends)]
        yield
    finally:
        none_runs()


def none_runs() -> None:
    """Say that no pass runs, also if an interrupt has kept `running` from being left."""
    _running.clear()


def call_unperturbed(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a model at its unperturbed weights (or with unperturbed word embeddings), also from inside a pass.

    A gradient goes to the model's parameters as ever, but in a pass that looks for a perturbation of the weights the
    output is a constant: the ascent gradient is that of the calls that are perturbed. Outside the passes of a step this
    is ``model(*args, **kwargs)``. The weights are not moved back for the call, others take their places in it.

    Args:
        model: the model, wrapped for distributed training or not. It must read its parameters in the call, not in
            backward: no activation checkpointing.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        Its output.

    Raises:
        ValueError: if the method descends along gradients of the ascent, which lack this call's part, or the model has
            recurrent modules, whose kernels read their weights from elsewhere.
    """
    if not _running:
        return model(*args, **kwargs)
    perturbation, ascends = _running[0]
    method = perturbation.method
    is_constant = ascends and method.where == "weights" and method.epsilon > 0
    if is_constant:
        check_descent(method)
    output = perturbation.call_unperturbed(model, args, kwargs)
    return tree_map_only(Tensor, Tensor.detach, output) if is_constant else output


def check_descent(method: Method) -> None:
    """Refuse a method whose update has gradients of ascent passes in it.

    Raises:
        ValueError: names the flag and what to choose instead.
    """
    if method.where == "weights" and method.epsilon > 0 and method.needs_clean_gradient:
        raise ValueError(
            f"descent (--sam-descent) {method.descent} with between (--sam-between) {method.between} descends along "
            "gradients of the ascent, and where a part of the loss is not perturbed they lack that part's; use "
            "--sam-descent last and --sam-between plain, as --optimizer sam and delta_sam do"
        )


class _Substitute(torch.autograd.Function):
    """A value in the place of a parameter, which gets its gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class Places:
    """Where a model's parameters stand while other values are in their places."""

    def __init__(self) -> None:
        self._places: list[tuple[dict[str, Any], str, nn.Parameter]] = []

    def call(
        self, model: nn.Module, weights: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a model with other values in the places of its parameters, which get the gradient.

        Args:
            model: the model.
            weights: value by the ``id`` of the parameter.
            args: the call's arguments.
            kwargs: the call's keyword arguments.

        Raises:
            ValueError: if the model has recurrent modules.
        """
        modules = list(model.modules())
        if any(isinstance(module, nn.RNNBase) for module in modules):
            raise ValueError("a call without the perturbation cannot be made of a model with nn.RNN, nn.LSTM or nn.GRU")
        every = [(module._parameters, key, p) for module in modules for key, p in module._parameters.items()]
        places = [(holder, key, p) for holder, key, p in every if p is not None and id(p) in weights]
        parameters = {id(p): p for _, _, p in places}
        values: dict[int, Any] = {
            number: _Substitute.apply(p, weights[number])  # type: ignore[no-untyped-call]
            for number, p in parameters.items()
        }
        try:
            self._places = places
            for holder, key, p in places:
                holder[key] = values[id(p)]
            return model(*args, **kwargs)
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Put the parameters back, also if an interrupt has kept `call` from doing so."""
        for holder, key, p in self._places:
            holder[key] = p
        self._places = []
