"""Bad input: every message names the keyword, the flag, the value and what is allowed."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from fairseq_sam import PRESETS, Method, SharpnessAware

BAD = [
    ("epsilon", -0.1, ">= 0"),
    ("epsilon", math.nan, ">= 0"),
    ("epsilon", math.inf, "finite"),
    ("epsilon", "0.1", ">= 0"),
    ("norm", "l1", "> 1"),
    ("norm", 1.0, "> 1"),
    ("norm", 0.5, "> 1"),
    ("norm", math.nan, "> 1"),
    ("norm", "manhattan", "l2, linf"),
    ("steps", 0, ">= 1"),
    ("steps", -3, ">= 1"),
    ("steps", 1.5, ">= 1"),
    ("steps", True, ">= 1"),
    ("step_size", 0.0, "> 0"),
    ("step_size", -1.0, "> 0"),
    ("step_size", math.nan, "> 0"),
    ("scale", "hessian", "gradient_strength"),
    ("granularity", "block", "layer"),
    ("descent", "median", "mean"),
    ("gradient", "max", "sum"),
    ("scope", "epoch", "microbatch"),
    ("dropout", "off", "fresh"),
    ("start_epoch", 0, ">= 1"),
    ("start_update", -1, ">= 0"),
    ("interval", 0, ">= 1"),
    ("asam_eta", -0.01, ">= 0"),
    ("max_scale", 0.0, "> 0"),
    ("max_scale", math.nan, "> 0"),
    ("exclude", "(", "regular expression"),
]


@pytest.mark.parametrize(("option", "value", "allowed"), BAD)
@pytest.mark.parametrize("preset", ["sam", "asam"])
def test_bad_values_name_flag_value_and_range(preset, option, value, allowed):
    with pytest.raises(ValueError) as caught:
        Method.from_preset(preset, **{option: value})
    message = str(caught.value)
    assert f"--sam-{option.replace('_', '-')}" in message
    assert repr(value) in message
    assert allowed in message


@pytest.mark.parametrize(
    ("preset", "options", "words"),
    [
        ("sam", {"scale": "weight_abs", "granularity": "layer"}, ("--sam-scale", "--sam-granularity", "'layer'")),
        ("asam", {"granularity": "model"}, ("--sam-granularity", "'model'", "weight_norm")),
        ("ga_sam", {"asam_eta": 0.01}, ("--sam-asam-eta", "0.01", "weight_abs")),
    ],
)
def test_contradictions_are_refused(preset, options, words):
    with pytest.raises(ValueError) as caught:
        Method.from_preset(preset, **options)
    assert all(word in str(caught.value) for word in words)


def test_unknown_preset_and_option():
    with pytest.raises(ValueError, match=r"one of sam, asam, .* got 'sma'"):
        Method.from_preset("sma")
    with pytest.raises(ValueError, match="unknown option 'rho'"):
        SharpnessAware(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), nn.Linear(1, 1), method="sam", rho=0.05)


@pytest.mark.parametrize(("given", "order"), [("l2", 2.0), ("L2", 2.0), ("linf", math.inf), ("3", 3.0), (1.5, 1.5)])
def test_norms(given, order):
    assert Method.from_preset("sam", norm=given).norm == order


def test_scale_alone_brings_its_granularity():
    assert Method.from_preset("sam", scale="weight_abs").granularity == "element"


def test_presets_are_the_table_of_the_papers():
    rows = {name: (m.scale, m.granularity, m.descent) for name, m in PRESETS.items()}
    assert rows == {
        "sam": ("one", "model", "last"),
        "asam": ("weight_abs", "element", "last"),
        "layer_sam": ("weight_over_gradient", "layer", "last"),
        "multistep_defense": ("one", "model", "mean"),
        "ga_sam": ("gradient_strength", "layer", "mean"),
    }
    assert all(m.passes == m.steps + 1 and m.interval == 1 and m.start_epoch == 1 for m in PRESETS.values())


def test_model_without_trainable_parameters():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_bad_state_and_epoch():
    model = nn.Linear(1, 1)
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="keys optimizer and method"):
        sam.load_state_dict({"state": {}})
    with pytest.raises(ValueError, match="epoch must be an integer >= 1, got 0"):
        sam.set_epoch(0)


def test_core_and_analysis_work_without_fairseq():
    program = (
        "import sys; sys.modules['fairseq'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fairseq' else find(name, *a)\n"
        "import fairseq_sam, fairseq_sam.core, fairseq_sam.analysis\n"
        "assert not [m for m in sys.modules if m.startswith('fairseq.') or m == 'fairseq_sam.adapter']\n"
        "print(sorted(fairseq_sam.PRESETS))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "ga_sam" in done.stdout, done.stderr


def test_excluding_everything_is_refused():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"--sam-exclude.*'\.' matches all"):
        SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, exclude=".")


def test_what_a_plain_loop_may_get_wrong():
    model = nn.Linear(1, 1)
    sam = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(TypeError, match=r"closure must return the loss.*NoneType"):
        sam.step(lambda: model(torch.ones(1, 1)).sum().backward())
    for options in ({"sample_size": 0}, {"loss_scale": -1.0}, {"sample_size": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a number > 0"):
            sam.accumulate(lambda: model(torch.ones(1, 1)).sum(), **options)
    for epoch in ("2", 1.5, math.nan, True):
        with pytest.raises(ValueError, match="epoch must be an integer >= 1"):
            sam.set_epoch(epoch)
    with pytest.raises(ValueError, match="LBFGS"):
        SharpnessAware(torch.optim.LBFGS(model.parameters()), model)
