"""``fairseq-sam spectrum``: the largest eigenvalues of the Hessian and of the Fisher information (GA-SAM Fig. 3).

With them the Hessian's trace and the density of its eigenvalues.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_sam.analysis.plots import BITS, draw_curves, figure, save, set_whole_numbers, show_names_below
from fairseq_sam.analysis.spectrum import (
    TOP,
    Eigenvalues,
    Quadrature,
    check_lanczos,
    fisher_eigenvalues,
    hessian_density,
    hessian_eigenvalues,
    hessian_trace,
    smoothed,
)
from fairseq_sam.commands import common, options

PARTS = ("hessian", "fisher", "trace", "density")
DEFAULTS = {"top": TOP, "instances": 256, "samples": 30, "density_steps": 80}
USES = {
    "top": ("hessian", "fisher"), "fisher_top": ("fisher",), "steps": ("hessian",), "instances": ("fisher",),
    "samples": ("trace",), "density_steps": ("density",),
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Measure each checkpoint; write ``eigenvalues.tsv``, ``trace.tsv``, ``density.tsv`` and ``spectrum.png``."""
    parser = options.parser("spectrum", __doc__ or "")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured; default all")
    parser.add_argument("--top", type=options.integer(1), help=f"how many eigenvalues; default {TOP}")
    parser.add_argument(
        "--fisher-top", type=options.integer(1), help="how many of the Fisher information; default as --top"
    )
    parser.add_argument(
        "--steps",
        type=options.integer(1),
        help="of Lanczos, each keeps a vector of the weights' size; default 6 --top + 20",
    )
    parser.add_argument(
        "--instances",
        type=options.integer(1),
        help=f"of the Fisher information, at random; default {DEFAULTS['instances']}",
    )
    parser.add_argument(
        "--samples", type=options.integer(2), help=f"products for the trace; default {DEFAULTS['samples']}"
    )
    parser.add_argument(
        "--density-steps",
        type=options.integer(1),
        help=f"of Lanczos for the density, as --steps; default {DEFAULTS['density_steps']}",
    )
    parser.add_argument(
        "--exclude", type=options.pattern, default="", help="regular expression: parameters that are held constant"
    )
    args = parser.parse_args(arguments)
    options.refuse_unused(parser, args, "parts", USES)
    options.fill(args, DEFAULTS)
    options.fill(args, {"fisher_top": args.top})
    if "fisher" in args.parts and args.fisher_top > args.instances:
        parser.error(
            f"--fisher-top, by default --top, must be at most --instances, {args.instances}, got {args.fisher_top}: "
            "the Fisher information has no more eigenvalues; raise --instances, or leave fisher out of --parts"
        )
    if args.steps is not None and args.steps < args.top:
        parser.error(f"--steps must be at least --top, {args.top}, got {args.steps}")
    names, image = ("eigenvalues", "trace", "density"), args.out / "spectrum.png"
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    quadratures: dict[str, Quadrature] = {}
    with common.drawing(lambda: any(tables.values()) and plot(tables, image)):
        for model in common.trained_models(args, *(f"{name}.tsv" for name in names), image.name):
            with common.about(model.name):
                for table, found in measured(args, model):
                    if isinstance(found, Quadrature):
                        quadratures[model.name] = found
                        tables[table] = density_rows(quadratures)
                    else:
                        tables[table] += found
                    model.write(f"{table}.tsv", tables[table])
    common.written(*(args.out / f"{table}.tsv" for table, rows in tables.items() if rows), image)


def measured(args: argparse.Namespace, of: common.Measured) -> Iterator[tuple[str, list[dict[str, Any]] | Quadrature]]:
    """Measure a model.

    Yields:
        Tables and the model's rows of them; of the density what it is made of, since that of all models is smoothed
        alike.
    """
    trained, name, objective, single = of.trained, of.name, of.trained.objective(of.batches, args.exclude), []
    if "density" in args.parts:
        check_lanczos(objective, args.density_steps)  # not after hours of the other parts
    if "fisher" in args.parts:
        single = of.note("instances", common.batches_of(args, trained, batch_size=1, number=args.instances))
        if len(single) < args.fisher_top:
            raise ValueError(
                f"--fisher-top must be at most {len(single)}, the sentences of {args.subset}, got {args.fisher_top}"
            )
    if "hessian" in args.parts:
        progress = common.Progress(f"Hessian of {name}")
        found = hessian_eigenvalues(objective, args.top, steps=args.steps, seed=args.seed, progress=progress)
        warn_of_others(name, found)
        yield "eigenvalues", eigenvalue_rows(name, "hessian", found)
    if "fisher" in args.parts:
        found = fisher_eigenvalues(
            trained.model, single, trained.loss_sum, args.fisher_top, exclude=args.exclude,
            progress=common.Progress(f"Fisher information of {name}"),
        )  # fmt: skip
        # Squares of gradients: those of a loss in bits are 1 / ln 2 times as large as a Hessian in bits.
        in_bits = Eigenvalues(found.values * math.log(2), found.residuals)
        yield "eigenvalues", eigenvalue_rows(name, "fisher", in_bits)
    if "trace" in args.parts:
        trace = hessian_trace(objective, args.samples, seed=args.seed, progress=common.Progress(f"trace of {name}"))
        yield "trace", [{"model": name, "trace": trace.value, "standard error": trace.error}]
    if "density" in args.parts:
        progress = common.Progress(f"density of {name}")
        yield "density", hessian_density(objective, steps=args.density_steps, seed=args.seed, progress=progress)


