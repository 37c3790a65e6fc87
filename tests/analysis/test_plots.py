"""What is on plots: names as they are, scales, error bars."""

import math

import pytest

from fairseq_sam.analysis.plots import draw_curves, figure, set_log_scale

NAMES = ["_private", "a_$b$_{c}", "10$", "Adam"]


def test_names_are_shown_as_they_are(tmp_path):
    """Matplotlib hides names that begin with an underscore, and sets what is between dollars as a formula."""
    made, (axes,) = figure()
    draw_curves(axes, {name: ([1.0, 2.0], [1.0, 2.0]) for name in NAMES}, x="x", y="y")
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == NAMES and not any(text.get_parse_math() for text in texts)
    made.savefig(tmp_path / "plot.png")


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
