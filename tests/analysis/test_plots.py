"""What is on plots: names as they are, scales, error bars."""

import math

import pytest

from fairseq_sam.analysis.plots import draw_curves, figure, set_log_scale, set_whole_numbers, show_names_below
from fairseq_sam.commands import gradients, spectrum

NAMES = ["_private", "a_$b$_{c}", "10$", "Adam"]


def test_names_are_shown_as_they_are(tmp_path):
    """Matplotlib hides names that begin with an underscore, and sets what is between dollars as a formula."""
    made, (axes,) = figure()
    draw_curves(axes, {name: ([1.0, 2.0], [1.0, 2.0]) for name in NAMES}, x="x", y="y")
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == NAMES and not any(text.get_parse_math() for text in texts)
    made.savefig(tmp_path / "plot.png")


def test_a_model_has_the_same_colour_in_all_panels():
    _, axes = figure(2)
    for panel, first in zip(axes, ([1.0], []), strict=True):
        draw_curves(panel, {"a": (first, first), "b": ([1.0], [2.0])}, x="x", y="y")
    colours = [panel.get_lines()[-1].get_color() for panel in axes]
    assert colours[0] == colours[1] and [text.get_text() for text in axes[1].get_legend().get_texts()] == ["b"]


@pytest.mark.parametrize("most", [1, 2, 50])
def test_whole_numbers(most):
    _, (axes,) = figure()
    ranks = [float(rank) for rank in range(1, most + 1)]
    draw_curves(axes, {"a": (ranks, ranks)}, x="x", y="y")
    set_whole_numbers(axes)
    inside = [tick for tick in axes.get_xticks() if 0.9 < tick < most + 0.1]
    assert inside and all(tick == int(tick) for tick in inside)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1e-3, 0.1], "log"),
        ([-1e-3, 0.1], "symlog"),
        ([0.0, 0.1], "symlog"),
        ([0.0, 0.0], "linear"),
        ([math.nan, 0.1], "log"),
        ([math.nan, math.inf], "linear"),
    ],
)
def test_scale_of_values(tmp_path, values, scale):
    made, (axes,) = figure()
    draw_curves(axes, {"a": ([1.0, 2.0], values)}, x="x", y="y", errors={"a": [0.5, 0.5]})
    set_log_scale(axes)
    assert axes.get_yscale() == scale
    made.savefig(tmp_path / "plot.png")


def test_error_bars():
    _, (axes,) = figure()
    draw_curves(axes, {"a": ([1.0, 2.0], [3.0, 4.0])}, x="x", y="y", errors={"a": [0.5, 0.25]})
    (bars,) = axes.collections
    assert [tuple(bar[:, 1]) for bar in bars.get_segments()] == [(2.5, 3.5), (3.75, 4.25)]


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """The figures that the commands save."""
    found = []

    def save(made, path):
        made.savefig(tmp_path / path)
        found.append(made)

    for command in (gradients, spectrum):
        monkeypatch.setattr(command, "save", save)
    return found


def spectrum_of(models, *, eigenvalues=True, density=True):
    ranks = range(1, 4)
    return {
        "trace": [{"model": name, "trace": 12.345, "standard error": 0.678} for name in models],
        "eigenvalues": [
            {"model": name, "matrix": "hessian", "rank": rank, "eigenvalue": 1 / rank,
             "converged": "no" if rank > 2 else "yes"}
            for name in models for rank in ranks if eigenvalues
        ],
        "density": [
            {"model": name, "eigenvalue": rank, "density": 1 / rank, "kernel width": 0.25}
            for name in models for rank in ranks if density
        ],
    }  # fmt: skip


def names_of(made):
    """Names in the one legend below the panels."""
    (legend,) = made.legends
    return [text.get_text() for text in legend.get_texts()]


def test_spectrum_shows_traces_and_whole_ranks(saved):
    models = ["_a", "$b$"]
    with_traces = [f"{name}, trace 12.3 ± 0.68" for name in models]
    spectrum.plot(spectrum_of(models), "all.png")
    hessian, density = saved[-1].axes
    assert names_of(saved[-1]) == with_traces and not hessian.get_legend() and not density.get_legend()
    assert all(tick == int(tick) for tick in hessian.get_xticks())
    assert "σ = 0.25" in density.get_title()
    spectrum.plot(spectrum_of(models, eigenvalues=False), "density.png")
    assert names_of(saved[-1]) == with_traces
    fisher = spectrum_of(models)
    fisher["eigenvalues"] = [{**row, "matrix": "fisher"} for row in fisher["eigenvalues"]]
    spectrum.plot(fisher, "fisher.png")
    assert names_of(saved[-1]) == with_traces
    spectrum.plot(spectrum_of(models, eigenvalues=False, density=False), "trace.png")
    labels = saved[-1].axes[0].get_xticklabels()
    assert [text.get_text() for text in labels] == models and not any(text.get_parse_math() for text in labels)


def test_one_legend_below_all_panels(tmp_path):
    """It has each name once, as it is, and covers no panel."""
    made, axes = figure(2)
    draw_curves(axes[0], {"$a$": ([1.0], [2.0]), "_b": ([1.0], [3.0])}, x="x", y="y", legend=False)
    draw_curves(axes[1], {"$a$": ([], []), "_b": ([1.0], [3.0]), "c": ([1.0], [1.0])}, x="x", y="y", legend=False)
    show_names_below(made, axes)
    made.savefig(tmp_path / "plot.png")
    (legend,) = made.legends
    assert [text.get_text() for text in legend.get_texts()] == ["$a$", "_b", "c"]
    assert not any(text.get_parse_math() for text in legend.get_texts()) and not any(a.get_legend() for a in axes)
    assert [line.get_color() for line in legend.get_lines()] == ["C0", "C1", "C2"]
    top = legend.get_window_extent().ymax
    assert all(top < panel.get_tightbbox().ymin for panel in axes)


def gradients_of(runs):
    places = [("epoch", "all"), ("epoch", "encoder"), ("layer", "encoder"), ("layer", "decoder")]
    return [
        {"run": run, "by": by, "group": group, "number": number, "norm": number + share}
        for share, run in enumerate(runs)
        for by, group in places
        for number in (1, 2)
    ]


def test_gradients_of_several_runs_have_a_panel_for_each_group(saved):
    gradients.plot(gradients_of(["adam", "sam", "ga_sam"]), "several.png")
    titles = ["all, by epoch", "encoder, by epoch", "encoder, by layer", "decoder, by layer"]
    assert [axes.get_title() for axes in saved[-1].axes[:4]] == titles
    for axes in saved[-1].axes[:4]:
        assert [line.get_gid() for line in axes.get_lines()] == ["adam", "sam", "ga_sam"]
        assert [list(line.get_ydata()) for line in axes.get_lines()] == [[1, 2], [2, 3], [3, 4]]
    gradients.plot(gradients_of(["adam"]), "one.png")
    epoch, layer = saved[-1].axes
    assert [text.get_text() for text in epoch.get_legend().get_texts()] == ["all", "encoder"]
    assert [line.get_gid() for line in layer.get_lines()] == ["encoder", "decoder"]
