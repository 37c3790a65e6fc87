#!/usr/bin/env python3
"""Draw a recipe's scores as curves: mean over seeds, with the standard deviation as a band around it.

plot_curve.py fsam_figure2_roberta_large --out figure2.png                   # over the sampling rate
plot_curve.py fsam_figure1 --x sam-sparsity --out figure1.pdf                # over a flag of the methods
plot_curve.py cheaper_imdb --x passes --y-range 81 83 --out cost.png         # over what the methods cost
plot_curve.py fsam_figure2_roberta_large --obtained runs/…/obtained.tsv --out figure2.png
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.recipes.curves import draw, panels  # noqa: E402
from scripts.recipes.obtained import OBTAINED  # noqa: E402
from scripts.recipes.recipe import RecipeError, column_names, read_recipe  # noqa: E402


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a folder with recipe.yaml, or the name of one in examples")
    parser.add_argument("--size", default="mini", help="mini or paper; default mini")
    parser.add_argument("--x", help="option of the columns, flag of the methods, or passes, to draw over; default rate")
    parser.add_argument("--obtained", type=Path, help="file of runs; default obtained.tsv in the recipe's folder")
    parser.add_argument(
        "--y-range", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="scores on the vertical axis; an arrow stands for a mean outside; default all",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="file to write: .png, .pdf or .svg")
    args = parser.parse_args()
    if args.y_range and not args.y_range[0] < args.y_range[1]:
        parser.error(f"--y-range must be two numbers, the lower one first, got {args.y_range[0]:g} {args.y_range[1]:g}")
    try:
        recipes = [read_recipe(args.recipe, args.size, column) for column in column_names(args.recipe, args.size)]
        first = recipes[0]
        shown = panels(recipes, args.obtained or first.folder / OBTAINED, args.x)
        draw(shown, args.x, f"{first.paper}: {first.title} ({args.size})", args.out, args.y_range)
    except (RecipeError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
