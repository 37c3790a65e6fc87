"""Averaging checkpoints, translating a test set with fairseq-generate, BLEU."""

import html
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sacrebleu.metrics.bleu import BLEU
from sacremoses import MosesDetokenizer

from scripts.recipes.commands import ALL_INSTANCES, CommandError, fairseq_command
from scripts.recipes.recipe import ROOT


@dataclass(frozen=True)
class Bleu:
    """BLEU of a test set.

    Attributes:
        detokenised: of the detokenised text, by sacreBLEU's 13a; in percent.
        tokenised: of the preparation's own tokens, as the papers report it; in percent.
        signature: sacreBLEU's, of the first.
    """

    detokenised: float
    tokenised: float
    signature: str


def average(run: Path, count: int) -> Path:
    """Average the last checkpoints of a run.

    Args:
        run: folder with ``checkpoint<epoch>.pt`` files.
        count: how many.

    Returns:
        The averaged checkpoint, in the same folder.

    Raises:
        CommandError: if there are fewer.
    """
    output = run / f"averaged{count}.pt"
    script = str(ROOT / "scripts" / "average_checkpoints.py")
    words = ["--inputs", str(run), "--num-epoch-checkpoints", str(count), "--output", str(output)]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        raise CommandError(f"averaging {run} failed: {done.stderr.strip().splitlines()[-1:]}")
    return output


def translate(
    data_bin: Path, checkpoint: Path, flags: Sequence[str], *, target: str, beam: int = 5
) -> tuple[list[str], list[str]]:
    """Translate the test set.

    Args:
        data_bin: binarised data; the text is in ``text/test.<target>`` beside it.
        checkpoint: the model.
        flags: further flags of fairseq-generate.
        target: target language.
        beam: size of the beam.

    Returns:
        Hypotheses and references, both tokenised, in the order of the test set.
    """
    output = fairseq_command(
        "generate", data_bin, "--path", checkpoint, "--beam", beam, "--max-tokens", 6000, "--remove-bpe",
        *ALL_INSTANCES, *flags,
    )  # fmt: skip
    hypotheses = {int(n): text for n, text in re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", output, re.M)}
    # The references come from the text: in generate's own output, words outside the dictionary are <<unk>>.
    references = (data_bin.parent / "text" / f"test.{target}").read_text(encoding="utf-8").splitlines()
    if sorted(hypotheses) != list(range(len(references))):
        raise CommandError(f"expected {len(references)} translations, got {len(hypotheses)}")
    return [hypotheses[n] for n in range(len(references))], references


def detokenise(lines: Sequence[str], language: str = "en") -> list[str]:
    """Undo the tokenisation and the HTML escapes of Moses' scripts."""
    detokenizer = MosesDetokenizer(lang=language)
    return [detokenizer.detokenize(html.unescape(line).split()) for line in lines]


def bleu(hypotheses: Sequence[str], references: Sequence[str], language: str = "en") -> Bleu:
    """Score tokenised translations.

    Args:
        hypotheses: one for each sentence.
        references: one for each sentence.
        language: whose detokenisation rules are taken; English for languages that Moses does not know.
    """
    score = BLEU()
    detokenised = score.corpus_score(detokenise(hypotheses, language), [detokenise(references, language)]).score
    tokenised = BLEU(tokenize="none", force=True).corpus_score(list(hypotheses), [list(references)]).score
    return Bleu(detokenised, tokenised, str(score.get_signature()))
