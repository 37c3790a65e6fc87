"""Jobs: one training run each, and what its logs say."""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.recipes.commands import PLUGIN
from scripts.recipes.recipe import Flags, Recipe, command_line

LOG, OUTPUT, SCORES, SETTINGS = "train.log", "output.log", "scores.json", "settings.json"
MODEL = "model"  # in the folder of a run that others need: its model


@dataclass(frozen=True, eq=False)
class Job:
    """A method of a recipe with one seed.

    Runs lie in folders that are named after their settings: the same settings in two tables are one run.

    Args:
        recipe: the recipe.
        method: row of the table.
        seed: of the run.
        out: folder of all runs.
        cpu: whether to train on the CPU even where there is a GPU.
        until: last epoch of a run that is only the beginning of others; None for a row of the table.
    """

    recipe: Recipe
    method: str
    seed: int
    out: Path
    cpu: bool = False
    until: int | None = None

    @property
    def flags(self) -> Flags:
        """fairseq-train's flags, without those of folders, logs and the seed."""
        flags = dict(self.recipe.methods[self.method])
        return flags if self.until is None else {**flags, "max-epoch": self.until, "keep-last-epochs": 1}

    @property
    def start(self) -> "Job | None":
        """The run of the base optimizer that this one begins with, if the recipe shares one; see ``start.py``.

        The baseline runs on its own: fairseq makes other batches after a resume, which only our runs are spared.
        """
        starts = [int(flags["sam-start-epoch"]) for flags in self.recipe.methods.values() if "sam-start-epoch" in flags]
        last = min(starts, default=1) - 1
        own = int(self.flags.get("max-epoch") or 0) - int(self.flags.get("keep-last-epochs") or 0)  # not averaged
        is_plain = "sam-start-epoch" not in self.flags
        if not self.recipe.shared_start or is_plain or not 1 <= last <= own:
            return None
        return Job(self.recipe, self.recipe.baseline, self.seed, self.out, self.cpu, until=last)

    @cached_property
    def data(self) -> Path:
        """The prepared data."""
        return data_folder(self.recipe, self.out)

    @cached_property
    def key(self) -> tuple[Path, str, int]:
        """What jobs with the same settings and seed, which are one run, have in common."""
        scoring = [self.recipe.evaluate, *([dict(self.recipe.evaluation)] if self.recipe.evaluation else [])]
        settings = json.dumps([self.flags, dict(self.recipe.options), *scoring], sort_keys=True)
        return self.data.parent / "runs", _digest(settings), self.seed

    @cached_property
    def folder(self) -> Path:
        """Where the run is."""
        parent, settings, seed = self.key
        slug = re.sub(r"\W+", "-", self.method.lower()).strip("-")
        return parent / f"{settings}-{slug}" / f"seed{seed}"

    @property
    def run(self) -> Path:
        """The folder of a run with these settings: of another name where another table or row has made it."""
        parent, settings, seed = self.key
        made = sorted(path for path in parent.glob(f"{settings}-*/seed{seed}") if (path / SETTINGS).exists())
        return made[0] if made else self.folder

    def training(self) -> list[str]:
        """The command that trains, or goes on with what it finds in the folder."""
        run = self.run
        own = {"save-dir": run, "seed": self.seed, "log-file": run / LOG, "log-format": "json", "user-dir": PLUGIN}
        flags = {"log-interval": 50, "no-progress-bar": None, **self.flags, **own, "cpu": self.cpu or None}
        words = [word.replace("{data}", str(self.data)) for word in command_line(flags)]
        return [sys.executable, "-m", "fairseq_cli.train", str(self.data / "data-bin"), *words]

    def evaluation(self) -> list[str]:
        """The command that scores the run."""
        words = [sys.executable, "-m", "scripts.recipes.evaluations", str(self.run)]
        return [*words, *(["--cpu"] if self.cpu else [])]

    def measurements(self) -> list[list[str]]:
        """The commands that measure what else the table shows of the run, each with its own file of scores."""
        words = [sys.executable, "-m", "scripts.recipes.measures", str(self.run)]
        device = ["--cpu"] if self.cpu else []
        return [
            [*words, name, json.dumps(settings, sort_keys=True), str(self._measured(name)), *device]
            for name, settings in self.recipe.measures.items()
            if not self._measured(name).exists()
        ]

    def _measured(self, name: str) -> Path:
        """What a measure has found, in a file that is named after its settings."""
        settings = json.dumps(self.recipe.measures[name], sort_keys=True)
        return self.run / f"{name}-{_digest(settings)}.json"

    @property
    def is_scored(self) -> bool:
        """Whether the run has been trained and scored; measures may be missing."""
        return (self.run / SCORES).exists()

    def commands(self) -> list[list[str]]:
        """The commands that are left of the job, in their order."""
        if self.until is not None:
            return [self.training()]
        begin = [sys.executable, "-m", "scripts.recipes.start"]
        first = [[*begin, str(self.start.run), str(self.run), str(self.flags["optimizer"])]] if self.start else []
        whole = [] if self.is_scored else [*first, self.training(), self.evaluation()]
        return [*whole, *self.measurements()]

    def write_settings(self) -> None:
        """Write down what the evaluation needs to know."""
        self.run.mkdir(parents=True, exist_ok=True)
        settings = {
            "recipe": self.recipe.name, "size": self.recipe.size, "method": self.method, "seed": self.seed,
            "evaluate": self.recipe.evaluate, "metric": self.recipe.metric.name, "options": dict(self.recipe.options),
            "evaluation": dict(self.recipe.evaluation), "flags": self.flags, "data": str(self.data),
        }  # fmt: skip
        (self.run / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @property
    def scores(self) -> dict[str, Any] | None:
        """What evaluation and measures found; None before all are done."""
        paths = [self.run / SCORES, *([] if self.until is not None else map(self._measured, self.recipe.measures))]
        if not all(path.exists() for path in paths):
            return None
        return {name: value for path in paths for name, value in json.loads(path.read_text(encoding="utf-8")).items()}


def needed_jobs(recipe: Recipe, out: Path) -> dict[str, Job]:
    """The runs whose models a recipe's preparation needs, by option."""
    return {name: Job(needed, needed.baseline, needed.seeds[0], out) for name, needed in recipe.needs.items()}


def data_folder(recipe: Recipe, out: Path) -> Path:
    """Where the data of a recipe is prepared: named after the preparing folder, size, options and needed runs."""
    runs = {name: str(job.folder.relative_to(out)) for name, job in needed_jobs(recipe, out).items()}
    options = json.dumps({key: value for key, value in sorted({**recipe.options, **runs}.items())})
    return out / recipe.prepare.parent.name / recipe.size / _digest(options) / "data"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# -- logs --------------------------------------------------------------------------------------------------------------


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The statistics that fairseq has logged, oldest first; a line that is cut off is left out."""
    path, found = run / LOG, []
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.startswith("{") and line.endswith("}"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def training_summary(run: Path) -> dict[str, float]:
    """What training took.

    Returns:
        ``seconds``: of training steps, without validation and saving. ``updates``, ``epochs``. ``passes``: mean number
        of forward-backward passes per update and micro-batch. ``best_valid``: lowest validation loss, bits.
    """
    by_epoch = {line["epoch"]: line for line in log_lines(run) if "train_loss" in line}
    seconds = passes = before = 0.0
    for epoch in sorted(by_epoch):
        line = by_epoch[epoch]
        updates = float(line["train_num_updates"])
        seconds += float(line.get("train_train_wall", 0.0))
        passes += float(line.get("train_sam_passes", 1.0)) * (updates - before)
        before = updates
    valid = [float(line["valid_loss"]) for line in log_lines(run) if "valid_loss" in line]
    return {
        "seconds": round(seconds, 1),
        "updates": before,
        "epochs": float(len(by_epoch)),
        "passes": round(passes / before, 3) if before else 0.0,
        "best_valid": min(valid, default=float("nan")),
    }


def progress_of(run: Path, flags: Flags) -> tuple[float, str]:
    """How far a run is, from 0 to 1, and what to show of it."""
    lines = [line for line in log_lines(run) if "epoch" in line]
    if (run / SCORES).exists():
        return 1.0, "trained and scored, now measuring"
    if not lines:
        return 0.0, "starting"
    last = lines[-1]
    done = max(float(line.get("update", line["epoch"])) for line in lines)
    whole = float(flags.get("max-epoch") or 0)
    updates = float(last.get("num_updates") or last.get("train_num_updates") or last.get("valid_num_updates") or 0)
    limit = float(flags.get("max-update") or 0)
    share = max(done / whole if whole else 0.0, updates / limit if limit else 0.0)
    loss = next((line[key] for line in reversed(lines) for key in ("loss", "train_loss") if key in line), "?")
    epoch = f"epoch {last['epoch']}" + (f"/{whole:g}" if whole else "")
    return min(share, 1.0), f"{epoch}, loss {loss}"
