#!/usr/bin/env python3
"""Run a recipe over methods and seeds: prepare the data once, train, score, write obtained.tsv.

    run_table.py ga_sam_table1_imdb --size mini
    run_table.py ga_sam_table1_imdb --size mini --methods SAM GA-SAM --seeds 1 2 --jobs 2 --cpu

Started again, it goes on where it stopped: prepared data and finished runs are kept, others continue from their last
checkpoint. A model that the recipe needs, such as bart_small, is trained first, unless ``--set model=FOLDER`` names
another. With several GPUs there is a job on each at a time; ``--jobs`` says otherwise.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.recipes.recipe import RecipeError, column_names, read_recipe  # noqa: E402
from scripts.recipes.runner import RunError, run_table  # noqa: E402

NEARBY = ROOT.parent / "shared" / "data"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a folder with recipe.yaml, or the name of one in examples")
    parser.add_argument("--size", default="mini", help="mini (2 CPU cores) or paper (a GPU); default mini")
    parser.add_argument("--data", type=Path, default=NEARBY, help=f"folder of the corpora; default {NEARBY}")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs; default ./runs")
    parser.add_argument("--methods", nargs="+", help="rows of the table; default all")
    parser.add_argument("--columns", nargs="+", help="columns of the table (tasks, sampling rates); default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the recipe's")
    parser.add_argument("--jobs", type=int, help="runs at a time; default one for each GPU, or one on the CPU")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument("--record", action="store_true", help="write obtained.tsv into the recipe's folder too")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options other than the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and leave")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        if args.jobs is not None and args.jobs < 1:
            raise RunError(f"--jobs must be an integer >= 1, got {args.jobs}")
        if ":" in str(args.out.absolute()):
            raise RunError(
                f"--out must be a path without a colon, at which fairseq cuts paths, got {args.out.absolute()}"
            )
        if min(args.seeds or [1]) < 0:
            raise RunError(f"--seeds must be integers >= 0, got {min(args.seeds)}")
        if args.out.exists() and not args.out.is_dir():
            raise RunError(f"--out must be a folder, got {args.out}, which is a file")
        changed = changed_options(args.set)
        columns = args.columns or column_names(args.recipe, args.size)
        recipes = [read_recipe(args.recipe, args.size, column, changed) for column in columns]
        run_table(
            recipes, data=args.data, out=args.out, methods=args.methods, seeds=args.seeds, num_jobs=args.jobs,
            cpu=args.cpu, record=args.record, dry_run=args.dry_run,
        )  # fmt: skip
    except (RecipeError, RunError) as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None


def stop(number: int, frame: Any) -> NoReturn:
    """Stop as after Ctrl-C, with all runs."""
    raise KeyboardInterrupt


def changed_options(words: Sequence[str]) -> dict[str, str]:
    """Options from ``NAME=VALUE``; a path that exists is made absolute, since preparations run elsewhere.

    Raises:
        RecipeError: if a word is not of that form.
    """
    options = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not (name and sign):
            raise RecipeError(f"--set takes NAME=VALUE, got {word!r}")
        options[name] = str(Path(value).resolve()) if value and Path(value).exists() else value
    return options


if __name__ == "__main__":
    main()
