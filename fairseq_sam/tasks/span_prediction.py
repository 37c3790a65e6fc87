"""Classification of two spans of a sentence or of a pair: words in context (WiC), coreference (WSC)."""

# mypy: disallow-subclassing-any=False, warn-return-any=False, disallow-untyped-decorators=False

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from fairseq.data import (
    ConcatSentencesDataset,
    Dictionary,
    IdDataset,
    NestedDictionaryDataset,
    NumelDataset,
    NumSamplesDataset,
    OffsetTokensDataset,
    PrependTokenDataset,
    RawLabelDataset,
    RightPadDataset,
    SortDataset,
    StripTokenDataset,
    data_utils,
)
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING, OmegaConf, open_dict
from torch import Tensor, nn

from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.criterions import span_prediction  # noqa: F401  registers the criterion

NUM_SPANS = 2


class SpanHead(nn.Module):
    """Classifies the first token's features beside the mean features of two spans (Wang et al. 2019, section 3.3).

    The layers are those of RoBERTa's head, with three times the input. As a model gives its heads nothing but the
    features, the spans are set around its call.

    Args:
        like: the head that the model has made, with ``dense``, ``dropout`` and ``activation_fn``.
        num_classes: number of classes.

    Raises:
        ConfigurationError: if the model's heads are of another kind.
    """

    def __init__(self, like: Any, num_classes: int) -> None:
        super().__init__()
        missing = [name for name in ("dense", "dropout", "activation_fn") if not hasattr(like, name)]
        if missing:
            raise ConfigurationError(
                f"--task span_prediction needs a model whose classification heads have {missing[0]}, as RoBERTa's do; "
                f"got {type(like).__name__}"
            )
        size, inner = like.dense.in_features, like.dense.out_features
        self.dense = nn.Linear((1 + NUM_SPANS) * size, inner)
        self.dropout = nn.Dropout(like.dropout.p)
        self.activation_fn: Callable[[Tensor], Tensor] = like.activation_fn
        self.out_proj = nn.Linear(inner, num_classes)
        self._spans: Mapping[str, Tensor] | None = None

    @contextlib.contextmanager
    def reading(self, spans: Mapping[str, Tensor]) -> Iterator[None]:
        """Set the spans of the batch that the model is called with.

        Args:
            spans: ``start0``, ``end0``, ``start1``, ``end1``: first token and the one behind the last, shape (N,).
        """
        self._spans = spans
        try:
            yield
        finally:
            self._spans = None

    def forward(self, features: Tensor, **_: Any) -> Tensor:
        """Classify a batch.

        Args:
            features: shape (N, length, size).

        Returns:
            Scores, shape (N, classes).
        """
        if self._spans is None:
            raise RuntimeError("a SpanHead is called within `with head.reading(sample['spans'])`")
        parts = [features[:, 0]]
        for n in range(NUM_SPANS):
            parts.append(mean_of_span(features, self._spans[f"start{n}"], self._spans[f"end{n}"]))
        hidden = self.activation_fn(self.dense(self.dropout(torch.cat(parts, dim=1))))
        return self.out_proj(self.dropout(hidden))


