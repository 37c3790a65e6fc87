"""Hydra's composition of fairseq's configuration, remembered: it takes half a second, which is most of a small test."""

import contextlib
import copy
from unittest import mock

from fairseq.dataclass import utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

_compose = utils.compose
_remembered = {}  # by which values are given and what is chosen: the first composition and its overrides


def compose(config_name, overrides, **options):
    """What hydra composes: the first composition with the same choices, with the values that differ set in it."""
    choices = tuple(each if "." not in each.partition("=")[0] else each.partition("=")[0] for each in overrides)
    if (config_name, choices) not in _remembered:
        _remembered[config_name, choices] = (_compose(config_name, overrides=overrides, **options), overrides)
    composed, first = _remembered[config_name, choices]
    composed = copy.deepcopy(composed)
    changed = [now for now, before in zip(overrides, first, strict=True) if now != before]
    for override in OverridesParser.create().parse_overrides(changed):
        OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
    return composed


def remembering() -> contextlib.AbstractContextManager:
    return mock.patch.object(utils, "compose", compose)
