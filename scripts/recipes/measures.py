"""What a table shows of finished runs besides their scores; a table with measures shares its runs with those without.

As a command: ``python -m scripts.recipes.measures RUN NAME SETTINGS OUT [--cpu]``; SETTINGS are JSON.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq_sam.adapter.trained import Trained
from fairseq_sam.analysis.robustness import robustness as measure_robustness
from fairseq_sam.analysis.sharpness import adversarial_risk as measure_risk
from fairseq_sam.commands.common import Progress
from scripts.recipes.commands import CommandError
from scripts.recipes.evaluations import Scores
from scripts.recipes.jobs import SETTINGS
from scripts.recipes.significance import hypotheses_name
from scripts.recipes.translation import average, bleu, detokenise, translate

MAX_TOKENS = 4000


def robustness(run: Path, settings: Mapping[str, Any], measured: Mapping[str, Any], device: list[str]) -> Scores:
    """BLEU of the test set after adversarial corruptions of the averaged model: ``bleu l2 0.05`` and so on.

    Args:
        run: folder of a run that was scored as a translation.
        settings: of the run.
        measured: ``radii`` by norm; ``steps`` of a corruption; ``subset``, whose loss the corruption makes large.
        device: flags of fairseq.
    """
    options, data_bin = settings["evaluation"], Path(settings["data"]) / "data-bin"
    trained = Trained(average(run, options["average"]), data_bin, cpu=bool(device))
    radii: Mapping[str | float, Sequence[float]] = measured["radii"]
    names = [f"{norm} {radius:g}" for norm, several in radii.items() for radius in several]
    corruptions = iter(["", *names])  # the first row is the model as it is, which the run's own scores are of

    def score() -> Scores:
        name = next(corruptions)
        return {"bleu": bleu_of_corrupted(f"bleu {name}")} if name else {}

    def bleu_of_corrupted(metric: str) -> float:
        with tempfile.TemporaryDirectory(dir=run) as folder:
            checkpoint = trained.save(Path(folder) / "corrupted.pt")
            hypotheses, references = translate(
                data_bin, checkpoint, device, target=options["target"], beam=options["beam"]
            )
        text = "".join(f"{line}\n" for line in detokenise(hypotheses))
        (run / hypotheses_name(metric)).write_text(text, encoding="utf-8")
        return bleu(hypotheses, references).detokenised

    objective = trained.objective(trained.batches(measured["subset"], max_tokens=MAX_TOKENS))
    first, *rows = measure_robustness(
        objective, radii=radii, steps=measured["steps"], score=score, progress=Progress("robustness")
    )
    scores = {"loss": first.loss}
    for name, row in zip(names, rows, strict=True):
        scores |= {f"bleu {name}": row.scores["bleu"], f"loss {name}": row.loss}
    return scores


def adversarial_risk(run: Path, settings: Mapping[str, Any], measured: Mapping[str, Any], device: list[str]) -> Scores:
    """Mean loss (nats) of each instance at the worst weights for it, of the best checkpoint: ``risk``.

    Args:
        run: folder of a run of a classification task.
        settings: of the run.
        measured: ``subset``; ``epsilon``, radius in 2-norm; ``steps`` of each ascent.
        device: flags of fairseq.
    """
    trained = Trained(run / "checkpoint_best.pt", Path(settings["data"]) / "data-bin", cpu=bool(device))
    instances = trained.batches(measured["subset"], max_tokens=None, batch_size=1)
    found = measure_risk(
        trained.model, instances, trained.loss_sum, epsilon=measured["epsilon"], steps=measured["steps"],
        progress=Progress("adversarial risk"),
    )  # fmt: skip
    return {"risk": found.perturbed_loss * math.log(2), "loss": found.loss * math.log(2)}


MEASURES: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, Any], list[str]], Scores]] = {
    "robustness": robustness,
    "adversarial_risk": adversarial_risk,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a scored run")
    parser.add_argument("name", choices=sorted(MEASURES), help="what is measured")
    parser.add_argument("settings", type=json.loads, help="of the measure, as JSON")
    parser.add_argument("out", type=Path, help="file for what is found")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    args = parser.parse_args()
    torch.manual_seed(1)
    settings = json.loads((args.run / SETTINGS).read_text(encoding="utf-8"))
    try:
        found = MEASURES[args.name](args.run, settings, args.settings, ["--cpu"] if args.cpu else [])
    except CommandError as error:
        raise SystemExit(f"error: {error}") from None
    partial = args.out.with_suffix(".part")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(args.out)


if __name__ == "__main__":
    main()
