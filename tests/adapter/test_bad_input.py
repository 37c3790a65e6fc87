"""Bad flags end the run before any data is read: the data folder of these runs does not exist."""

import json
import subprocess
import sys

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
    "infinite epsilon": (["--sam-epsilon", "inf"], ("--sam-epsilon", "inf", "finite")),
    "step size 0": (["--sam-step-size", "0"], ("--sam-step-size", "0.0", "> 0")),
    "infinite cap of zero": (["--sam-max-scale", "0"], ("--sam-max-scale", "0.0", "> 0")),
    "negative steps": (["--sam-steps", "-3"], ("--sam-steps", "-3", ">= 1")),
    "unknown ball": (["--sam-ball", "layer"], ("--sam-ball", "'layer'", "group")),
    "unknown step rule": (["--sam-step-rule", "sign"], ("--sam-step-rule", "'sign'", "steepest")),
    "unknown start": (["--sam-init", "normal"], ("--sam-init", "'normal'", "zero")),
    "unknown unit": (["--sam-gradient", "tokens"], ("--sam-gradient", "'tokens'", "mean, sum")),
    "unknown mask": (["--sam-mask", "magnitude"], ("--sam-mask", "'magnitude'", "fisher")),
    "unknown scope": (["--sam-scope", "worker"], ("--sam-scope", "'worker'", "microbatch, update")),
    "unknown place": (["--sam-where", "logits"], ("--sam-where", "'logits'", "weights, embeddings")),
    "unknown rounding": (["--sam-rounding", "up"], ("--sam-rounding", "'up'", "nearest, stochastic")),
    "unknown dropout": (["--sam-dropout", "none"], ("--sam-dropout", "'none'", "same, fresh")),
    "unknown between": (["--sam-between", "skip"], ("--sam-between", "'skip'", "reuse")),
    "parts 0": (["--sam-m", "0"], ("--sam-m", "0", ">= 1")),
    "start update below 0": (["--sam-start-update", "-1"], ("--sam-start-update", "-1", ">= 0")),
    "end update 0": (["--sam-end-update", "0"], ("--sam-end-update", "0", ">= 1")),
    "fraction above 1": (["--sam-ascent-fraction", "1.5"], ("--sam-ascent-fraction", "1.5", "(0, 1]")),
    "mask interval 0": (
        ["--sam-mask", "fisher", "--sam-mask-interval", "0"],
        ("--sam-mask-interval", "0", ">= 1"),
    ),
    "no Fisher samples": (
        ["--sam-mask", "fisher", "--sam-fisher-samples", "0"],
        ("--sam-fisher-samples", "0", ">= 1"),
    ),
    "negative sparsity": (
        ["--sam-mask", "random", "--sam-sparsity", "-0.1"],
        ("--sam-sparsity", "-0.1", "[0, 1)"),
    ),
    "no kept instances": (
        ["--sam-descent", "sds", "--sam-esam-gamma", "0"],
        ("--sam-esam-gamma", "0.0", "(0, 1]"),
    ),
    "negative alpha": (["--sam-descent", "gsam", "--sam-gsam-alpha", "-1"], ("--sam-gsam-alpha", "-1.0", ">= 0")),
    "negative reuse": (
        ["--sam-between", "reuse", "--sam-look-alpha", "-1", "--sam-descent", "last"],
        ("--sam-look-alpha", "-1.0", ">= 0"),
    ),
    "no regular expression": (["--sam-exclude", "(bias"], ("--sam-exclude", "'(bias'", "regular expression")),
    "floor without weights": (["--sam-delta-eta", "1e-3"], ("--sam-delta-eta", "--sam-ascent weighted")),
    "uniform start of weights": (["--sam-init", "uniform"], ("--sam-init", "--sam-where")),
    "rounding of embeddings": (
        ["--optimizer", "freelb", "--sam-rounding", "stochastic"],
        ("(--sam-rounding) stochastic", "--sam-where"),
    ),
    "instances and parts": (["--optimizer", "instance_sam", "--sam-m", "2"], ("--sam-m", "instance")),
    "two steps at random": (["--optimizer", "random_sam", "--sam-steps", "2"], ("--sam-steps", "one direction")),
    "embeddings of an update": (["--optimizer", "freelb", "--sam-scope", "update"], ("--sam-where", "--sam-scope")),
    "BMUF in half precision": (["--use-bmuf", "--bf16"], ("--use-bmuf", "--bf16", "leave one of them out")),
    "BMUF and one perturbation": (
        ["--use-bmuf", "--sam-scope", "update"],
        ("--sam-scope update", "--use-bmuf", "--sam-scope microbatch"),
    ),
    "SlowMo and one perturbation": (
        ["--ddp-backend", "slowmo", "--sam-scope", "update"],
        ("--sam-scope update", "--ddp-backend slowmo", "--sam-scope microbatch"),
    ),
    "SlowMo that rewrites weights": (
        ["--ddp-backend", "slowmo", "--slowmo-base-algorithm", "sgp"],
        ("--slowmo-base-algorithm sgp", "localsgd"),
    ),
    "two precisions": (["--bf16", "--amp"], ("--bf16", "--amp", "leave one of them out")),
    "AMP and half precision": (["--fp16", "--amp"], ("--fp16", "--amp", "leave one of them out")),
    "memory efficiency of SGD": (
        ["--memory-efficient-fp16", "--base-optimizer", "sgd"],
        ("--memory-efficient-fp16", "--base-optimizer sgd", "--fp16", "adafactor, adam"),
    ),
    "memory efficiency of Adagrad": (
        ["--memory-efficient-bf16", "--base-optimizer", "adagrad"],
        ("--memory-efficient-bf16", "--base-optimizer adagrad", "adam"),
    ),
    "rounding of fp32": (["--sam-rounding", "stochastic"], ("--sam-rounding stochastic", "fp32", "--bf16")),
    "groups on the command line": (
        ["--base-optimizer", "composite"],
        ("--base-optimizer composite", "YAML", "optimizer.groups"),
    ),
    "shares for one worker": (["--zero-sharding", "os"], ("--zero-sharding os", "leave it out")),
}
# What is refused while fairseq parses the command line, mostly by fairseq itself.
PARSED = {
    "a word for a number": (["--sam-asam-eta", "large"], "argument --sam-asam-eta: invalid float value: 'large'"),
    "a word for the radius": (["--sam-epsilon", "large"], "--sam-epsilon) must be a number >= 0, or auto, got 'large'"),
    "half a step": (["--sam-steps", "1.5"], "argument --sam-steps: invalid int value: '1.5'"),
    "unknown flag": (["--sam-rho", "0.05"], "unrecognized arguments: --sam-rho 0.05"),
    "unknown preset": (["--optimizer", "sma"], "argument --optimizer: invalid choice: 'sma'"),
    "no value": (["--sam-norm"], "argument --sam-norm: expected one argument"),
    "two half precisions": (["--fp16", "--bf16"], "fairseq_sam: error: --fp16 and --bf16 are two precisions"),
    "and with less memory": (
        ["--memory-efficient-fp16", "--memory-efficient-bf16"],
        "fairseq_sam: error: --fp16 and --bf16 are two precisions",
    ),
    "unknown backend": (["--ddp-backend", "horovod"], "argument --ddp-backend: invalid choice: 'horovod'"),
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
    ("flags", "line"),
    [
        (
            ["--sam-start-epoch", "3", "--max-epoch", "2"],
            "(--max-epoch 2) before the method begins (--sam-start-epoch 3)",
        ),
        (
            ["--sam-start-update", "5", "--max-update", "5"],
            "(--max-update 5) before the method begins (--sam-start-update 5)",
        ),
        (["--sam-start-epoch", "2", "--max-epoch", "2", "--sam-start-update", "4", "--max-update", "5"], None),
        (["--sam-start-epoch", "30", "--max-epoch", "0"], None),
    ],
)
def test_a_run_that_ends_before_its_method_begins_is_told(caplog, flags, line):
    with caplog.at_level("WARNING", "fairseq_sam"):
        check_config(runs.configuration(run_flags(*flags)))
    assert (line in caplog.text) if line else not caplog.text


