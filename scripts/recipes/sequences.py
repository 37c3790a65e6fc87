"""Source and target texts for sequence-to-sequence models with the subwords of a pretrained one, such as BART."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.recipes.commands import ALL_INSTANCES, CommandError, fairseq_command
from scripts.recipes.recipe import ROOT
from scripts.recipes.subwords import Gpt2, Tokenize
from scripts.recipes.text import CorpusError, read_lines

SIDES = ("source", "target")
SENTENCEPIECE = "sentencepiece.model"
GPT2 = ("encoder.json", "vocab.bpe")
MODEL = "model"  # beside the prepared data: the pretrained model's folder
SAMPLED = 20000  # lines that a SentencePiece model is trained on, the first ones
Pairs = Sequence[tuple[str, str]]


def link_model(named: str | None, out: Path, variant: str = "") -> Path:
    """Put a link to a pretrained model's folder beside the prepared data, where training and evaluation look for it.

    Args:
        named: the folder, with ``model.pt``, ``dict.txt`` and the subwords' files.
        out: folder of the prepared data.
        variant: name of the folder within `named`, where there are several, such as ``bart.large``.

    Returns:
        The link, ``out/model``.

    Raises:
        CorpusError: if none is named, or it lacks a file.
    """
    if not named:
        raise CorpusError("this recipe needs a pretrained model: run_table.py … --set model=FOLDER")
    folder = Path(named) / variant if variant and (Path(named) / variant).is_dir() else Path(named)
    for name in ("model.pt", "dict.txt"):
        if not (folder / name).is_file():
            raise CorpusError(f"--model {folder} must hold model.pt and dict.txt; {name} is not there")
    subwords_of(folder)
    link = out / MODEL
    out.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder.resolve(), target_is_directory=True)
    return link


class SentencePieces:
    """The pieces of a SentencePiece model.

    Args:
        path: the model.
    """

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=str(path))

    def __call__(self, lines: list[str]) -> list[list[str]]:
        """Return the pieces of each line."""
        pieces: list[list[str]] = self._processor.encode(lines, out_type=str)
        return pieces


def subwords_of(model: Path) -> Tokenize:
    """The subwords of a pretrained model.

    Args:
        model: folder with ``sentencepiece.model``, or ``encoder.json`` and ``vocab.bpe`` (GPT-2's, as BART has).

    Raises:
        CorpusError: if it has neither.
    """
    if (model / SENTENCEPIECE).is_file():
        return SentencePieces(model / SENTENCEPIECE)
    if all((model / name).is_file() for name in GPT2):
        return Gpt2(*(model / name for name in GPT2))
    raise CorpusError(f"{model} must hold {SENTENCEPIECE}, or {' and '.join(GPT2)}, for its subwords")


def train_sentencepiece(lines: Sequence[str], folder: Path, num_subwords: int) -> None:
    """Train a SentencePiece model (unigram) and write it beside fairseq's dictionary of its pieces.

    Args:
        lines: the text.
        folder: folder to write ``sentencepiece.model`` and ``dict.txt`` into.
        num_subwords: size of the vocabulary at most, fairseq's four special symbols included.

    Raises:
        CorpusError: if the text has as many characters.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / Path(SENTENCEPIECE).stem
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[:SAMPLED]), model_prefix=str(prefix), vocab_size=num_subwords - 1,
            hard_vocab_limit=False, max_sentence_length=1 << 16, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise CorpusError(f"no SentencePiece model of {num_subwords} subwords can be trained: {error}") from error
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    numbers = range(processor.get_piece_size())
    special = {number for number in numbers if processor.is_control(number) or processor.is_unknown(number)}
    lines = [f"{processor.id_to_piece(number)} 1\n" for number in numbers if number not in special]
    (folder / "dict.txt").write_text("".join(lines), encoding="utf-8")


def decoding_flags(model: Path) -> list[str]:
    """Fairseq's flags that join a model's subwords to text."""
    if (model / SENTENCEPIECE).is_file():
        return ["--bpe", "sentencepiece", "--sentencepiece-model", str(model / SENTENCEPIECE)]
    files = [str(model / name) for name in GPT2]
    return ["--bpe", "gpt2", "--gpt2-encoder-json", files[0], "--gpt2-vocab-bpe", files[1]]


