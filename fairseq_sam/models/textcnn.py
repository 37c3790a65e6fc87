"""TextCNN (Kim 2014), the base model of GA-SAM's IMDB experiment (GA-SAM B.1)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor, nn
from torch.nn import functional

from fairseq_sam.adapter.errors import ConfigurationError

WIDTHS = "3,4,5"


@dataclass
class TextCNNConfig(FairseqDataclass):
    """Sizes of a TextCNN: those of GA-SAM B.1; dropout is that of Kim 2014."""

    embed_dim: int = field(default=500, metadata={"help": "size of a word's embedding"})
    filter_widths: str = field(default=WIDTHS, metadata={"help": "words that each kind of filter sees, with commas"})
    num_filters: int = field(default=500, metadata={"help": "filters of each width"})
    dropout: float = field(default=0.5, metadata={"help": "dropout of the pooled features"})


@register_model("textcnn", dataclass=TextCNNConfig)
class TextCNN(BaseFairseqModel):
    """Embeddings, convolutions of several widths, maximum over time, a linear classifier.

    For ``--task sentence_prediction``, whose first classification head it is. A filter sees only words: what is beyond
    the end of a sentence in a batch counts for nothing, so a prediction does not depend on the other sentences. A
    sentence shorter than a filter is one window of it, filled with zeros.

    Args:
        num_words: size of the dictionary.
        padding: number of the padding word.
        embed_dim: size of an embedding.
        widths: words that each kind of filter sees, each >= 1.
        num_filters: filters of each width.
        dropout: probability of dropping a pooled feature.
    """

    def __init__(
        self, num_words: int, padding: int, embed_dim: int, widths: list[int], num_filters: int, dropout: float
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ConfigurationError(f"filter_widths (--filter-widths) must be numbers >= 1 with commas, got {widths}")
        self.padding = padding
        self.num_features = len(widths) * num_filters
        self.embed = nn.Embedding(num_words, embed_dim, padding_idx=padding)
        nn.init.normal_(self.embed.weight, std=embed_dim**-0.5)
        nn.init.zeros_(self.embed.weight[padding])
        self.convolutions = nn.ModuleList(nn.Conv1d(embed_dim, num_filters, width) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.classification_heads = nn.ModuleDict()

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "TextCNN":
        """Build the model that a configuration describes."""
        words = task.source_dictionary
        given = [width.strip() for width in str(cfg.filter_widths).split(",") if width.strip()]
        if not all(width.isdecimal() for width in given):
            raise ConfigurationError(
                f"filter_widths (--filter-widths) must be numbers >= 1 with commas, got {cfg.filter_widths!r}"
            )
        widths = [int(width) for width in given]
        return cls(len(words), words.pad(), cfg.embed_dim, widths, cfg.num_filters, cfg.dropout)

    def register_classification_head(self, name: str, num_classes: int | None = None, **_: Any) -> None:
        """Add a linear classifier of the pooled features."""
        self.classification_heads[name] = nn.Linear(self.num_features, num_classes or 2)

    def forward(
        self, src_tokens: Tensor, src_lengths: Tensor | None = None, classification_head_name: str = "", **_: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Classify sentences.

        Args:
            src_tokens: words (sentences, words), padded on either side or both.
            src_lengths: not used; the padding tells.
            classification_head_name: which classifier; without one, the pooled features are returned.

        Returns:
            Scores (sentences, classes), or features (sentences, filters), and an empty dictionary.
        """
        words = self.embed(self._left_aligned(src_tokens)).transpose(1, 2)
        lengths = src_tokens.ne(self.padding).sum(1)
        pooled = self.dropout(torch.cat([self._pooled(words, lengths, each) for each in self.convolutions], dim=1))
        if not classification_head_name:
            return pooled, {}
        return self.classification_heads[classification_head_name](pooled), {}

    def _left_aligned(self, tokens: Tensor) -> Tensor:
        """Padding moved to the end of each sentence."""
        is_padding = tokens.eq(self.padding)
        return tokens.gather(1, is_padding.to(torch.uint8).argsort(dim=1, stable=True))

    @staticmethod
    def _pooled(words: Tensor, lengths: Tensor, convolution: nn.Module) -> Tensor:
        """The largest answer of each filter in a sentence: (sentences, filters)."""
        assert isinstance(convolution, nn.Conv1d)
        (width,) = convolution.kernel_size
        found = convolution(functional.pad(words, (0, max(width - words.size(2), 0))))
        starts = torch.arange(found.size(2), device=words.device)
        outside = starts > (lengths - width).clamp(min=0)[:, None]
        return functional.relu(found.masked_fill(outside[:, None], -torch.inf).amax(2))

    def max_positions(self) -> int:
        """No limit but the task's."""
        return int(1e6)
