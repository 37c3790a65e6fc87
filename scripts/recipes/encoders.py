"""Pretrained encoders for the recipes: folders of Hugging Face, and fairseq's own RoBERTa."""

import shutil
from pathlib import Path

from scripts.recipes.subwords import Gpt2, TokenizerFile

MODEL, DICTIONARY = "model.pt", "dict.txt"
TOKENIZER = "tokenizer.json"
GPT2_FILES = ("encoder.json", "vocab.bpe")


def prepare_encoder(source: str, folder: Path) -> Gpt2 | TokenizerFile:
    """Put an encoder where recipes find it.

    Args:
        source: a folder of Hugging Face's BERT or RoBERTa, or ``package:NAME`` of an installed package, which is
            converted; or a folder of fairseq's own: ``model.pt`` and ``dict.txt`` with RoBERTa's ``encoder.json`` and
            ``vocab.bpe`` (or with a ``tokenizer.json``), whose model is linked to.
        folder: folder to write ``model.pt``, ``dict.txt`` and the files of the subwords into.

    Returns:
        What splits texts into the tokens of ``dict.txt``.

    Raises:
        ValueError: if the source is neither, or lacks a file.
        ConfigurationError: if an encoder of Hugging Face cannot be converted.
    """
    from fairseq_sam.adapter.encoders import convert_encoder

    place = Path(source)
    if not (place / MODEL).is_file():
        if place.is_dir() and not (place / "config.json").is_file():
            raise ValueError(
                f"encoder={source} must hold config.json (Hugging Face) or {MODEL} (fairseq); "
                f"it has {', '.join(sorted(path.name for path in place.iterdir())) or 'nothing'}"
            )
        convert_encoder(source, folder)
        return TokenizerFile(folder / TOKENIZER)
    subwords = (TOKENIZER,) if (place / TOKENIZER).is_file() else GPT2_FILES
    missing = [name for name in (DICTIONARY, *subwords) if not (place / name).is_file()]
    if missing:
        raise ValueError(
            f"encoder={source} has fairseq's {MODEL}, but no {missing[0]}; put {', '.join((DICTIONARY, *GPT2_FILES))} "
            "beside it, the last two being GPT-2's subwords"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).unlink(missing_ok=True)
    (folder / MODEL).symlink_to((place / MODEL).resolve())
    for name in (DICTIONARY, *subwords):
        shutil.copyfile(place / name, folder / name)
    if subwords == GPT2_FILES:
        return Gpt2(*(folder / name for name in GPT2_FILES))
    return TokenizerFile(folder / TOKENIZER)