def test_a_run_is_warned_once(caplog):
    """Though it is checked before workers are started, and where a task is set up."""
    from fairseq import tasks
    from fairseq.distributed import utils

    cfg = runs.configuration(run_flags("--sam-start-epoch", "3", "--max-epoch", "2"))
    for _ in range(2):
        with caplog.at_level("WARNING", "fairseq_sam"), pytest.raises(FileNotFoundError, match="/nowhere/data-bin"):
            utils.call_main(cfg, lambda cfg: tasks.setup_task(cfg.task))
        assert caplog.text.count("before the method begins") == 1
        caplog.clear()


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


# Runs command lines, one after the other, each in a fork of a process that has imported everything.
SERVER = """
import io, json, os, sys
import fairseq_cli.train, fairseq_sam

for flags in json.load(open(sys.argv[1])):
    child = os.fork()
    if child == 0:
        file = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv[1:], status = flags, 0
        try:
            try:
                fairseq_cli.train.cli_main()
            except SystemExit:
                raise
            except BaseException:
                status = 1
                sys.excepthook(*sys.exc_info())
        except SystemExit as leave:
            status = leave.code
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    lines = [line for line in open(sys.argv[2]).read().splitlines() if line.strip()]
    print(json.dumps([os.waitstatus_to_exitcode(status), lines]), flush=True)
"""


def run_command_lines(commands, folder):
    (folder / "commands").write_text(json.dumps(commands))
    server = [sys.executable, "-c", SERVER, str(folder / "commands"), str(folder / "output")]
    done = subprocess.run(server, capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_every_command_line_ends_with_one_line_and_status_2(tmp_path):
    """The plugin's refusals and argparse's, at least 60 of them; none gets as far as the data."""
    assert len(CASES) + len(PARSED) >= 60
    commands = [run_flags(*flags) for flags, _ in (*CASES.values(), *PARSED.values())]
    results = run_command_lines([*commands, run_flags()], tmp_path)
    for (name, (_, words)), (status, lines) in zip({**CASES, **PARSED}.items(), results, strict=False):
        start = "fairseq_sam: error: " if name in CASES else ""
        assert status == 2 and lines[-1].startswith(start), f"{name}: {status}, {lines[-3:]}"
        assert all(word in lines[-1] for word in (words if name in CASES else [words])), f"{name}: {lines[-1]}"
        assert not any("Traceback" in line for line in lines), name
        assert not any("FileNotFoundError" in line for line in lines), f"{name}: the data was asked for"
    status, lines = results[-1]
    assert status == 1 and lines[-1].startswith("FileNotFoundError"), "good flags get as far as the data"


@pytest.mark.slow
def test_on_the_command_line():
    """In a process of its own, as a user starts it."""
    done = runs.train_in_subprocess(*run_flags("--sam-norm", "l0"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == "fairseq_sam: error: norm (--sam-norm) must be l2, linf or a number > 1, got 'l0'"