def read_sides(folder: Path, name: str) -> list[tuple[str, str]]:
    """Read pairs of lines from ``name.source`` and ``name.target``; those with an empty side are left out.

    Raises:
        CorpusError: if a file is missing, or one is longer.
    """
    sources, targets = (read_lines(folder, f"{name}.{side}") for side in SIDES)
    if len(sources) != len(targets):
        raise CorpusError(f"{folder}: {name} has {len(sources)} lines in .source and {len(targets)} in .target")
    return [pair for pair in zip(sources, targets, strict=True) if all(side.strip() for side in pair)]


def prepare_pairs(splits: Mapping[str, Pairs], model: Path, out: Path, max_source: int, max_target: int) -> None:
    """Write texts, their subwords, and fairseq's binarised data.

    Args:
        splits: ``train``, ``valid`` and ``test``: pairs of lines.
        model: folder of the pretrained model: ``dict.txt`` and its subwords' files.
        out: folder to write ``text``, ``subwords`` and ``data-bin`` into.
        max_source: subwords that are kept of a source; the rest is cut off.
        max_target: subwords that are kept of a target in the training part.

    Raises:
        CorpusError: if the model lacks a file, or a line is empty.
    """
    if not (model / "dict.txt").is_file():
        raise CorpusError(f"{model} must hold dict.txt, the model's dictionary")
    split_words = subwords_of(model)
    shutil.rmtree(out / "data-bin", ignore_errors=True)
    for split, pairs in splits.items():
        if not pairs or not all(source.strip() and target.strip() for source, target in pairs):
            raise CorpusError(f"{split} must have pairs, none of them with an empty side")
        for number, (side, limit) in enumerate(zip(SIDES, (max_source, max_target), strict=True)):
            lines = [" ".join(pair[number].split()) for pair in pairs]
            kept = None if side == "target" and split != "train" else limit
            pieces = [" ".join(words[:kept]) for words in split_words(lines)]
            for kind, written in (("text", lines), ("subwords", pieces)):
                (out / kind).mkdir(parents=True, exist_ok=True)
                (out / kind / f"{split}.{side}").write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--destdir", str(out / "data-bin"), "--workers", "2"]
    for side, flag in zip(SIDES, ("src", "tgt"), strict=True):
        command += [f"--{side}-lang", side, f"--{flag}dict", str(model / "dict.txt")]
    for split in splits:
        command += [f"--{split}pref", str(out / "subwords" / split)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise CorpusError("fairseq-preprocess failed:\n" + "\n".join(done.stderr.strip().splitlines()[-10:]))


def generate(
    data: Path, checkpoint: Path, model: Path, flags: Sequence[str], split: str = "test"
) -> tuple[list[str], list[str], list[str]]:
    """Write the targets of a split with a model.

    Args:
        data: folder that ``prepare_pairs`` wrote.
        checkpoint: the fine-tuned model.
        model: folder of the pretrained one.
        flags: fairseq-generate's: beam, length penalty, device.
        split: which split.

    Returns:
        Generated lines, targets and sources, as texts in the order of the data.

    Raises:
        CommandError: if a line is missing.
    """
    output = fairseq_command(
        "generate", data / "data-bin", "--path", checkpoint, "--gen-subset", split, "--task", "translation",
        *decoding_flags(model), *ALL_INSTANCES, *flags,
    )  # fmt: skip
    found = {int(number): text for number, text in re.findall(r"^D-(\d+)\t[^\t]*\t?(.*)$", output, re.M)}
    sources, targets = (
        (data / "text" / f"{split}.{side}").read_text(encoding="utf-8").split("\n")[:-1] for side in SIDES
    )
    if sorted(found) != list(range(len(targets))):
        raise CommandError(f"expected {len(targets)} generated lines of {split}, got {len(found)}")
    return [found[number].strip() for number in range(len(targets))], targets, sources
