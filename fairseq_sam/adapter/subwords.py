"""Subwords of Hugging Face's tokenizers for fairseq: ``--bpe hugging_face --tokenizer-file FILE``."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

from fairseq_sam.adapter.errors import ConfigurationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What fairseq calls BERT's special tokens. RoBERTa's have fairseq's names.
SPECIAL_SYMBOLS = {"[CLS]": "<s>", "[PAD]": "<pad>", "[SEP]": "</s>", "[UNK]": "<unk>", "[MASK]": "<mask>"}


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Read a ``tokenizer.json``; what it says of truncation and padding is left to fairseq.

    Raises:
        ConfigurationError: if the file is missing or damaged, or the package ``tokenizers`` is.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigurationError(f"reading {path} needs the package tokenizers: pip install tokenizers") from None
    if not Path(path).is_file():
        raise ConfigurationError(f"there is no tokenizer file {path} (--tokenizer-file)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class
        raise ConfigurationError(f"{path} is no tokenizer.json of Hugging Face's tokenizers: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def symbols_of(tokenizer: "Tokenizer", size: int = 0) -> list[str]:
    """Name a tokenizer's tokens as a fairseq dictionary can hold them.

    BERT's special tokens get the names of fairseq's. A number without a token is a ``madeupword``, as fairseq names
    what fills a dictionary. A token that has the name of another special one, is empty or has a space in it, which a
    line of fairseq's text cannot carry, is named by its number.

    Args:
        tokenizer: with all of BERT's special tokens, or all of RoBERTa's.
        size: at least so many symbols.

    Returns:
        The symbol of each token by its number, all different.

    Raises:
        ConfigurationError: if a special token is missing.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = _special_tokens(vocabulary)
    tokens = {number: token for token, number in vocabulary.items()}
    fillers = (f"madeupword{count:04d}" for count in itertools.count())
    symbols = []
    for number in range(max(size, max(tokens) + 1)):
        token = tokens.get(number)
        if token is None:
            symbol = next(filler for filler in fillers if filler not in vocabulary)
        elif token in special:
            symbol = special[token]
        elif token in special.values() or token.split() != [token]:
            symbol = f"<token-{number}>"
        else:
            symbol = token
        symbols.append(symbol)
    return symbols


def _special_tokens(vocabulary: dict[str, int]) -> dict[str, str]:
    """The special tokens with their symbols: BERT's where the vocabulary has them, otherwise RoBERTa's."""
    kinds = [SPECIAL_SYMBOLS, {symbol: symbol for symbol in SPECIAL_SYMBOLS.values()}]
    for special in kinds:
        if special.keys() <= vocabulary.keys():
            return special
    nearest = max(kinds, key=lambda special: len(special.keys() & vocabulary.keys()))
    raise ConfigurationError(
        f"the tokenizer lacks {' '.join(token for token in nearest if token not in vocabulary)}: its special tokens "
        f"must be named as BERT's ({' '.join(kinds[0])}) or RoBERTa's ({' '.join(kinds[1])})"
    )


@dataclass
class HuggingFaceSubwordsConfig(FairseqDataclass):
    """Flags of ``--bpe hugging_face``."""

    tokenizer_file: Optional[str] = field(
        default=None,
        metadata={"help": "tokenizer.json of Hugging Face's tokenizers, such as convert_encoder.py writes"},
    )


@register_bpe("hugging_face", dataclass=HuggingFaceSubwordsConfig)
class HuggingFaceSubwords:
    """The tokens of a Hugging Face tokenizer, named as in the dictionary that its converted model comes with."""

    def __init__(self, cfg: HuggingFaceSubwordsConfig) -> None:
        if not cfg.tokenizer_file:
            raise ConfigurationError("--bpe hugging_face needs --tokenizer-file, a tokenizer.json of Hugging Face")
        self.tokenizer = load_tokenizer(cfg.tokenizer_file)
        self.symbols = symbols_of(self.tokenizer)
        self.numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        self.continuation = getattr(self.tokenizer.model, "continuing_subword_prefix", None)

    def encode(self, text: str) -> str:
        """Split a text into symbols with spaces between, without those of its beginning and end."""
        return " ".join(self.symbols[number] for number in self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, symbols: str) -> str:
        """Join symbols to the text that they stand for; one that the tokenizer does not have counts as unknown."""
        unknown = self.numbers["<unk>"]
        numbers = [self.numbers.get(symbol, unknown) for symbol in symbols.split()]
        return self.tokenizer.decode(numbers, skip_special_tokens=False)

    def is_beginning_of_word(self, symbol: str) -> bool:
        """Whether a word begins with this symbol, for masking whole words."""
        if self.continuation:
            return not symbol.startswith(self.continuation)
        return symbol.startswith(("Ġ", "▁"))
