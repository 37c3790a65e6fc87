"""Which subwords a span of characters has."""

import pytest

from scripts.recipes.subwords import Gpt2, TokenizerFile, tokens_of_span
from tests.recipes import glue_files


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    return TokenizerFile(glue_files.write_wordpiece(tmp_path_factory.mktemp("wordpiece")) / "tokenizer.json")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = glue_files.write_gpt2(tmp_path_factory.mktemp("gpt2"), ["the bank runs"] * 3 + ["table"] * 2)
    return Gpt2(folder / "encoder.json", folder / "vocab.bpe")


def covered(tokenizer, line, words, number=0):
    """Tokens of the nth occurrence of the words, and the characters that they stand for."""
    start = -1
    for _ in range(number + 1):
        start = line.index(words, start + 1)
    (offsets,), (tokens,) = tokenizer.offsets([line]), tokenizer([line])
    assert len(offsets) == len(tokens)
    first, last = tokens_of_span(offsets, line, start, start + len(words))
    return first, tokens[first:last], line[offsets[first][0] : offsets[last - 1][1]]


def test_wordpiece_splits_a_word(wordpiece):
    assert covered(wordpiece, "the cat sleeps unhappily .", "unhappily") == (3, ["un", "##hap", "##pily"], "unhappily")
    assert covered(wordpiece, "The CAT", "CAT") == (1, ["cat"], "CAT")
    assert covered(wordpiece, "the café runs", "café") == (1, ["caf", "##e"], "café")


def test_a_word_that_is_there_twice(wordpiece):
    line = "the bank runs under the bank ."
    assert covered(wordpiece, line, "bank", 0)[0] == 1
    assert covered(wordpiece, line, "bank", 1) == (5, ["bank"], "bank")


def test_a_span_within_punctuation(wordpiece, gpt2):
    line = "the (bank), quickly"
    assert covered(wordpiece, line, "bank") == (2, ["bank"], "bank")
    assert covered(wordpiece, line, "(bank)") == (1, ["(", "bank", ")"], "(bank)")
    assert covered(gpt2, line, "bank")[2].strip() == "bank"
    assert covered(gpt2, line, "(bank)")[2].strip() in ("(bank)", "(bank),"), "), is one token or two"


def test_a_part_of_a_word(wordpiece):
    """All pieces count that have a letter of it."""
    assert covered(wordpiece, "sleeps unhappily", "happ")[1] == ["##hap", "##pily"]


def test_byte_level_splits_a_word(gpt2):
    line = "the bank sees the table"
    first, tokens, text = covered(gpt2, line, "bank")
    assert (first, len(tokens), text) == (1, 1, " bank"), "the space belongs to the token"
    first, tokens, text = covered(gpt2, line, "sees")
    assert len(tokens) > 1 and text.strip() == "sees"
    assert covered(gpt2, line, "the", 1)[2].strip() == "the" and covered(gpt2, line, "the", 1)[0] > first
    assert "".join(line[a:b] for a, b in gpt2.offsets([line])[0]) == line


def test_characters_of_several_bytes(gpt2):
    line = "a 漢字 é 🙂 bank"
    (offsets,), (tokens,) = gpt2.offsets([line]), gpt2([line])
    assert len(tokens) == len(offsets) and offsets[-1][1] == len(line)
    assert all(line[start:end] for start, end in offsets)
    assert {line[start:end].strip() for start, end in offsets} >= {"漢", "字", "é", "🙂", "bank"}
    _, tokens, text = covered(gpt2, line, "字")
    assert "字" in text and "漢" not in text and len(tokens) == 3, "three bytes, no merge"
    assert covered(gpt2, line, "bank")[2] == " bank"


def test_white_space_at_the_ends_does_not_count(wordpiece, gpt2):
    for tokenizer in (wordpiece, gpt2):
        line = "the bank runs"
        assert covered(tokenizer, line, " bank ")[:2] == covered(tokenizer, line, "bank")[:2]


def test_both_tokenizers_take_many_lines(wordpiece, gpt2):
    lines = ["the bank"] * 2500 + [""]
    for tokenizer in (wordpiece, gpt2):
        found = tokenizer(lines)
        assert len(found) == 2501 and found[0] == found[2499] and found[-1] == []


def test_tokens_without_special_ones(tmp_path):
    from tokenizers import Tokenizer, processors

    path = glue_files.write_wordpiece(tmp_path) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single="[PAD] $A", special_tokens=[("[PAD]", 0)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    assert TokenizerFile(path)(["the old cat sleeps"])[0][:3] == ["the", "old", "cat"]


@pytest.mark.parametrize(
    ("start", "end", "words"), [(0, 0, "0:0"), (3, 99, "3:99"), (-1, 2, "-1:2"), (3, 4, "no token")]
)
def test_spans_that_are_none(wordpiece, start, end, words):
    line = "the bank"
    with pytest.raises(ValueError, match=words):
        tokens_of_span(wordpiece.offsets([line])[0], line, start, end)


def test_files_that_are_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "tokenizer.json", tmp_path / "missing.json"):
        with pytest.raises(ValueError, match=f"--tokenizer-file .*{path.name} cannot be read as a tokenizer"):
            TokenizerFile(path)
    glue_files.write_gpt2(tmp_path)
    with pytest.raises(ValueError, match=r"--gpt2-vocab-bpe nowhere is no file; it is RoBERTa's vocab.bpe"):
        Gpt2(tmp_path / "encoder.json", "nowhere")
