"""Hooks on the outputs of word embeddings, for methods that perturb what a model reads instead of its weights."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Perturb = Callable[[int, Tensor, Tensor], Tensor]


class WordEmbeddings:
    """The word embeddings of a model, whose outputs can be perturbed for a while.

    While `perturbed` is open, an output o becomes ``perturb(call, is_token, o)``.

    Args:
        modules: the embedding modules; one that is listed twice counts once.
        padding: index of the padding word, for modules without a ``padding_idx`` of their own. None: no padding.
    """

    def __init__(self, modules: Sequence[nn.Module], padding: int | None = None) -> None:
        self.modules: tuple[nn.Module, ...] = tuple(dict.fromkeys(modules))
        self.padding = padding
        self._hooks: list[Any] = []
        self._is_paused = False

    @classmethod
    def of(cls, model: nn.Module) -> "WordEmbeddings":
        """Find the embeddings of a plain PyTorch model: all its ``nn.Embedding`` modules.

        Positions and segments, if the model embeds them with ``nn.Embedding``, are among them: list the word
        embeddings yourself then, ``SharpnessAware(…, embeddings=WordEmbeddings([model.words]))``.

        Raises:
            ValueError: if there is none.
        """
        modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        if not modules:
            raise ValueError(
                f"{type(model).__name__} has no nn.Embedding; list its word embeddings: "
                "SharpnessAware(..., embeddings=WordEmbeddings([module]))"
            )
        return cls(modules)

    @contextlib.contextmanager
    def perturbed(self, perturb: Perturb) -> Iterator[None]:
        """Let ``perturb(call, is_token, o)`` replace each output o (batch, length, dimension) inside the context.

        Args:
            perturb: ``call`` counts the calls of all modules together, from 0 since the context was opened: a table
                that is shared by encoder and decoder is called for the source, then for the target. ``is_token``
                (batch, length, 1) is False at padding.
        """
        num_calls = 0

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            nonlocal num_calls
            if self._is_paused:
                return None
            words = args[0] if args else next(iter(kwargs.values()))
            call, num_calls = num_calls, num_calls + 1
            return perturb(call, self._is_token(module, words, output), output)

        try:
            for module in self.modules:
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            # A hook that stays would be copied with the model, by an exponential moving average for instance.
            self.restore()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let outputs inside the context be what the modules give; these calls do not count."""
        try:
            self._is_paused = True
            yield
        finally:
            self._is_paused = False

    def restore(self) -> None:
        """Let outputs be what the modules give, also if an interrupt has kept `perturbed` from being left."""
        self._is_paused = False
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def _is_token(self, module: nn.Module, words: Tensor, output: Tensor) -> Tensor:
        if words.shape != output.shape[:-1]:
            raise ValueError(
                f"{type(module).__name__} maps words of shape {tuple(words.shape)} to {tuple(output.shape)}; a word "
                "embedding adds one axis to the shape of its words"
            )
        own = getattr(module, "padding_idx", None)
        padding = self.padding if own is None else own
        is_token = torch.ones_like(words, dtype=torch.bool) if padding is None else words != padding
        return is_token.unsqueeze(-1)
