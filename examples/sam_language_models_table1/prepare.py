#!/usr/bin/env python3
"""Prepare a mixture of tasks of GLUE and SuperGLUE as text to text, with the subwords of a pretrained model.

Reads the tasks' official files in ``superglue`` or ``glue`` below ``--data``. All tasks' training instances are one
training part, so that each task counts by its size; the validation part has the tasks' validation instances one task
after another, and ``parts.json`` says which and with what answers.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.recipes.glue import find_file, find_files, read_file, sampled
from scripts.recipes.glue_tasks import TASKS, GlueTask, Instance
from scripts.recipes.samples import sample
from scripts.recipes.sequences import link_model, prepare_pairs
from scripts.recipes.text_to_text import PARTS, Part, source_line, target_line

FOLDERS = ("superglue", "glue")
SUFFIXES = {"valid": "", "valid1": "-mm"}  # MNLI's second validation file is mismatched


def read_task(task: GlueTask, data: Path, held_out: int, seed: int) -> dict[str, list[Instance]]:
    """A task's instances by split; without a training file, those of the validation file that are not held out."""
    there = [data / name for name in FOLDERS if (data / name / task.name).is_dir()]
    # SuperGLUE's archive brings an RTE in a format of its own; GLUE's is the same task.
    folder = next((place for place in there if find_file(task, place, "valid")), there[0] if there else None)
    if folder is None:
        raise ValueError(f"neither {' nor '.join(FOLDERS)} in --data {data} has a folder {task.name}")
    splits = [split for split in task.files if split != "test"]
    if find_file(task, folder, "train") or not held_out:
        files = find_files(task, folder, splits)
        return {split: read_file(task, path, split).instances for split, path in files.items()}
    instances = read_file(task, find_files(task, folder, ["valid"])["valid"], "valid").instances
    kept = set(sample([instance.answer for instance in instances], held_out, seed))
    return {
        "train": [instance for place, instance in enumerate(instances) if place not in kept],
        "valid": [instance for place, instance in enumerate(instances) if place in kept],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora, with superglue and glue in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write data-bin into")
    parser.add_argument("--tasks", required=True, nargs="+", choices=TASKS, help="names of the tasks")
    parser.add_argument("--model", help="folder of the pretrained model")
    parser.add_argument("--rate", type=float, help="share of each training split that is kept, in (0, 1]")
    parser.add_argument("--max-train", type=int, help="training instances of a task that are kept")
    parser.add_argument("--sample-seed", type=int, default=1, help="seed of the samples")
    parser.add_argument(
        "--held-out", type=int, default=0,
        help="of a task without a training file: validation instances that are evaluated; the others are trained on",
    )  # fmt: skip
    parser.add_argument("--max-source", type=int, default=512, help="subwords of a source; the rest is cut off")
    parser.add_argument("--max-target", type=int, default=62, help="subwords of a target in the training part")
    args = parser.parse_args()
    pairs: dict[str, list[tuple[str, str]]] = {"train": [], "valid": []}
    parts = []
    try:
        model = link_model(args.model, args.out)
        for task in (TASKS[name] for name in args.tasks):
            for split, found in read_task(task, args.data, args.held_out, args.sample_seed).items():
                is_train = split == "train"
                chosen = sampled(task, found, args.rate, args.max_train, args.sample_seed) if is_train else found
                lines = [(source_line(task, each), target_line(task, each.answer)) for each in chosen]
                pairs["train" if is_train else "valid"] += lines
                if not is_train:
                    name = f"{task.name.lower()}{SUFFIXES[split]}"
                    parts.append(Part(name, task.name, [each.answer for each in chosen]))
                print(f"{task.name}, {split}: {len(chosen)} instances", flush=True)
        prepare_pairs(pairs, model, args.out, args.max_source, args.max_target)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    (args.out / PARTS).write_text(json.dumps(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
