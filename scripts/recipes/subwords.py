"""Subwords of sentences, and which characters each of them stands for."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Tokenize = Callable[[list[str]], list[list[str]]]
Range = tuple[int, int]
CHUNK = 1000  # lines that are split at a time: as much as is worth a thread


class TokenizerFile:
    """The model of a ``tokenizer.json`` of the package tokenizers, without its special tokens.

    Args:
        path: the file.

    Raises:
        ValueError: if it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more special
            raise ValueError(f"--tokenizer-file {path} cannot be read as a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, lines: list[str]) -> list[list[str]]:
        """Return the tokens of each line."""
        return [found.tokens for found in self._encoded(lines)]

    def offsets(self, lines: list[str]) -> list[list[Range]]:
        """Return the characters of each token, from the first to before the last."""
        return [found.offsets for found in self._encoded(lines)]

    def _encoded(self, lines: list[str]) -> Iterator[Any]:
        for start in range(0, len(lines), CHUNK):
            yield from self._tokenizer.encode_batch(lines[start : start + CHUNK], add_special_tokens=False)


class Gpt2:
    """The byte-level BPE of GPT-2 and RoBERTa by fairseq's own encoder; tokens are its numbers.

    Args:
        encoder_json: ``encoder.json``.
        vocab_bpe: ``vocab.bpe``.

    Raises:
        ValueError: if a file is missing.
    """

    def __init__(self, encoder_json: str | Path, vocab_bpe: str | Path) -> None:
        from fairseq.data.encoders.gpt2_bpe import GPT2BPE

        for flag, path in (("--gpt2-encoder-json", encoder_json), ("--gpt2-vocab-bpe", vocab_bpe)):
            if not Path(path).is_file():
                raise ValueError(f"{flag} {path} is no file; it is RoBERTa's {flag[7:].replace('-', '.')}")
        files = SimpleNamespace(gpt2_encoder_json=str(encoder_json), gpt2_vocab_bpe=str(vocab_bpe))
        self._bpe = GPT2BPE(files).bpe

    def __call__(self, lines: list[str]) -> list[list[str]]:
        """Return the tokens of each line."""
        return [[str(number) for number in self._bpe.encode(line)] for line in lines]

    def offsets(self, lines: list[str]) -> list[list[Range]]:
        """Return the characters of each token; tokens that share a character all have it."""
        return [self._offsets(line) for line in lines]

    def _offsets(self, line: str) -> list[Range]:
        character_of = [place for place, character in enumerate(line) for _ in character.encode("utf-8")]
        ranges, start = [], 0
        for number in self._bpe.encode(line):
            end = start + len(self._bpe.decoder[number])  # one letter of GPT-2's alphabet for each byte
            ranges.append((character_of[start], character_of[end - 1] + 1))
            start = end
        return ranges


def tokens_of_span(offsets: Sequence[Range], line: str, start: int, end: int) -> Range:
    """Return the tokens that have a part of a span.

    Args:
        offsets: characters of each token.
        line: the sentence.
        start: first character of the span.
        end: character behind its last one; white space at the ends of the span does not count.

    Returns:
        First token, and the one behind the last.

    Raises:
        ValueError: if the span is outside of the sentence, or no token has a part of it.
    """
    if not 0 <= start < end <= len(line):
        raise ValueError(f"the span {start}:{end} is not within the {len(line)} characters of {line!r}")
    text = line[start:end]
    first, last = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
    inside = [place for place, (begin, stop) in enumerate(offsets) if max(begin, first) < min(stop, last)]
    if not inside:
        raise ValueError(f"no token stands for {text!r}, the span {start}:{end} of {line!r}")
    return inside[0], inside[-1] + 1