def mean_of_span(features: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the mean of the features of a span.

    Args:
        features: shape (N, length, size).
        start: first token of each span, shape (N,).
        end: token behind its last one, shape (N,).

    Returns:
        Shape (N, size).
    """
    places = torch.arange(features.shape[1], device=features.device)
    inside = (places >= start[:, None]) & (places < end[:, None])
    weights = inside / (end - start)[:, None]
    return torch.einsum("nl,nlc->nc", weights.to(features.dtype), features)


@dataclass
class SpanPredictionConfig(FairseqDataclass):
    """The data and how the inputs are put together."""

    data: str = field(default=MISSING, metadata={"help": "folder with input0, span0, span1, label; input1 for pairs"})
    num_classes: int = field(default=2, metadata={"help": "number of classes"})
    init_token: Optional[int] = field(default=None, metadata={"help": "number of the token before the first input"})
    separator_token: Optional[int] = field(default=None, metadata={"help": "number of the token before the second"})
    no_shuffle: bool = field(default=False, metadata={"help": "keep the order of the data"})
    max_positions: int = field(default=512, metadata={"help": "most tokens of an instance"})
    classification_head_name: str = II("criterion.classification_head_name")
    seed: int = II("common.seed")


@register_task("span_prediction", dataclass=SpanPredictionConfig)
class SpanPredictionTask(FairseqTask):
    """Classification of two spans.

    The data folder is that of fairseq's sentence prediction, with a file ``span0/SPLIT.span`` and ``span1/SPLIT.span``
    beside it. Their lines are ``START END``: the first token of the span and the one behind its last, counted in its
    own input without init and separator tokens. Span 0 is in input 0; span 1 is in input 1 if there is one.

    Args:
        cfg: configuration.
        dictionary: of the inputs.
        label_dictionary: of the labels.
    """

    def __init__(self, cfg: Any, dictionary: Any, label_dictionary: Any) -> None:
        super().__init__(cfg)
        self.dictionary = dictionary
        self._label_dictionary = label_dictionary

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "SpanPredictionTask":
        """Load the dictionaries.

        Raises:
            ConfigurationError: if the data folder has none, or other labels than ``--num-classes``.
        """
        found = []
        for name in ("input0", "label"):
            path = Path(cfg.data, name, "dict.txt")
            if not path.is_file():
                raise ConfigurationError(
                    f"{cfg.data} is not prepared for --task span_prediction: it has no {name}/dict.txt"
                )
            found.append(Dictionary.load(str(path)))
        inputs, labels = found
        inputs.add_symbol("<mask>")
        num_labels = len(labels) - labels.nspecial
        if num_labels != cfg.num_classes:
            raise ConfigurationError(f"--num-classes {cfg.num_classes} is not the {num_labels} labels of {cfg.data}")
        return cls(cfg, inputs, labels)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> Any:
        """Load a split; without labels if it has none."""
        inputs = [self._indexed("input0", split), self._indexed("input1", split)]
        if inputs[0] is None:
            raise FileNotFoundError(f"{self.cfg.data} has no split {split}: no input0/{split}.bin")
        sizes = [np.asarray(each.sizes) for each in inputs if each is not None]
        spans = self._spans(split, sizes)
        tokens = self._joined(*inputs)
        parts = {
            "id": IdDataset(),
            "net_input": {
                "src_tokens": RightPadDataset(tokens, pad_idx=self.dictionary.pad()),
                "src_lengths": NumelDataset(tokens, reduce=False),
            },
            "nsentences": NumSamplesDataset(),
            "ntokens": NumelDataset(tokens, reduce=True),
            "spans": {name: RawLabelDataset(places.tolist()) for name, places in spans.items()},
        }
        labels = self._indexed("label", split)
        if labels is not None:
            answers = StripTokenDataset(labels, id_to_strip=self.label_dictionary.eos())
            parts["target"] = OffsetTokensDataset(answers, offset=-self.label_dictionary.nspecial)
        dataset = NestedDictionaryDataset(parts, sizes=[tokens.sizes])
        if not self.cfg.no_shuffle:
            with data_utils.numpy_seed(self.cfg.seed):
                dataset = SortDataset(dataset, sort_order=[np.random.permutation(len(tokens))])
        self.datasets[split] = dataset
        return dataset

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model with a head for spans."""
        with open_dict(cfg) if OmegaConf.is_config(cfg) else contextlib.nullcontext():
            cfg.max_positions = self.cfg.max_positions
        model = super().build_model(cfg, from_checkpoint)
        name = self.cfg.classification_head_name
        if not hasattr(model, "register_classification_head"):
            raise ConfigurationError(
                "--task span_prediction needs an encoder with classification heads, such as roberta"
            )
        model.register_classification_head(name, num_classes=self.cfg.num_classes)
        model.classification_heads[name] = SpanHead(model.classification_heads[name], self.cfg.num_classes)
        return model

    def max_positions(self) -> int:
        """Most tokens of an instance."""
        return self.cfg.max_positions

    @property
    def source_dictionary(self) -> Any:
        """Dictionary of the inputs."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Any:
        """Dictionary of the inputs, as fairseq's encoders expect."""
        return self.dictionary

    @property
    def label_dictionary(self) -> Any:
        """Dictionary of the labels."""
        return self._label_dictionary

    def _joined(self, first: Any, second: Any) -> Any:
        if self.cfg.init_token is not None:
            first = PrependTokenDataset(first, self.cfg.init_token)
        if second is None:
            return first
        if self.cfg.separator_token is not None:
            second = PrependTokenDataset(second, self.cfg.separator_token)
        return ConcatSentencesDataset(first, second)

    def _indexed(self, name: str, split: str) -> Any:
        return data_utils.load_indexed_dataset(str(Path(self.cfg.data, name, split)), self.dictionary)

    def _spans(self, split: str, sizes: list[Any]) -> dict[str, Any]:
        """Tokens of the spans in the inputs as they are put together."""
        shift = int(self.cfg.init_token is not None)
        shifts = [np.full_like(sizes[0], shift)]
        if len(sizes) > 1:
            shifts.append(shift + sizes[0] + int(self.cfg.separator_token is not None))
        spans = {}
        for n in range(NUM_SPANS):
            own = min(n, len(sizes) - 1)
            places = read_spans(Path(self.cfg.data, f"span{n}", f"{split}.span"), sizes[own] - 1)
            spans[f"start{n}"], spans[f"end{n}"] = (places + shifts[own][:, None]).T
        return spans


def read_spans(path: Path, num_tokens: Any) -> Any:
    """Read a file of spans.

    Args:
        path: lines ``START END``.
        num_tokens: tokens of each sentence, its end not counted, shape (N,).

    Returns:
        Shape (N, 2).

    Raises:
        ConfigurationError: names the line that is no span of its sentence.
    """
    if not path.is_file():
        raise ConfigurationError(f"--task span_prediction needs {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) != len(num_tokens):
        raise ConfigurationError(f"{path} has {len(lines)} lines, but there are {len(num_tokens)} instances")
    places = []
    for number, (line, most) in enumerate(zip(lines, num_tokens.tolist(), strict=True), start=1):
        words = line.split()
        if len(words) != 2 or not all(word.isdigit() for word in words) or not int(words[0]) < int(words[1]) <= most:
            raise ConfigurationError(
                f"{path}, line {number}: expected START END with 0 <= START < END <= {most}, the number of tokens; "
                f"got {line!r}"
            )
        places.append([int(word) for word in words])
    return np.array(places)
