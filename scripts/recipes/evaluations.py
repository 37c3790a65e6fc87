"""How a trained run is scored; each evaluation runs fairseq's own commands on the best or the averaged checkpoint.

As a command: ``python -m scripts.recipes.evaluations RUN [--cpu]`` scores a run's folder and writes ``scores.json``.
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fairseq_sam.adapter.probes import probe
from fairseq_sam.adapter.sentences import outputs
from fairseq_sam.analysis.scores import accuracy
from scripts.recipes import predictions, text_to_text
from scripts.recipes.commands import ALL_INSTANCES, CommandError, fairseq_command
from scripts.recipes.corrections import ANNOTATORS, M2, gleu, max_match, read_m2
from scripts.recipes.jobs import MODEL, SCORES, SETTINGS
from scripts.recipes.recipe import command_line
from scripts.recipes.scores import rouge
from scripts.recipes.sequences import generate
from scripts.recipes.significance import HYPOTHESES, REFERENCES
from scripts.recipes.translation import average, bleu, detokenise, translate

Scores = dict[str, float]
GENERATED = "generated.txt"


def classification(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """Accuracy (%) and loss (bits) of the checkpoint with the best validation score, on ``valid`` and ``test``."""
    from fairseq.data import Dictionary, data_utils

    folder, scores = Path(settings["data"]) / "data-bin", {}
    labels = Dictionary.load(str(folder / "label" / "dict.txt"))
    for split in ("valid", "test"):
        (logits,), _ = outputs(run / "checkpoint_best.pt", folder, [split], predictions.FORWARD, cpu=bool(device))
        rows = data_utils.load_indexed_dataset(str(folder / "label" / split), labels)
        wanted = torch.tensor([int(row[0]) - labels.nspecial for row in rows])
        scores[f"{split}_accuracy"] = accuracy(logits.argmax(1).tolist(), wanted.tolist())
        scores[f"{split}_loss"] = float(cross_entropy(logits, wanted)) / math.log(2)
    return {"accuracy": scores.pop("test_accuracy"), **scores}


def perplexity(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """Perplexity per word, ends of lines included, of the checkpoint with the lowest validation loss."""
    data, scores = Path(settings["data"]), {}
    for split in ("valid", "test"):
        output = fairseq_command(
            "eval_lm", data / "data-bin", "--path", run / "checkpoint_best.pt", "--gen-subset", split,
            "--batch-size", 8, "--tokens-per-sample", settings["evaluation"]["length"], *ALL_INSTANCES, *device,
        )  # fmt: skip
        scores[split] = float(_found(r"Perplexity: ([\d.]+|inf|nan)", output))
        lines = (data / "text" / split).read_text(encoding="utf-8").splitlines()
        wanted, found = sum(len(line.split()) + 1 for line in lines), _found(r"Evaluated ([\d,]+) tokens", output)
        if int(found.replace(",", "")) != wanted:
            raise CommandError(f"fairseq-eval-lm evaluated {found} of {wanted} words of {split}; pieces were left out")
    return {"perplexity": scores["test"], "valid_perplexity": scores["valid"]}


def translation(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """BLEU of the test set with the averaged last checkpoints; the detokenised text is kept for significance tests."""
    options = settings["evaluation"]
    checkpoint = average(run, options["average"])
    data_bin, target = Path(settings["data"]) / "data-bin", options["target"]
    hypotheses, references = translate(data_bin, checkpoint, device, target=target, beam=options["beam"])
    for name, lines in ((HYPOTHESES, hypotheses), (REFERENCES, references)):
        (run / name).write_text("".join(f"{line}\n" for line in detokenise(lines)), encoding="utf-8")
    scores = bleu(hypotheses, references)
    return {"bleu": scores.detokenised, "bleu_tokenised": scores.tokenised}


def glue(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """Scores (%) of a task of GLUE or SuperGLUE on its validation split, of the best checkpoint there.

    As the papers report it: test labels are not public. Where there is a labelled test split, its scores come too.
    """
    folder = predictions.Folder(Path(settings["data"]) / "data-bin")
    scores: Scores = {}
    for split, prefix in (("valid", ""), ("test", "test_")):
        if folder.targets(split) is None:
            continue
        found = predictions.predict(run / "checkpoint_best.pt", folder, split, cpu=bool(device))
        predictions.write(run / f"{split}.predictions.tsv", found)
        for name, value in predictions.score(folder.task, found).items():
            scores[f"{prefix}{name}"] = float("nan") if value is None else value
    return scores


def sts(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """Spearman's correlation, times 100, on seven sets and on average (``avg.``), of the last checkpoint.

    That on the development set of STS-B is ``valid``.
    """
    from scripts.recipes.sts import DEVELOPMENT, SentenceEncoder, evaluate

    data = Path(settings["data"])
    encoder = SentenceEncoder(
        run / "checkpoint_last.pt",
        dictionary=data / "data-bin" / "dict.txt",
        tokenizer_file=data / "encoder" / "tokenizer.json",
        max_length=settings["evaluation"]["max_length"],
        device="cuda" if torch.cuda.is_available() and not device else "cpu",
    )
    valid = evaluate(encoder, data / "corpora", [DEVELOPMENT])[DEVELOPMENT]
    return {**evaluate(encoder, data / "corpora"), "valid": valid}


def transfer(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """Scores of ``glue``, and on the validation splits of other tasks those of linear probes of the best checkpoint.

    The option ``transfer`` names the tasks; their scores begin with the task's name: ``CoLA_matthews``.
    """
    scores = glue(run, settings, device)
    for name in settings["options"]["transfer"]:
        folder = predictions.Folder(Path(settings["data"]) / "transfer" / name)
        found = probe(run / "checkpoint_best.pt", folder, cpu=bool(device))
        scores |= {f"{name}_{metric}": value for metric, value in found.items()}
    return scores


def denoising(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """Loss (bits per subword) of the checkpoint with the lowest validation loss, which goes into ``model``.

    That folder has what a fine-tuning needs: ``model.pt``, without the optimizer's state, dictionary and subwords.
    """
    data, checkpoint = Path(settings["data"]), run / "checkpoint_best.pt"
    output = fairseq_command(
        "validate", data / "data-bin", "--path", checkpoint, "--valid-subset", "valid,test", "--task", "denoising",
        "--max-tokens", settings["flags"]["max-tokens"], "--log-format", "json", *ALL_INSTANCES, *device,
    )  # fmt: skip
    scores = {split: float(_found(rf'"{split}_loss": "([\d.]+|inf|nan)"', output)) for split in ("valid", "test")}
    shutil.rmtree(run / MODEL, ignore_errors=True)
    shutil.copytree(data / MODEL, run / MODEL)
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    torch.save({**state, "last_optimizer_state": None}, run / MODEL / "model.pt")
    return {"loss": scores["test"], "valid_loss": scores["valid"]}


def summarisation(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """ROUGE (F, %) of the test set's summaries by the checkpoint with the lowest validation loss."""
    found, targets, _ = _generated(run, settings, device, "test")
    return rouge([_by_sentence(line) for line in found], [_by_sentence(line) for line in targets])


