"""Slices of fairseq's samples: some instances of a batch, with their counts."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_sam.adapter.embeddings import dictionaries
from fairseq_sam.core.tensors import on_device

COUNTS = ("ntokens", "nsentences")
# What the model is called with. Sentence ranking calls it once for each of net_input1, net_input2, …
INPUT = re.compile(r"net_input\d*")
# Tensors of token columns. Any other tensor with columns keeps the sample from being trimmed.
SOURCE, PREVIOUS, TARGET = "src_tokens", "prev_output_tokens", "target"
Replace = Callable[[Tensor, Tensor], None]  # puts a new tensor in the place of an old one


class UnsliceableBatchError(ValueError):
    """The instances of a batch cannot be told apart."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"this method needs single instances, but the task's batches cannot be sliced: {reason}; use a method "
            "that takes whole batches, such as --optimizer sam or ga_sam (python -m fairseq_sam lists all)"
        )


class Slicer:
    """Cuts samples of translation, language models, masked ones, sentence prediction and ranking, and denoising.

    A sample is a dictionary whose tensors have the instance as their first dimension, with the counts ``ntokens`` and
    ``nsentences`` beside them.

    Args:
        task: the fairseq task; its dictionaries know the padding symbol.
    """

    def __init__(self, task: Any) -> None:
        self._task = task

    def num_instances(self, sample: Any) -> int:
        """Return the number of instances.

        Args:
            sample: what a dataset's collater made.

        Raises:
            UnsliceableBatchError: if the sample does not say.
        """
        if not isinstance(sample, dict) or not _inputs(sample):
            keys = f"the keys {', '.join(map(str, sample))}" if isinstance(sample, dict) else type(sample).__name__
            raise UnsliceableBatchError(f"expected a sample with net_input, got {keys}")
        ids = sample.get("id")
        if torch.is_tensor(ids) and ids.dim() == 1:
            return len(ids)
        parts = {**_inputs(sample), TARGET: sample.get(TARGET)}
        sizes = {path: len(t) for path, t in _tensors(parts) if t.dim()}
        if len(set(sizes.values())) != 1:
            raise UnsliceableBatchError(f"the sample has no id, and its tensors have the lengths {sizes}")
        return next(iter(sizes.values()))

    def select(self, sample: Any, indices: Sequence[int]) -> Any:
        """Return a sample of some instances. The given one stays as it is.

        Args:
            sample: what a dataset's collater made.
            indices: instances in the wanted order, at least one.

        Returns:
            A new sample; the given one for all instances in their order.

        Raises:
            UnsliceableBatchError: if a part of the sample does not belong to single instances.
        """
        number = self.num_instances(sample)
        if list(indices) == list(range(number)):
            return sample
        cut = _Cut(number, indices)
        chosen = {key: cut(key, value) for key, value in sample.items() if key not in COUNTS}
        for key, value in chosen.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                raise UnsliceableBatchError(f"the sample's {key} is a number of the whole batch ({value})")
        if "ntokens" in sample:
            chosen["ntokens"] = self._num_tokens(sample, list(indices))
        if "nsentences" in sample:
            chosen["nsentences"] = _like(sample["nsentences"], len(indices))
        _trim(chosen, self._pad())
        return {key: chosen[key] for key in sample}

    def _pad(self) -> int | None:
        dictionary = next(dictionaries(self._task), None)
        return None if dictionary is None else int(dictionary.pad())

    def _num_tokens(self, sample: Any, indices: Sequence[int]) -> Any:
        """Tokens of some instances, in the unit in which the dataset counted those of the batch."""
        total = int(sample["ntokens"])
        for counts in self._token_counts(sample):
            if int(counts.sum()) == total:
                return _like(sample["ntokens"], int(counts[list(indices)].sum()))
        raise UnsliceableBatchError(f"ntokens is {total}, which is neither its target tokens nor its source tokens")

    def _token_counts(self, sample: Any) -> Iterator[Tensor]:
        """Tokens of each instance as datasets may count them, the likeliest first: targets of sequence to sequence."""
        net_input, pad, target = next(iter(_inputs(sample).values())), self._pad(), sample.get(TARGET)
        target = target[0] if isinstance(target, list | tuple) and target else target
        has_tokens = torch.is_tensor(target) and target.dim() == 2 and not target.is_floating_point()
        targets = [target.ne(pad).sum(1)] if has_tokens and pad is not None else []
        if PREVIOUS in net_input:
            yield from targets
        if torch.is_tensor(net_input.get("src_lengths")):
            yield net_input["src_lengths"]
        if torch.is_tensor(net_input.get(SOURCE)) and pad is not None:
            yield net_input[SOURCE].ne(pad).sum(1)
        if PREVIOUS not in net_input:
            yield from targets


