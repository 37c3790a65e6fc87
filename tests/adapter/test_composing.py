"""The tests' remembered configurations are those that hydra composes."""

from argparse import Namespace

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from tests.adapter import runs

FLAGS = [
    ["--optimizer", "ga_sam"],
    ["--optimizer", "ga_sam", "--sam-epsilon", "0.25", "--sam-norm", "linf", "--sam-exclude", r"bias|'a' = [1]"],
    ["--optimizer", "ga_sam", "--fp16", "--update-freq", "2,3", "--lr", "0.1,0.2"],
    ["--optimizer", "adam", "--adam-betas", "(0.8, 0.9)"],
    ["--optimizer", "sam", "--base-optimizer", "sgd", "--lr-scheduler", "inverse_sqrt"],
    ["--optimizer", "sam", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "7", "--save-dir", "/a b/c=d,e"],
]


def test_they_are_equal():
    for flags in [*FLAGS, *reversed(FLAGS)]:
        whole = ["/nowhere", *runs.common_flags(), *runs.TRANSLATION, *flags]
        parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=whole)
        expected = convert_namespace_to_omegaconf(parsed)
        found = runs.configuration(whole)
        for key in expected:
            assert _plain(found[key]) == _plain(expected[key]), (flags, key)


def _plain(value):
    if isinstance(value, Namespace):
        return vars(value)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def test_a_value_of_the_wrong_kind_is_refused():
    cfg = runs.configuration(["/nowhere", *runs.common_flags(), *runs.TRANSLATION, "--optimizer", "sam"])
    with pytest.raises(Exception, match="sam_epsilons"):
        cfg.optimizer.sam_epsilons = 1