def correction(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """Scores of the corrected test set: MaxMatch where its edits are annotated, else GLEU; best checkpoint."""
    found, _, sources = _generated(run, settings, device, "test")
    data = Path(settings["data"])
    if (data / M2).exists():
        scores = max_match(found, read_m2(data / M2))
        return {"precision": scores["precision"], "recall": scores["recall"], "f0.5": scores["f"]}
    files = sorted((data / ANNOTATORS).iterdir())
    return {"gleu": gleu(found, [path.read_text(encoding="utf-8").split("\n")[:-1] for path in files], sources)}


def mixture(run: Path, settings: dict[str, Any], device: list[str]) -> Scores:
    """Scores (%) of each task of a mixture that is trained as text to text, on its validation split."""
    found, _, _ = _generated(run, settings, device, "valid")
    parts = json.loads((Path(settings["data"]) / text_to_text.PARTS).read_text(encoding="utf-8"))
    return text_to_text.score_parts([text_to_text.Part(*part) for part in parts], found)


def _generated(
    run: Path, settings: dict[str, Any], device: list[str], split: str
) -> tuple[list[str], list[str], list[str]]:
    """Generated lines, targets and sources; the settings of the evaluation are flags of fairseq-generate."""
    data, flags = Path(settings["data"]), command_line(settings["evaluation"])
    lines = generate(data, run / "checkpoint_best.pt", data / MODEL, [*flags, *device], split)
    (run / GENERATED).write_text("".join(f"{line}\n" for line in lines[0]), encoding="utf-8")
    return lines


def _by_sentence(line: str) -> str:
    """The sentences of a text on lines of their own, for summary-level ROUGE."""
    return re.sub(r"(?<=[.!?]) +", "\n", line)


EVALUATIONS: dict[str, Callable[[Path, dict[str, Any], list[str]], Scores]] = {
    "classification": classification,
    "perplexity": perplexity,
    "translation": translation,
    "glue": glue,
    "sts": sts,
    "transfer": transfer,
    "denoising": denoising,
    "summarisation": summarisation,
    "correction": correction,
    "mixture": mixture,
}


def _found(pattern: str, output: str) -> str:
    matches = re.findall(pattern, output)
    if not matches:
        raise CommandError(f"expected {pattern} in the output, which ends with\n{output[-1000:]}")
    return str(matches[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    args = parser.parse_args()
    settings = json.loads((args.run / SETTINGS).read_text(encoding="utf-8"))
    evaluate = EVALUATIONS[settings["evaluate"]]
    try:
        scores = evaluate(args.run, settings, ["--cpu"] if args.cpu else [])
    except CommandError as error:
        raise SystemExit(f"error: {error}") from None
    partial = args.run / f"{SCORES}.part"
    partial.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    partial.replace(args.run / SCORES)
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
