"""Semantic textual similarity: what a sentence encoder's cosines say of pairs that people have scored.

The sets are those of delta-SAM's table 2, each as SentEval's setting ``all`` has it: one rank correlation over all
pairs of a year, its parts together. They lie in a folder of corpora, plain or ``.xz``:

======================================  ============================================================================
``sts/STS12.tsv`` … ``sts/STS16.tsv``   a head line; task, score, two sentences
``sts/SICK_test.tsv``                   a head line; number, two sentences, score, entailment
``glue/STS-B/test_labelled.tsv``        no head line; genre, file, year, number, score, two sentences, sources
``glue/STS-B/train.tsv``, ``dev.tsv``   GLUE's: a head line; the last three columns are two sentences and the score
======================================  ============================================================================
"""

import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils
from fairseq.data.encoders import build_bpe
from omegaconf import OmegaConf
from scipy import stats
from torch import Tensor

from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.criterions.mirror import POOLINGS, pooled
from fairseq_sam.tasks.sentence_embedding import SentenceEmbeddingConfig, SentenceEmbeddingTask
from scripts.recipes.subwords import TokenizerFile
from scripts.recipes.text import CorpusError, find_file, read_lines, write_indexed

POSITIONS = "encoder.sentence_encoder.embed_positions.weight"
FIRST_POSITION = 2  # fairseq's positions begin after the padding's number


class Pairs(NamedTuple):
    """Scored pairs of sentences."""

    first: list[str]
    second: list[str]
    scores: list[float]


class Layout(NamedTuple):
    """Where a set is, and in which columns."""

    folder: str
    file: str
    has_head: bool
    first: int
    second: int
    score: int


YEARS = {f"STS{year}": Layout("sts", f"STS{year}.tsv", True, 2, 3, 1) for year in range(12, 17)}
SETS: dict[str, Layout] = {
    **YEARS,
    "STS-B": Layout("glue/STS-B", "test_labelled.tsv", False, 5, 6, 4),
    "SICK-R": Layout("sts", "SICK_test.tsv", True, 1, 2, 3),
}
DEVELOPMENT = "STS-B dev"  # on which delta-SAM's settings were chosen
LAYOUTS = {**SETS, DEVELOPMENT: Layout("glue/STS-B", "dev.tsv", True, -3, -2, -1)}
TRAINING = Layout("glue/STS-B", "train.tsv", True, -3, -2, -1)


def read_pairs(data: Path, layout: Layout) -> Pairs:
    """Read a set, without quoting.

    Args:
        data: folder of the corpora.
        layout: a value of ``LAYOUTS``.

    Raises:
        CorpusError: if there is no such file, or a line has no score in its place.
    """
    lines = read_lines(data / layout.folder, layout.file)
    pairs = Pairs([], [], [])
    for number, line in enumerate(lines[1:] if layout.has_head else lines, start=1 + layout.has_head):
        columns = line.rstrip("\r").split("\t")
        try:
            score = float(columns[layout.score])
            first, second = columns[layout.first], columns[layout.second]
        except (IndexError, ValueError):
            raise CorpusError(
                f"{layout.folder}/{layout.file}, line {number}: expected a score and two sentences, got {line[:80]!r}"
            ) from None
        pairs.first.append(first)
        pairs.second.append(second)
        pairs.scores.append(score)
    return pairs


def training_sentences(data: Path, number: int, seed: int) -> list[str]:
    """Sample sentences of STS-B's training pairs, without their scores, as Mirror-BERT does (10,000 of them).

    Args:
        data: folder of the corpora.
        number: how many; all, if there are fewer.
        seed: of the sample.
    """
    pairs = read_pairs(data, TRAINING)
    sentences = [sentence for pair in zip(pairs.first, pairs.second, strict=True) for sentence in pair]
    random.Random(seed).shuffle(sentences)
    return sentences[:number]


def binarise_sentences(sentences: Sequence[str], encoder: Path, out: Path) -> None:
    """Write sentences' subwords as ``--task sentence_embedding`` reads them: ``train`` and ``dict.txt``.

    Args:
        sentences: raw text.
        encoder: folder that ``convert_encoder.py`` has written: ``dict.txt``, ``tokenizer.json``.
        out: folder to write.
    """
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(encoder / "dict.txt", out / "dict.txt")
    dictionary, tokenize = Dictionary.load(str(out / "dict.txt")), TokenizerFile(encoder / "tokenizer.json")
    lines = tokenize(list(sentences))
    numbers = (dictionary.encode_line(line, line_tokenizer=list, add_if_not_exist=False) for line in lines)
    write_indexed(out / "train", numbers, len(dictionary))


def copy_sets(data: Path, out: Path) -> None:
    """Copy all sets into another folder of corpora, so that an evaluation finds them there.

    Args:
        data: folder of the corpora.
        out: folder to write.

    Raises:
        CorpusError: if a set is not there.
    """
    for layout in LAYOUTS.values():
        path = find_file(data / layout.folder, layout.file)
        (out / layout.folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / layout.folder / path.name)


def rank_correlation(first: Tensor, second: Tensor, scores: Sequence[float]) -> float:
    """Spearman's correlation of cosines with scores, times 100.

    Args:
        first: embeddings, shape (pairs, width).
        second: embeddings, shape (pairs, width).
        scores: one for each pair.

    Returns:
        From -100 to 100; NaN if all cosines, or all scores, are the same.
    """
    cosines = torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1)
    return 100.0 * float(stats.spearmanr(cosines.numpy(), list(scores)).statistic)


