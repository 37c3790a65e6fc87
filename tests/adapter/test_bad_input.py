"""Bad flags end the run before any data is read: the data folder of these runs does not exist."""

import pytest

from fairseq_sam.adapter.config import check_config
from tests.adapter import runs

CASES = {
    "negative epsilon": (["--sam-epsilon", "-1"], ("--sam-epsilon", "-1.0", ">= 0")),
    "NaN epsilon": (["--sam-epsilon", "nan"], ("--sam-epsilon", "nan", ">= 0")),
    "no steps": (["--sam-steps", "0"], ("--sam-steps", "0", ">= 1")),
    "unknown norm": (["--sam-norm", "l1"], ("--sam-norm", "'l1'", "l2, linf or a number > 1")),
    "norm one": (["--sam-norm", "1"], ("--sam-norm", "'1'", "> 1")),
    "unknown scale": (["--sam-scale", "fisher"], ("--sam-scale", "'fisher'", "gradient_strength")),
    "unknown granularity": (["--sam-granularity", "head"], ("--sam-granularity", "'head'", "layer")),
    "unknown descent": (["--sam-descent", "first"], ("--sam-descent", "'first'", "last, mean")),
    "unknown base": (["--base-optimizer", "lion"], ("--base-optimizer", "'lion'", "adafactor, adagrad, adam")),
    "preset as base": (["--base-optimizer", "asam"], ("--base-optimizer", "'asam'", "adam")),
    "interval 0": (["--sam-interval", "0"], ("--sam-interval", "0", ">= 1")),
    "start epoch 0": (["--sam-start-epoch", "0"], ("--sam-start-epoch", "0", ">= 1")),
    "flag of another base": (
        ["--base-optimizer", "sgd", "--adam-betas", "(0.9, 0.98)"],
        ("--adam-betas", "(0.9, 0.98)", "--base-optimizer adam", "sgd", "--momentum"),
    ),
    "scale against granularity": (
        ["--sam-scale", "weight_abs", "--sam-granularity", "layer"],
        ("--sam-scale", "--sam-granularity", "'layer'", "element"),
    ),
    "eta without its scale": (["--sam-asam-eta", "0.1"], ("--sam-asam-eta", "0.1", "weight_abs")),
    "unknown ascent": (["--sam-ascent", "token"], ("--sam-ascent", "'token'", "batch, weighted, instance, random")),
    "fraction 0": (["--sam-ascent-fraction", "0"], ("--sam-ascent-fraction", "0.0", "(0, 1]")),
    "sparsity 1": (["--sam-mask", "fisher", "--sam-sparsity", "1"], ("--sam-sparsity", "1.0", "[0, 1)")),
    "sparsity without a mask": (["--sam-sparsity", "0.5"], ("--sam-sparsity", "--sam-mask fisher", "'none'")),
    "alpha of another descent": (["--sam-gsam-alpha", "0.4"], ("--sam-gsam-alpha", "--sam-descent gsam", "'mean'")),
    "weighted ascent with a mean": (["--sam-ascent", "weighted"], ("--sam-ascent", "--sam-descent", "mean", "last")),
    "parts with one perturbation": (
        ["--sam-m", "2", "--sam-scope", "update"],
        ("--sam-scope", "--sam-m", "microbatch"),
    ),
    "random direction with a gradient's scale": (
        ["--sam-ascent", "random"],
        ("--sam-scale", "gradient_strength", "one"),
    ),
    "embeddings with a scale": (["--sam-where", "embeddings"], ("--sam-where", "--sam-scale", "gradient_strength")),
    "smallest radius above the radius": (["--sam-epsilon-min", "1"], ("--sam-epsilon-min", "[0, epsilon = 0.0001]")),
    "smallest rate above the schedule's": (
        ["--sam-epsilon-min", "1e-5", "--sam-lr-min", "0.5"],
        ("--sam-lr-min", "0.5", "0.003", "--lr"),
    ),
    "end before start": (["--sam-start-epoch", "3", "--sam-end-epoch", "2"], ("--sam-end-epoch", ">= 3", "2")),
    "a criterion without instance losses": (
        ["--sam-descent", "sds", "--criterion", "label_smoothed_cross_entropy_rdrop"],
        ("LabelSmoothedCrossEntropyRdropCriterion", "register_instance_losses", "--optimizer sam"),
    ),
    "an attack on words under R-Drop": (
        ["--optimizer", "freelb", "--criterion", "label_smoothed_cross_entropy_rdrop"],
        ("--criterion label_smoothed_cross_entropy_rdrop", "--optimizer freelb", "weights"),
    ),
    "flat fp16": (["--fp16"], ("--fp16", "--sam-granularity layer", "--fp16-no-flatten-grads")),
    "sharded parameters": (["--ddp-backend", "fully_sharded"], ("--ddp-backend", "fully_sharded", "pytorch_ddp")),
}


def run_flags(*flags):
    return ["/nowhere/data-bin", *runs.common_flags(), *runs.TRANSLATION, "--optimizer", "ga_sam", *flags]


@pytest.mark.parametrize("case", CASES)
def test_the_message_names_flag_value_and_range(case):
    from fairseq import tasks

    flags, words = CASES[case]
    cfg = runs.configuration(run_flags(*flags))
    with pytest.raises(ValueError) as caught:
        tasks.setup_task(cfg.task)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_good_flags_reach_the_data():
    from fairseq import tasks

    with pytest.raises(FileNotFoundError, match="/nowhere/data-bin"):
        tasks.setup_task(runs.configuration(run_flags()).task)


@pytest.mark.parametrize(
    "flags", [["--sam-granularity", "model"], ["--fp16-no-flatten-grads"], ["--memory-efficient-fp16"]]
)
def test_what_flat_fp16_asks_for_is_accepted(flags):
    check_config(runs.configuration(run_flags("--fp16", *flags)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sam-epsilon", "-1"], r"--sam-epsilon.*got -1\.0"),
        (["--sam-epsilon-min", "1e-5", "--sam-lr-min", "0.5"], r"--sam-lr-min.*0\.003.*got 0\.5"),
        (["--sam-descent", "sds", "--criterion", "label_smoothed_cross_entropy_rdrop"], "register_instance_losses"),
    ],
)
def test_tasks_without_a_dataclass_are_checked_too(more, message):
    from fairseq import tasks

    flags = run_flags("--task", "multilingual_translation", "--lang-pairs", "a-b", *more)
    flags[flags.index("transformer")] = "multilingual_transformer"
    with pytest.raises(ValueError, match=message):
        tasks.setup_task(runs.configuration(flags).task)


@pytest.mark.slow
def test_on_the_command_line():
    done = runs.train_in_subprocess(*run_flags("--sam-norm", "l0"))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "norm (--sam-norm) must be l2, linf or a number > 1, got 'l0'" in last


def test_not_a_number_is_argparse_s_error(capsys):
    with pytest.raises(SystemExit):
        runs.configuration(run_flags("--sam-epsilon", "large"))
    assert "argument --sam-epsilon: invalid float value: 'large'" in capsys.readouterr().err
