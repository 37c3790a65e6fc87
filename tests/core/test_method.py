"""Bad input: every message names the keyword, the flag, the value and what is allowed."""

import dataclasses
import math
import re
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
    ("ascent", "adversarial", "weighted"),
    ("ascent_fraction", 0.0, "(0, 1]"),
    ("ascent_fraction", 1.5, "(0, 1]"),
    ("m", 0, ">= 1"),
    ("m", 2.0, ">= 1"),
    ("ball", "tensor", "group"),
    ("step_rule", "newton", "steepest"),
    ("mask", "magnitude", "fisher"),
    ("between", "skip", "reuse"),
    ("where", "logits", "embeddings"),
    ("init", "normal", "uniform"),
    ("lr_min", -1.0, ">= 0"),
    ("lr_max", 0.0, "> lr_min"),
    ("epsilon_min", -0.1, "[0, epsilon"),
    ("epsilon_min", 5.0, "[0, epsilon"),
    ("end_epoch", 0, ">= 1"),
    ("end_update", 0, ">= 1"),
]
BAD_SETTINGS = [
    ("fisher_sam", "sparsity", 1.0, "[0, 1)"),
    ("fisher_sam", "sparsity", -0.1, "[0, 1)"),
    ("fisher_sam", "mask_interval", 0, ">= 1"),
    ("fisher_sam", "fisher_samples", 0, ">= 1"),
    ("fisher_sam", "fisher_samples", 1.5, ">= 1"),
    ("esam", "sparsity", 1.0, "[0, 1)"),
    ("esam", "esam_gamma", 0.0, "(0, 1]"),
    ("esam", "esam_gamma", 1.1, "(0, 1]"),
    ("gsam", "gsam_alpha", -1.0, ">= 0"),
    ("gsam", "gsam_alpha", math.inf, "finite"),
    ("delta_sam", "delta_eta", 0.0, "> 0"),
    ("look_sam", "look_alpha", -0.5, ">= 0"),
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


@pytest.mark.parametrize(("preset", "option", "value", "allowed"), BAD_SETTINGS)
def test_bad_settings_name_flag_value_and_range(preset, option, value, allowed):
    with pytest.raises(ValueError) as caught:
        Method.from_preset(preset, **{option: value})
    assert all(word in str(caught.value) for word in (f"--sam-{option.replace('_', '-')}", repr(value), allowed))


@pytest.mark.parametrize(
    ("preset", "options", "words"),
    [
        ("sam", {"step_rule": "gradient"}, ("--sam-step-rule", "--sam-step-size")),
        ("sam", {"sparsity": 0.5}, ("--sam-sparsity", "--sam-mask fisher or --sam-mask random", "'none'")),
        ("sam", {"mask_interval": 7}, ("--sam-mask-interval", "--sam-mask fisher")),
        ("esam", {"fisher_samples": 8}, ("--sam-fisher-samples", "--sam-mask fisher", "'random'")),
        ("sam", {"gsam_alpha": 0.1}, ("--sam-gsam-alpha", "--sam-descent gsam", "'last'")),
        ("sam", {"esam_gamma": 0.5}, ("--sam-esam-gamma", "--sam-descent sds")),
        ("sam", {"delta_eta": 1e-3}, ("--sam-delta-eta", "--sam-ascent weighted")),
        ("sam", {"look_alpha": 0.5}, ("--sam-look-alpha", "--sam-between reuse")),
        ("random_sam", {"steps": 2}, ("--sam-ascent", "--sam-steps", "one direction")),
        ("random_sam", {"ascent_fraction": 0.5}, ("--sam-ascent-fraction",)),
        ("random_sam", {"scale": "gradient_strength"}, ("--sam-scale", "has none")),
        ("delta_sam", {"descent": "mean"}, ("--sam-ascent", "--sam-descent", "unweighted")),
        ("delta_sam", {"descent": "gsam"}, ("--sam-ascent", "--sam-descent", "unweighted")),
        ("delta_sam", {"between": "reuse"}, ("--sam-between", "unweighted")),
        ("instance_sam", {"m": 2}, ("--sam-m", "instance")),
        ("instance_sam", {"descent": "sds"}, ("--sam-descent", "instance")),
        ("instance_sam", {"scope": "update"}, ("--sam-scope", "microbatch")),
        ("msam", {"scope": "update"}, ("--sam-scope", "--sam-m", "microbatch")),
        ("look_sam", {"descent": "mean_ascent", "steps": 2}, ("--sam-descent", "--sam-between")),
        ("ga_sam", {"descent": "mean_ascent"}, ("--sam-descent", "--sam-steps", "base optimizer")),
        ("random_sam", {"step_size": 0.1}, ("--sam-ascent", "--sam-step-size", "0.1", "--sam-epsilon")),
        ("sam", {"max_scale": 5.0}, ("--sam-max-scale", "5.0", "--sam-scale")),
        ("sam", {"lr_min": 0.5}, ("--sam-lr-min", "0.5", "--sam-epsilon-min")),
        ("freelb", {"scale": "weight_abs"}, ("--sam-where", "--sam-scale", "weight_abs")),
        ("sam", {"granularity": "sentence"}, ("--sam-granularity", "--sam-where")),
        ("freelb", {"granularity": "layer"}, ("--sam-granularity", "--sam-where")),
        ("sam", {"init": "uniform"}, ("--sam-init", "--sam-where")),
        ("freelb", {"mask": "fisher"}, ("--sam-where", "--sam-mask")),
        ("freelb", {"exclude": "bias"}, ("--sam-where", "--sam-exclude")),
        ("freelb", {"scope": "update"}, ("--sam-where", "--sam-scope")),
        ("freelb", {"m": 2}, ("--sam-where", "--sam-m")),
        ("freelb", {"rounding": "stochastic"}, ("--sam-where", "--sam-rounding", "stochastic")),
        ("freelb", {"between": "reuse"}, ("--sam-between", "--sam-where")),
        ("ga_sam", {"where": "embeddings"}, ("--sam-where", "--sam-scale")),
        ("sam", {"lr_max": 0.1}, ("--sam-lr-max", "--sam-epsilon-min")),
        ("sam", {"start_epoch": 5, "end_epoch": 4}, ("--sam-end-epoch", ">= 5")),
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
        model = nn.Linear(1, 1)
        SharpnessAware(torch.optim.SGD(model.parameters(), lr=1.0), model, method="sam", rho=0.05)


@pytest.mark.parametrize(("given", "order"), [("l2", 2.0), ("L2", 2.0), ("linf", math.inf), ("3", 3.0), (1.5, 1.5)])
def test_norms(given, order):
    assert Method.from_preset("sam", norm=given).norm == order


def test_every_listed_contradiction_can_happen():
    """The table of contradictions has no row that no combination meets."""
    from fairseq_sam.core.contradictions import CONTRADICTIONS

    reasons = set()
    for preset, options, _ in [m for mark in test_contradictions_are_refused.pytestmark for m in mark.args[1]]:
        with pytest.raises(ValueError) as caught:
            Method.from_preset(preset, **options)
        fixed = {c.reason: re.split(r"\{[^}]*\}", c.reason) for c in CONTRADICTIONS}
        reasons |= {reason for reason, parts in fixed.items() if all(part in str(caught.value) for part in parts)}
    assert reasons == {c.reason for c in CONTRADICTIONS}


def test_an_override_brings_what_follows_from_it():
    """F_ESAM: the Fisher mask has its own sparsity. A smaller radius keeps GSAM's ratio. Embeddings mean sentences."""
    assert Method.from_preset("esam", mask="fisher").sparsity == 0.9
    assert Method.from_preset("gsam", epsilon=0.5).epsilon_min == pytest.approx(0.1)
    assert Method.from_preset("gsam", epsilon=0.0).epsilon_min == 0.0
    assert Method.from_preset("gsam", descent="last").gsam_alpha is None
    attack = Method.from_preset("sam", where="embeddings")
    assert (attack.granularity, attack.ball, attack.init) == ("sentence", "group", "zero")
    assert Method.from_preset("freelb", where="weights").granularity == "model"
    assert Method.from_preset("model_perturbation", step_rule="steepest", epsilon=0.2).eta == pytest.approx(0.3)


def test_the_radius_follows_the_learning_rate():
    method = Method.from_preset("gsam", epsilon=0.5, epsilon_min=0.1, lr_max=1.0, lr_min=0.2)
    found = [method.at(rate).epsilon for rate in (2.0, 1.0, 0.6, 0.2, 0.0)]
    assert found == pytest.approx([0.5, 0.5, 0.3, 0.1, 0.1])
    constant = Method.from_preset("sam")
    assert constant.at(0.3) is constant and constant.with_peak(1.0) is constant
    rising = Method.from_preset("gsam", lr_min=0.2)
    assert rising.with_peak(1.0).lr_max == 1.0
    with pytest.raises(ValueError, match=r"--sam-lr-min\) must be below .* 0\.1 \(--lr\), got 0\.2.*--sam-lr-max"):
        rising.with_peak(0.1)


def test_end():
    method = Method.from_preset("sam", start_update=2, end_update=6, interval=2, end_epoch=3)
    assert [method.is_active(1, update) for update in range(8)] == [False, False, True, False, True] + [False] * 3
    assert not method.is_active(4, 4) and method.has_ended(4, 4)


def test_scale_alone_brings_its_granularity():
    assert Method.from_preset("sam", scale="weight_abs").granularity == "element"


# T, granularity, K, descent, and the columns that differ from SAM's.
TABLE = {
    "sam": ("one", "model", 1, "last", {}),
    "asam": ("weight_abs", "element", 1, "last", {}),
    "layer_sam": ("weight_over_gradient", "layer", 1, "last", {}),
    "multistep_defense": ("one", "model", 2, "mean", {"norm": math.inf}),
    "ga_sam": ("gradient_strength", "layer", 1, "mean", {"norm": math.inf}),
    "efficient_sam": ("one", "model", 1, "last", {"ascent_fraction": 0.25}),
    "msam": ("one", "model", 1, "last", {"m": 4}),
    "fisher_sam": ("one", "model", 1, "last", {"mask": "fisher", "sparsity": 0.9, "mask_interval": 100}),
    "esam": ("one", "model", 1, "sds", {"mask": "random", "sparsity": 0.5, "esam_gamma": 0.5}),
    "gsam": ("one", "model", 1, "gsam", {"gsam_alpha": 0.4, "epsilon_min": 0.01}),
    "delta_sam": ("one", "model", 1, "last", {"ascent": "weighted", "delta_eta": 1e-4}),
    "instance_sam": ("one", "model", 1, "last", {"ascent": "instance"}),
    "random_sam": ("one", "model", 1, "last", {"ascent": "random"}),
    "model_perturbation": ("one", "model", 1, "last", {"step_rule": "gradient", "step_size": 1.0}),
    "awp": ("weight_norm", "layer", 1, "last", {"ball": "group"}),
    "look_sam": ("one", "model", 1, "last", {"interval": 5, "between": "reuse", "look_alpha": 0.7}),
    "freelb": (
        "one", "sentence", 1, "mean", {"norm": math.inf, "where": "embeddings", "ball": "group", "init": "uniform"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_table_of_the_papers(name):
    scale, granularity, steps, descent, columns = TABLE[name]
    found, plain = PRESETS[name], PRESETS["sam"]
    assert (found.scale, found.granularity, found.steps, found.descent) == (scale, granularity, steps, descent)
    for field in dataclasses.fields(Method):
        if field.name not in ("name", "epsilon", "scale", "granularity", "steps", "descent", "fisher_samples"):
            assert getattr(found, field.name) == columns.get(field.name, getattr(plain, field.name)), field.name


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
    with pytest.raises(ValueError, match=r"no gradient.*call loss\.backward\(\)"):
        sam.step(lambda: model(torch.ones(1, 1)).sum())
    with pytest.raises(TypeError, match=r"SharpnessAware\(optimizer, model\).*got Linear and SGD"):
        SharpnessAware(model, sam.optimizer)
    with pytest.raises(ValueError, match="no parameter of the model"):
        SharpnessAware(sam.optimizer, nn.Linear(1, 1))
    for options in ({"sample_size": 0}, {"loss_scale": -1.0}, {"sample_size": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a number > 0"):
            sam.accumulate(lambda: model(torch.ones(1, 1)).sum(), **options)
    for epoch in ("2", 1.5, math.nan, True):
        with pytest.raises(ValueError, match="epoch must be an integer >= 1"):
            sam.set_epoch(epoch)
    with pytest.raises(ValueError, match="LBFGS"):
        SharpnessAware(torch.optim.LBFGS(model.parameters()), model)
