"""The parameters that are trained, their names, and the layer that each belongs to."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fairseq_sam.core.tensors import Gradients, without_views

# Modules whose buffers are never written, such as tables of positions: they need not be copied and put back.
TABLES: set[type[nn.Module]] = set()


@dataclass(frozen=True)
class ParameterSpace:
    """The trained parameters of a model.

    Attributes:
        names: name of each parameter.
        tensors: the parameters; a tied parameter appears once.
        layers: for each parameter, the number of the module that owns it directly.
        perturbed: for each parameter, whether the ascent may move it.
        masters: for each parameter, the tensor in higher precision that the optimizer updates, or None.
        buffers: the modules' buffers, but for those of ``TABLES``.
    """

    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]
    layers: tuple[int, ...]
    perturbed: tuple[bool, ...]
    masters: tuple[Tensor | None, ...]
    buffers: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls,
        modules: Mapping[str, nn.Module],
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        exclude: str = "",
    ) -> "ParameterSpace":
        """Collect the parameters of modules that require a gradient.

        Args:
            modules: modules by the prefix that their parameters' names get (may be empty).
            parameters: the parameters that are trained; default all. Those that no module owns form a layer each.
            exclude: regular expression on names of parameters that are trained but not perturbed.

        Returns:
            The space, in the order of the modules' parameters.

        Raises:
            ValueError: if no parameter is left to train or to perturb.
        """
        wanted = None if parameters is None else {id(parameter): parameter for parameter in parameters}
        rows: dict[int, tuple[str, nn.Parameter, int]] = {}
        buffers: dict[int, Tensor] = {}
        layer = 0
        for prefix, root in modules.items():
            for path, module in root.named_modules():
                for name, parameter in module._parameters.items():  # the public iterators take ten times as long
                    if parameter is None or not parameter.requires_grad or id(parameter) in rows:
                        continue
                    if wanted is None or id(parameter) in wanted:
                        full_name = ".".join(part for part in (prefix, path, name) if part)
                        rows[id(parameter)] = full_name, parameter, layer
                if type(module) not in TABLES:
                    buffers.update((id(buffer), buffer) for buffer in module._buffers.values() if buffer is not None)
                layer += 1
        for number, (key, parameter) in enumerate((wanted or {}).items()):
            if key not in rows and parameter.requires_grad:
                rows[key] = (f"parameter.{number}", parameter, layer + number)
        if not rows:
            raise ValueError("the model has no parameter that requires a gradient")
        names, tensors, layers = zip(*rows.values(), strict=True)
        pattern = re.compile(exclude) if exclude else None
        perturbed = tuple(pattern is None or not pattern.search(name) for name in names)
        if not any(perturbed):
            raise ValueError(
                f"exclude (--sam-exclude) must leave a parameter to perturb, but {exclude!r} matches all; "
                "exclude some only, or train with the base optimizer"
            )
        return cls(names, tensors, layers, perturbed, (None,) * len(names), tuple(buffers.values()))

    def with_masters(self, masters: Sequence[Tensor]) -> "ParameterSpace":
        """Return the same space with a tensor in higher precision for each parameter.

        Args:
            masters: the tensors that the optimizer updates, in the order and the shapes of the parameters.

        Raises:
            ValueError: if their shapes differ from the parameters'.
        """
        if [master.shape for master in masters] != [tensor.shape for tensor in self.tensors]:
            raise ValueError(f"expected {len(self.tensors)} masters with the parameters' shapes, got {len(masters)}")
        return replace(self, masters=tuple(masters))

    def take_gradients(self) -> Gradients:
        """Take the gradients out of ``p.grad``; views are copied, since the next backward may write there."""
        gradients = without_views([tensor.grad for tensor in self.tensors])
        for tensor in self.tensors:
            tensor.grad = None
        return gradients

    def put_gradients(self, gradients: Gradients) -> None:
        """Put gradients into ``p.grad``, in place of what is there."""
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            tensor.grad = gradient
