"""Word embeddings of fairseq's models."""

from collections.abc import Iterator
from typing import Any

from fairseq.modules import LearnedPositionalEmbedding
from torch import nn

from fairseq_sam.core.embeddings import WordEmbeddings

NOT_WORDS = ("position", "segment")


def word_embeddings(model: nn.Module, task: Any) -> WordEmbeddings:
    """Find the word embeddings of a fairseq model, never those of positions or segments.

    They are the modules that fairseq names ``embed_tokens``, of any class; in a model without such names, the
    ``nn.Embedding`` modules with as many rows as one of the task's dictionaries has words. A table that encoder and
    decoder share is one module.

    Args:
        model: the model, wrapped for distributed training or not.
        task: its task, for the dictionaries and their padding.

    Raises:
        ValueError: if none is found.
    """
    vocabularies = list(dictionaries(task))
    padding = vocabularies[0].pad() if vocabularies else None
    named = dict(model.named_modules())
    modules = [module for name, module in named.items() if name.rpartition(".")[2] == "embed_tokens"]
    if not modules:
        sizes = {len(dictionary) for dictionary in vocabularies}
        modules = [module for name, module in named.items() if _embeds_words(name, module, sizes)]
    if not modules:
        counts = ", ".join(map(str, sorted(sizes))) or "it has none"
        raise ValueError(
            f"no word embeddings in {type(model).__name__}: no module is named embed_tokens, and no nn.Embedding has "
            f"as many rows as a dictionary of the task has words ({counts})"
        )
    return WordEmbeddings(modules, padding)


def _embeds_words(name: str, module: nn.Module, sizes: set[int]) -> bool:
    if not isinstance(module, nn.Embedding) or isinstance(module, LearnedPositionalEmbedding):
        return False
    return module.num_embeddings in sizes and not any(part in name for part in NOT_WORDS)


def dictionaries(task: Any) -> Iterator[Any]:
    """Yield a task's dictionaries, source first; tasks differ in which they have and where."""
    for name in ("source_dictionary", "target_dictionary", "dictionary"):
        try:
            dictionary = getattr(task, name, None)
        except (NotImplementedError, KeyError):  # several languages, or no text on this side
            continue
        if dictionary is not None:
            yield dictionary
    yield from getattr(task, "dicts", {}).values()
