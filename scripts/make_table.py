#!/usr/bin/env python3
"""Make the tables of recipes from their obtained.tsv: mean ± deviation over seeds, difference to the baseline, p-value.

    make_table.py                                       # all recipes, as Markdown
    make_table.py ga_sam_table1_imdb --size mini --format latex
    make_table.py ga_sam_table1_imdb --obtained runs/ga_sam_table1_imdb/mini/obtained.tsv
    make_table.py --readme                              # those of the recipes' READMEs, and docs/results.md

The p-value is that of a paired t-test over seeds; for BLEU of sacreBLEU's paired bootstrap, the largest over seeds.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.recipes.marks import put_between  # noqa: E402
from scripts.recipes.obtained import OBTAINED, read_rows  # noqa: E402
from scripts.recipes.recipe import Metric, RecipeError, column_names, read_recipe, recipe_folders, size_names  # noqa: E402
from scripts.recipes.shared_rows import share_rows  # noqa: E402
from scripts.recipes.tables import AVERAGE, FORMATS, average_rows, cells, table_rows  # noqa: E402

RESULTS = ROOT / "docs" / "results.md"
HEAD = """# Results

What was run of the [recipes](../examples/README.md#the-list) so far: means ± standard deviations over seeds, the
difference to the baseline (↑ better, ↓ worse), the p-value of a paired test (over seeds; for BLEU sacreBLEU's
bootstrap), forward-backward passes per update, time of training. `--size mini` is far smaller than the paper, so that
its numbers compare methods, not models: the paper's are beside them for their differences, which are those of its
rounded means. The recipe's page says what was scaled down, for some the corpus or the pretrained model too. Its
`obtained.tsv` has a row for each run: its score, updates, passes and seconds, the versions and the hardware, the
commit, and the flags that the method adds to the baseline's. All other settings are in `recipe.yaml` at that commit.
Made by `scripts/make_table.py --readme`.
"""
TITLES = {"markdown": "{}\n\n", "latex": "% {}\n", "tsv": "# {}\n"}
BEGIN, END = "<!-- table: made by scripts/make_table.py --readme -->", "<!-- end of table -->"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="*", help="folders with recipe.yaml, or names of those in examples; default all"
    )
    parser.add_argument("--size", default="mini", help="mini or paper; default mini")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument("--obtained", type=Path, help="file of runs; default obtained.tsv in the recipe's folder")
    parser.add_argument("--readme", action="store_true", help="write READMEs' tables and docs/results.md")
    parser.add_argument("--output", type=Path, help="file to write; default standard output")
    args = parser.parse_args()
    if args.obtained and len(args.recipes) != 1:
        raise SystemExit(f"error: --obtained goes with one recipe, got {len(args.recipes)}")
    if args.obtained and not args.obtained.is_file():
        raise SystemExit(f"error: --obtained must be a file of runs, got {args.obtained}, which is none")
    if args.output and not args.output.parent.is_dir():
        raise SystemExit(f"error: --output must be in a folder that is there, got {args.output}")
    try:
        if args.readme:
            share_rows([read_recipe(folder, "mini").folder for folder in args.recipes] or recipe_folders())
            for folder in args.recipes or recipe_folders():
                write_readme(read_recipe(folder, "mini").folder)
            RESULTS.write_text(results(), encoding="utf-8")
        folders = args.recipes or [folder for folder in recipe_folders() if args.size in size_names(folder)]
        texts = [table(folder, args.size, args.format, args.obtained) for folder in folders]
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from None
    text = "\n".join(texts)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    elif not args.readme:
        sys.stdout.write(text)


def table(folder: str | Path, size: str, form: str, obtained: Path | None = None) -> str:
    """One recipe's table, a part for each of its columns, with their titles."""
    recipes = [read_recipe(folder, size, column) for column in column_names(folder, size)]
    first = recipes[0]
    expected, runs = first.folder / "expected.tsv", obtained or first.folder / OBTAINED
    columns = [table_rows(recipe, runs, expected) for recipe in recipes]
    if obtained and not any(row.values for rows in columns for row in rows):
        raise RecipeError(f"{obtained} has no runs of {first.name} at --size {size}")
    named = [(recipe.column, rows, recipe.metric) for recipe, rows in zip(recipes, columns, strict=True)]
    if first.average:
        num_wanted = len(column_names(folder, "paper"))
        others = f", the paper's of its {num_wanted}" if num_wanted > len(recipes) else ""
        what = f"{AVERAGE} of the {len(recipes)} above{others}"
        own = [[row for row in rows if row.method in first.methods] for rows in columns]
        named.append((what, average_rows(own, expected), Metric(AVERAGE, digits=first.metric.digits)))
    parts = []
    for name, rows, metric in named:
        title = f"{first.paper}: {first.title}{f', {name}' if name else ''} (`--size {size}`)"
        parts.append(TITLES[form].format(title) + FORMATS[form](cells(rows, metric)))
    return "\n".join(parts)


def write_readme(folder: Path) -> None:
    """Put the tables of the sizes that were run between the marks of a recipe's README."""
    path = folder / "README.md"
    tables = "\n".join(table(folder, size, "markdown") for size in _sizes_run(folder) or ["mini"])
    try:
        page = put_between(path.read_text(encoding="utf-8"), BEGIN, END, tables)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    path.write_text(page, encoding="utf-8")


def results() -> str:
    """A page with the tables of all recipes that were run."""
    parts = [HEAD]
    for folder in recipe_folders():
        sizes = _sizes_run(folder)
        if sizes:
            tables = "\n".join(table(folder, size, "markdown") for size in sizes)
            parts.append(f"## [{folder.name}](../examples/{folder.name}/README.md)\n\n{tables}")
    return "\n".join(parts)


def _sizes_run(folder: Path) -> list[str]:
    return sorted({row["size"] for row in read_rows(folder / OBTAINED)})


if __name__ == "__main__":
    main()
