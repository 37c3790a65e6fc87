"""BERT (Devlin et al. 2019): fairseq's RoBERTa with BERT's segment embeddings, layer norms and pooler."""

import argparse
from typing import Any

from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaHubInterface, RobertaModel
from fairseq.models.roberta.model import base_architecture as roberta_architecture
from fairseq.modules import LearnedPositionalEmbedding
from fairseq.utils import safe_getattr
from torch import Tensor, nn

from fairseq_sam.adapter import subwords  # noqa: F401  registers --bpe hugging_face, the subwords of its checkpoints
from fairseq_sam.adapter.errors import ConfigurationError


class PositionsAndSegments(LearnedPositionalEmbedding):
    """Embeddings of positions, and of which of the texts in an input a token is in.

    A token's segment is the number of separators before it, at most the last segment: with two segments, 0 up to and
    including the first separator and 1 after it. Padding has segment 0.

    Args:
        positions: the embeddings of positions, to be replaced by these.
        num_segments: rows of the segment embeddings, >= 1.
        separator: number of the separator in the dictionary.
    """

    def __init__(self, positions: LearnedPositionalEmbedding, num_segments: int, separator: int) -> None:
        super().__init__(positions.num_embeddings, positions.embedding_dim, positions.padding_idx)
        self.segments = nn.Embedding(num_segments, positions.embedding_dim)
        self.separator = separator

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Embed the positions and segments of tokens of shape (batch, length); returns (batch, length, width)."""
        separators = tokens.eq(self.separator).long()
        before = (separators.cumsum(1) - separators).clamp(max=self.segments.num_embeddings - 1)
        segments = before.masked_fill(tokens.eq(self.padding_idx), 0)
        embedded: Tensor = super().forward(tokens, **options) + self.segments(segments)
        return embedded


class BertHubInterface(RobertaHubInterface):
    """RoBERTa's interface with one separator between two texts, as BERT has it: ``<s> A </s> B </s>``."""

    def encode(self, sentence: str, *addl_sentences: str, no_separator: bool = True) -> Tensor:
        """Split texts into the numbers of their tokens, shape (length,).

        Args:
            sentence: the first text.
            addl_sentences: the others.
            no_separator: False puts RoBERTa's second ``</s>`` between two texts.
        """
        tokens: Tensor = super().encode(sentence, *addl_sentences, no_separator=no_separator)
        return tokens

    def decode(self, tokens: Tensor) -> str | list[str]:
        """Join tokens of shape (length,) to the text, or to the texts that separators part."""
        dictionary = self.task.source_dictionary
        is_end = tokens.eq(dictionary.eos())
        parts = tokens.cpu().tensor_split(is_end.nonzero()[:, 0].cpu() + 1)
        texts = [self.bpe.decode(dictionary.string(part)) for part in parts if part.ne(dictionary.eos()).any()]
        return texts[0] if len(texts) == 1 else texts


@register_model("bert")
class BertModel(RobertaModel):
    """RoBERTa's encoder and heads, with segment embeddings and the epsilon of BERT's layer norms.

    Where a checkpoint holds BERT's pooler, a dense layer with tanh on the first token, it is the initial value of the
    same layer of those classification heads that the checkpoint does not hold.
    """

    def __init__(self, args: Any, encoder: Any) -> None:
        if args.num_segments < 1:
            raise ConfigurationError(f"--num-segments must be >= 1 (BERT's is 2), got {args.num_segments}")
        if not args.layer_norm_epsilon > 0:
            raise ConfigurationError(
                f"--layer-norm-epsilon must be > 0 (BERT's is 1e-12), got {args.layer_norm_epsilon}"
            )
        embeddings = encoder.sentence_encoder
        embeddings.embed_positions = PositionsAndSegments(
            embeddings.embed_positions, args.num_segments, encoder.dictionary.eos()
        )
        super().__init__(args, encoder)
        for module in self.modules():
            if hasattr(module, "normalized_shape"):  # torch's layer norm, or apex's
                module.eps = args.layer_norm_epsilon

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        """Add RoBERTa's flags and those of what BERT has besides."""
        RobertaModel.add_args(parser)
        parser.add_argument("--num-segments", type=int, metavar="N", help="segment embeddings (default: 2)")
        parser.add_argument(
            "--layer-norm-epsilon", type=float, metavar="E", help="epsilon of the layer norms (default: 1e-12)"
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> BertHubInterface:
        """Load the model of a folder, as RoBERTa's ``from_pretrained`` does; pairs of texts are BERT's."""
        hub = super().from_pretrained(*args, **kwargs)
        return BertHubInterface(hub.cfg, hub.task, hub.model)

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Give the pooler of a checkpoint to the new heads; otherwise as for RoBERTa."""
        prefix = f"{name}." if name else ""
        stored = set(state_dict)
        super().upgrade_state_dict_named(state_dict, name)
        for kind in ("weight", "bias"):
            pooler = state_dict.pop(f"{prefix}pooler.dense.{kind}", None)
            if pooler is None:
                continue
            for head in self.classification_heads:
                dense = f"{prefix}classification_heads.{head}.dense.{kind}"
                if dense not in stored and state_dict[dense].shape == pooler.shape:
                    state_dict[dense] = pooler


@register_model_architecture("bert", "bert")  # type: ignore[untyped-decorator]
def bert_architecture(args: Any) -> None:
    """Set what is not given to the values of BERT-base."""
    args.num_segments = safe_getattr(args, "num_segments", 2)
    args.layer_norm_epsilon = safe_getattr(args, "layer_norm_epsilon", 1e-12)
    roberta_architecture(args)