def density_rows(quadratures: Mapping[str, Quadrature]) -> list[dict[str, Any]]:
    """Return the table of densities, all smoothed alike."""
    return [
        {"model": name, "eigenvalue": place, "density": value, "kernel width": density.width}
        for name, density in zip(quadratures, smoothed(list(quadratures.values())), strict=True)
        for place, value in zip(density.grid.tolist(), density.density.tolist(), strict=True)
    ]


def eigenvalue_rows(name: str, matrix: str, found: Any) -> list[dict[str, Any]]:
    """Return rows of the table of eigenvalues."""
    triples = zip(found.values.tolist(), found.residuals.tolist(), found.known.tolist(), strict=True)
    return [
        {
            "model": name, "matrix": matrix, "rank": rank, "eigenvalue": value, "residual": residual,
            "converged": "yes" if is_known else "no",
        }
        for rank, (value, residual, is_known) in enumerate(triples, 1)
    ]  # fmt: skip


def warn_of_others(name: str, found: Eigenvalues) -> None:
    """Say how many eigenvalues Lanczos has not brought near enough."""
    number = len(found.values) - int(found.known.sum())
    if number:
        print(
            f"{name}: {number} of {len(found.values)} eigenvalues of the Hessian have not converged (hollow in the "
            "plot, column `converged`); they may be far too small: raise --steps",
            file=sys.stderr,
        )


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw eigenvalues by rank and their density, a curve for each model; traces are in the legend.

    Args:
        tables: ``eigenvalues``, ``trace`` and ``density``, each may be empty.
        path: the file.
    """
    matrices = list(dict.fromkeys(row["matrix"] for row in tables["eigenvalues"]))
    traces = {row["model"]: f"{row['trace']:.3g} ± {row['standard error']:.2g}" for row in tables["trace"]}
    made, axes = figure(len(matrices) + bool(tables["density"]) or 1, 2)
    for place, matrix in enumerate(matrices):
        own = [row for row in tables["eigenvalues"] if row["matrix"] == matrix]
        curves = by_model(own, "rank", "eigenvalue")
        if matrix == "hessian":
            curves = with_traces(curves, traces)
        title = {"hessian": "Hessian", "fisher": "Fisher information"}[matrix]
        draw_curves(axes[place], curves, x="rank", y=f"eigenvalue\n(loss in {BITS})", title=title, legend=False)
        others = [row for row in own if row["converged"] == "no"]
        xs, ys = ([row[key] for row in others] for key in ("rank", "eigenvalue"))
        axes[place].plot(xs, ys, "o", markersize=5, markerfacecolor="white", markeredgecolor="black")
        set_whole_numbers(axes[place])
    if tables["density"]:
        curves = by_model(tables["density"], "eigenvalue", "density")
        if "hessian" not in matrices:
            curves = with_traces(curves, traces)
        width = tables["density"][0]["kernel width"]
        labels = {"x": f"eigenvalue of the Hessian\n(loss in {BITS})", "y": "density (its integral is 1)"}
        title = f"density of all eigenvalues, σ = {width:.2g}"
        draw_curves(axes[-1], curves, **labels, title=title, marker="", legend=False)
        axes[-1].set_yscale("log")
        axes[-1].set_ylim(1e-8, 10 * max(row["density"] for row in tables["density"]))
    elif traces and not matrices:
        errors = [row["standard error"] for row in tables["trace"]]
        places = range(len(errors))
        axes[0].bar(places, [row["trace"] for row in tables["trace"]], yerr=errors, color="C0", hatch="//", capsize=3)
        axes[0].set_xticks(places, list(traces), parse_math=False)
        axes[0].set_ylabel(f"trace of the Hessian\n(loss in {BITS})")
    # Models have the same colours in all panels; the names are those of the one with the traces.
    show_names_below(made, axes[-1:] if tables["density"] and "hessian" not in matrices else axes[:1])
    save(made, path)


def with_traces(
    curves: dict[str, tuple[list[float], list[float]]], traces: dict[str, str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the curves with the traces in their names."""
    return {f"{name}, trace {traces[name]}" if name in traces else name: curve for name, curve in curves.items()}


def by_model(rows: Sequence[dict[str, Any]], x: str, y: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return the curve of two columns for each model."""
    names = dict.fromkeys(row["model"] for row in rows)
    same = {name: [row for row in rows if row["model"] == name] for name in names}
    return {name: ([row[x] for row in own], [row[y] for row in own]) for name, own in same.items()}
