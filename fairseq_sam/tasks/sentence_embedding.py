"""Sentences without labels, of which two views are embedded (Mirror-BERT, Liu et al. 2021; delta-SAM 5.3)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING
from torch import Tensor

import fairseq_sam.criterions.mirror  # noqa: F401  registers --criterion mirror
from fairseq_sam.adapter.errors import ConfigurationError

MASK = "<mask>"
SHORTEST = 6  # in spans: Mirror-BERT's code masks 5 characters in sentences of 30 or more


class SentenceViews(FairseqDataset):
    """Sentences, and for training a second view of each in which a span of tokens is one ``<mask>``.

    An epoch's masks and order follow from seed and epoch.

    Args:
        sentences: tensors of word numbers, each with the end symbol at its end.
        dictionary: knows the symbols.
        begin: number of the symbol to put before each sentence.
        max_length: tokens of the longest sentence, those of begin and end included; what is longer is cut.
        mask_span: tokens in the masked span, 0 for none. A sentence of fewer than six such spans stays as it is.
        seed: of masks.
        is_training: mask spans and shuffle.
    """

    def __init__(
        self,
        sentences: Any,
        dictionary: Dictionary,
        *,
        begin: int,
        max_length: int,
        mask_span: int,
        seed: int,
        is_training: bool,
    ) -> None:
        super().__init__()
        self.sentences, self.dictionary = sentences, dictionary
        self.begin, self.max_length, self.seed = begin, max_length, seed
        self.mask_span = mask_span if is_training else 0
        self.is_training = is_training
        self.sizes = np.minimum(np.asarray(sentences.sizes) + 1, max_length)
        self.epoch = 1

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.sentences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = self.sentences[index]
        words = words[words.ne(self.dictionary.eos())][: self.max_length - 2]
        item = {"id": index, "first": self._bounded(words)}
        if self.mask_span:
            item["second"] = self._bounded(self._masked(words, index))
        return item

    def _bounded(self, words: Tensor) -> Tensor:
        return torch.cat([words.new_tensor([self.begin]), words, words.new_tensor([self.dictionary.eos()])])

    def _masked(self, words: Tensor, index: int) -> Tensor:
        if len(words) < SHORTEST * self.mask_span:
            return words
        with data_utils.numpy_seed(self.seed, self.epoch, index):
            start = np.random.randint(len(words) - self.mask_span + 1)
        mask = words.new_tensor([self.dictionary.index(MASK)])
        return torch.cat([words[:start], mask, words[start + self.mask_span :]])

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            ``id``, ``net_input`` with ``src_tokens`` (sentences, length) and ``src_lengths``, the counts, and where
            there are masks, ``second_input`` as ``net_input``. Empty for no samples.
        """
        if not samples:
            return {}
        batch = {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": self._padded([sample["first"] for sample in samples]),
            "ntokens": sum(len(sample["first"]) for sample in samples),
            "nsentences": len(samples),
        }
        if "second" in samples[0]:
            batch["second_input"] = self._padded([sample["second"] for sample in samples])
        return batch

    def _padded(self, sentences: list[Tensor]) -> dict[str, Tensor]:
        tokens = data_utils.collate_tokens(sentences, self.dictionary.pad())
        return {"src_tokens": tokens, "src_lengths": torch.tensor([len(sentence) for sentence in sentences])}

    def num_tokens(self, index: int) -> int:
        """Return the number of tokens of a sentence, for ``--max-tokens``."""
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: Any) -> Any:
        """Return the numbers of tokens of some sentences."""
        return self.sizes[indices]

    def size(self, index: int) -> int:
        """Return the number of tokens of a sentence."""
        return int(self.sizes[index])

    def ordered_indices(self) -> Any:
        """Return a new order of the sentences; fairseq sets numpy's seed for the epoch. Not shuffled in validation."""
        return np.random.permutation(len(self)) if self.is_training else np.arange(len(self))

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Whether all epochs have the same batches: in-batch negatives shall be others in each."""
        return not self.is_training

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's masks."""
        self.epoch = epoch