class SentenceEncoder:
    """A checkpoint of a RoBERTa or BERT as an encoder of sentences.

    Args:
        checkpoint: as ``convert_encoder.py`` or fairseq-train writes it, of any task.
        dictionary: default the ``dict.txt`` beside it, or that in the data folder of its task.
        tokenizer_file: the subwords' ``tokenizer.json``; default the one beside the checkpoint, or that of its
            ``--tokenizer-file``. A checkpoint without one reads words between spaces.
        pooling: ``cls`` or ``mean``; default that of its ``--criterion mirror``, otherwise ``mean``.
        max_length: longer sentences are cut, in tokens; default as many as the model has positions for.
        device: where it runs.

    Raises:
        ConfigurationError: if a file is missing, or the checkpoint is of no such encoder.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        dictionary: Path | None = None,
        tokenizer_file: Path | None = None,
        pooling: str | None = None,
        max_length: int | None = None,
        device: str = "cpu",
    ) -> None:
        if not checkpoint.is_file():
            raise ConfigurationError(f"there is no checkpoint {checkpoint} (--checkpoint)")
        state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
        cfg = OmegaConf.create(state["cfg"]) if isinstance(state["cfg"], dict) else state["cfg"]
        if POSITIONS not in state["model"]:
            raise ConfigurationError(f"{checkpoint} is of no RoBERTa or BERT encoder: it has no {POSITIONS}")
        self.pooling = pooling or str(_get(cfg, "criterion", "pooling") or "mean")
        if self.pooling not in POOLINGS:
            raise ConfigurationError(f"--pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        self.dictionary = Dictionary.load(str(dictionary or _dictionary_of(checkpoint, cfg)))
        positions = len(state["model"][POSITIONS]) - FIRST_POSITION
        if max_length is not None and max_length < 3:
            raise ConfigurationError(f"--max-length must be an integer >= 3, got {max_length}: two tokens are special")
        self.max_length = min(positions if max_length is None else max_length, positions)
        own = SentenceEmbeddingConfig(data="", init_token=0, max_sentence_length=positions, seed=1)
        model = SentenceEmbeddingTask(own, self.dictionary).build_model(cfg.model, from_checkpoint=True)
        model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
        self.model = model.to(device).eval()
        self.device = device
        self.bpe = _bpe_of(checkpoint, cfg, tokenizer_file)

    @torch.no_grad()
    def embed(self, sentences: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embed sentences.

        Args:
            sentences: raw text.
            batch_size: sentences at a time, of similar lengths.

        Returns:
            Shape (sentences, width), float32, on the CPU.
        """
        tokens = [self._tokens(sentence) for sentence in sentences]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        embeddings: dict[int, Tensor] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = data_utils.collate_tokens([tokens[i] for i in rows], self.dictionary.pad()).to(self.device)
            features = self.model(batch, features_only=True)[0]
            found = pooled(features, batch, self.dictionary.pad(), self.pooling).float().cpu()
            embeddings.update(zip(rows, found, strict=True))
        return torch.stack([embeddings[i] for i in range(len(tokens))])

    def _tokens(self, sentence: str) -> Tensor:
        symbols = self.bpe.encode(sentence) if self.bpe is not None else sentence
        words = self.dictionary.encode_line(symbols, append_eos=False, add_if_not_exist=False).long()
        bounds = torch.tensor([self.dictionary.bos()]), torch.tensor([self.dictionary.eos()])
        return torch.cat([bounds[0], words[: self.max_length - 2], bounds[1]])


def evaluate(encoder: SentenceEncoder, data: Path, names: Sequence[str] = tuple(SETS)) -> dict[str, float]:
    """Score an encoder.

    Args:
        encoder: the encoder.
        data: folder of the corpora.
        names: which of ``LAYOUTS``.

    Returns:
        Spearman's correlation times 100 by set, and their mean as ``avg.``.

    Raises:
        ConfigurationError: if a name is unknown.
        CorpusError: if a file is missing or not as expected.
    """
    unknown = sorted(set(names) - set(LAYOUTS))
    if unknown:
        raise ConfigurationError(f"--sets must be among {', '.join(LAYOUTS)}, got {unknown[0]!r}")
    found = {}
    for name in names:
        pairs = read_pairs(data, LAYOUTS[name])
        sentences = sorted({*pairs.first, *pairs.second})
        embeddings = encoder.embed(sentences)
        place = {sentence: number for number, sentence in enumerate(sentences)}
        first, second = (embeddings[[place[s] for s in side]] for side in (pairs.first, pairs.second))
        found[name] = rank_correlation(first, second, pairs.scores)
    return {**found, "avg.": math.fsum(found.values()) / len(found)}


def _get(cfg: Any, section: str, key: str) -> Any:
    part = cfg.get(section)
    return part.get(key) if OmegaConf.is_dict(part) else getattr(part, key, None)


def _dictionary_of(checkpoint: Path, cfg: Any) -> Path:
    folder = Path(str(_get(cfg, "task", "data") or "."))
    places = [checkpoint.parent / "dict.txt", folder / "dict.txt", folder / "input0" / "dict.txt"]
    for place in places:
        if place.is_file():
            return place
    raise ConfigurationError(f"none of {', '.join(map(str, places))} is there; name the dictionary with --dictionary")


def _bpe_of(checkpoint: Path, cfg: Any, tokenizer_file: Path | None) -> Any:
    own = _get(cfg, "bpe", "tokenizer_file")
    candidates = [tokenizer_file, checkpoint.parent / "tokenizer.json", Path(own) if own else None]
    for place in candidates:
        if place is not None and (place.is_file() or place is tokenizer_file):
            return build_bpe(OmegaConf.create({"_name": "hugging_face", "tokenizer_file": str(place)}))
    if own:
        raise ConfigurationError(f"there is no tokenizer file {own}, the checkpoint's; name one with --tokenizer-file")
    return None
