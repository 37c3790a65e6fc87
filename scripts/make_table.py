#!/usr/bin/env python3
"""Make the tables of recipes from their obtained.tsv: mean ± deviation over seeds, difference to the baseline, p-value.

    make_table.py                                       # all recipes, as Markdown
    make_table.py ga_sam_table1_imdb --size mini --format latex
    make_table.py ga_sam_table1_imdb --obtained runs/ga_sam_table1_imdb/mini/obtained.tsv

The p-value is that of a paired t-test over seeds; for BLEU of sacreBLEU's paired bootstrap, the largest over seeds.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.recipes.recipe import RecipeError, read_recipe, recipe_folders  # noqa: E402
from scripts.recipes.tables import FORMATS, cells, table_rows  # noqa: E402


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="*", help="folders with recipe.yaml, or names of those in examples; default all"
    )
    parser.add_argument("--size", default="mini", help="mini or paper; default mini")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument("--obtained", type=Path, help="file of runs; default obtained.tsv in the recipe's folder")
    parser.add_argument("--output", type=Path, help="file to write; default standard output")
    args = parser.parse_args()
    if args.obtained and len(args.recipes) != 1:
        raise SystemExit(f"error: --obtained goes with one recipe, got {len(args.recipes)}")
    texts = []
    for folder in args.recipes or recipe_folders():
        try:
            recipe = read_recipe(folder, args.size)
        except RecipeError as error:
            raise SystemExit(f"error: {error}") from None
        obtained = args.obtained or recipe.folder / "obtained.tsv"
        rows = table_rows(recipe, obtained, recipe.folder / "expected.tsv")
        title = f"{recipe.paper}: {recipe.title} ({args.size})\n\n" if args.format == "markdown" else ""
        texts.append(title + FORMATS[args.format](cells(rows, recipe.metric)))
    text = "\n".join(texts)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