@dataclass
class SentenceEmbeddingConfig(FairseqDataclass):
    """Flags of ``--task sentence_embedding``."""

    data: str = field(default=MISSING, metadata={"help": "folder of binarised sentences, one a line, and dict.txt"})
    init_token: int = field(default=0, metadata={"help": "number of the symbol that begins a sentence (default: <s>)"})
    mask_span: int = field(
        default=1,
        metadata={
            "help": "tokens that become one <mask> in the second view, in sentences of at least six times as many; 0: "
            "none (default 1: Mirror-BERT's code masks 5 characters, about a token, in sentences of 30 or more)"
        },
    )
    max_sentence_length: int = field(
        default=50, metadata={"help": "longer sentences are cut, in tokens with <s> and </s> (default: Mirror-BERT's)"}
    )
    seed: int = II("common.seed")


@register_task("sentence_embedding", dataclass=SentenceEmbeddingConfig)
class SentenceEmbeddingTask(FairseqTask):
    """Train an encoder such as BERT or RoBERTa to embed sentences, with ``--criterion mirror``.

    Args:
        cfg: the flags.
        dictionary: of the sentences.

    Raises:
        ConfigurationError: if a flag is out of range.
    """

    def __init__(self, cfg: SentenceEmbeddingConfig, dictionary: Dictionary) -> None:
        super().__init__(cfg)
        if not 0 <= cfg.init_token < len(dictionary):
            raise ConfigurationError(
                f"--init-token must be a number of the dictionary, 0 to {len(dictionary) - 1} (0: <s>), got "
                f"{cfg.init_token}"
            )
        if cfg.mask_span < 0:
            raise ConfigurationError(f"--mask-span must be an integer >= 0 (0: no mask), got {cfg.mask_span}")
        if cfg.max_sentence_length < 3:
            raise ConfigurationError(
                f"--max-sentence-length must be an integer >= 3, a token between <s> and </s>, got "
                f"{cfg.max_sentence_length}"
            )
        dictionary.add_symbol(MASK)
        self.dictionary = dictionary

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "SentenceEmbeddingTask":
        """Read the dictionary.

        Raises:
            ConfigurationError: if there is none.
        """
        path = Path(cfg.data) / "dict.txt"
        if not path.is_file():
            raise ConfigurationError(f"there is no {path}: binarise sentences by fairseq-preprocess --only-source")
        return cls(cfg, Dictionary.load(str(path)))

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> SentenceViews:
        """Read a split. Only ``train`` is shuffled and masked.

        Raises:
            FileNotFoundError: if there is none.
        """
        path = str(Path(self.cfg.data) / split)
        sentences = data_utils.load_indexed_dataset(path, self.dictionary, combine=combine)
        if sentences is None:
            raise FileNotFoundError(f"Dataset not found: {split} ({path})")
        self.datasets[split] = SentenceViews(
            sentences,
            self.dictionary,
            begin=self.cfg.init_token,
            max_length=self.cfg.max_sentence_length,
            mask_span=self.cfg.mask_span,
            seed=self.cfg.seed,
            is_training=split == "train",
        )
        return self.datasets[split]

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model. Its LM head has no part in an embedding: weights of the head alone are not trained."""
        model = super().build_model(cfg, from_checkpoint)
        is_head = {name: "lm_head." in name for name, _ in model.named_parameters(remove_duplicate=False)}
        named = list(model.named_parameters(remove_duplicate=False))
        elsewhere = {id(parameter) for name, parameter in named if not is_head[name]}
        for name, parameter in named:
            if is_head[name] and id(parameter) not in elsewhere:
                parameter.requires_grad_(False)
        return model

    def max_positions(self) -> int:
        """Return the number of tokens of the longest sentence."""
        return int(self.cfg.max_sentence_length)

    @property
    def source_dictionary(self) -> Dictionary:
        """The dictionary of the sentences."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """The same."""
        return self.dictionary