class _Cut:
    """Picks instances from one part of a sample."""

    def __init__(self, number: int, indices: Sequence[int]) -> None:
        self._number = number
        self._indices = list(indices)

    def __call__(self, path: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self(f"{path}.{key}", part) for key, part in value.items()}
        if torch.is_tensor(value):
            if value.dim() == 0 or len(value) != self._number:
                raise UnsliceableBatchError(
                    f"{path} has the shape {tuple(value.shape)}, but there are {self._number} instances"
                )
            return value[on_device(self._indices, value.device, torch.long)]
        if isinstance(value, list | tuple):
            return type(value)(self._parts(path, value))
        return value

    def _parts(self, path: str, value: Any) -> list[Any]:
        """A list with one entry for each instance, or a list of tensors that have the instance first (LM targets)."""
        if all(torch.is_tensor(part) and part.dim() and len(part) == self._number for part in value):
            return [self(path, part) for part in value]
        if len(value) != self._number:
            raise UnsliceableBatchError(f"{path} is a list of {len(value)}, but there are {self._number} instances")
        return [value[i] for i in self._indices]


def _inputs(sample: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {key: value for key, value in sample.items() if INPUT.fullmatch(key)}


def _trim(sample: dict[str, Any], pad: int | None) -> None:
    """Drop columns that are padding in all rows, of all tensors that share them.

    The decoder's input shares them with the target, or where the target is a label (a classification by BART), with
    the source.
    """
    inputs, targets = list(_inputs(sample).values()), sample.get(TARGET)
    targets = list(targets) if isinstance(targets, list | tuple) else [targets]
    known = {id(part.get(key)) for part in inputs for key in (SOURCE, PREVIOUS)} | set(map(id, targets))
    if pad is None or any(t.dim() > 1 and id(t) not in known for _, t in _tensors(sample)):
        return
    replace = _replacer(sample, *inputs)
    for net_input in inputs:
        _trim_input(net_input, targets, pad, replace)


def _trim_input(net_input: dict[str, Any], targets: list[Any], pad: int, replace: Replace) -> None:
    source, previous = net_input.get(SOURCE), net_input.get(PREVIOUS)
    if not torch.is_tensor(source):
        return
    tokens = source if previous is None else previous
    # The labels of a classification may also have two dimensions: (sentences, 1).
    columns = [tokens, *(t for t in targets if torch.is_tensor(t) and t.shape == tokens.shape)]
    if previous is None or len(columns) > 1:
        _trim_together(columns, pad, replace)
    if previous is not None:
        _trim_together([source] if len(columns) > 1 else [source, previous], pad, replace)


def _trim_together(tensors: Sequence[Tensor], pad: int, replace: Replace) -> None:
    if len({t.shape for t in tensors}) != 1 or tensors[0].dim() != 2:
        return
    used = torch.stack([t.ne(pad).any(0) for t in tensors]).any(0).nonzero()
    if len(used) == 0:
        return
    first, last = int(used[0]), int(used[-1])
    if (first, last) != (0, tensors[0].shape[1] - 1):
        for tensor in tensors:
            replace(tensor, tensor[:, first : last + 1].contiguous())


def _replacer(*holders: dict[str, Any]) -> Replace:
    """A function that puts a new tensor in the place of an old one, wherever it stands."""

    def replace(old: Tensor, new: Tensor) -> None:
        for holder in holders:
            for key, value in holder.items():
                if value is old:
                    holder[key] = new
                elif isinstance(value, list | tuple):
                    holder[key] = type(value)(new if part is old else part for part in value)

    return replace


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a nested sample, with their paths."""
    if torch.is_tensor(value):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _tensors(part, f"{path}[{number}]")


def _like(original: Any, number: int) -> Any:
    """A count of the type of the original."""
    if torch.is_tensor(original):
        return torch.full_like(original, number)
    return type(original)(number)
