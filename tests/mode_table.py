"""The table of training modes in docs/modes.md, from what tests marked ``mode`` showed.

@pytest.mark.mode("fp16")                        presets: the test's parameter `preset`
@pytest.mark.mode("slowmo", presets=["sam"])     or these
@pytest.mark.mode("bmuf", refused=True)          the mode is refused with these presets
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fairseq_sam import PRESETS

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "modes.md"
COMMAND = "python3 user_dir_setup.py test --write-mode-table"

MODES = {
    "fp32": "fp32",
    "fp16": "`--fp16` (flat)",
    "fp16 not flat": "`--fp16 --fp16-no-flatten-grads`",
    "memory-efficient fp16": "`--memory-efficient-fp16`",
    "bf16": "`--bf16`",
    "memory-efficient bf16": "`--memory-efficient-bf16`",
    "amp": "`--amp`",
    "update-freq": "`--update-freq N`, `--sam-scope microbatch`",
    "update-freq, update": "`--update-freq N`, `--sam-scope update`",
    "clip-norm": "`--clip-norm`",
    "pytorch_ddp": "`--ddp-backend pytorch_ddp` (`c10d`)",
    "legacy_ddp": "`--ddp-backend legacy_ddp` (`no_c10d`)",
    "workers, update": "both of these, `--sam-scope update`",
    "slowmo": "`--ddp-backend slowmo`",
    "fully_sharded": "`--ddp-backend fully_sharded`",
    "zero": "`--zero-sharding os`",
    "bmuf": "`--use-bmuf`",
    "local weights, update": "`slowmo` or `--use-bmuf`, `--sam-scope update`",
    "half bmuf": "`--use-bmuf` with `--fp16`, `--bf16` or `--amp`",
    "pipeline": "`--pipeline-model-parallel`",
    "ema": "`--store-ema`",
    "checkpoint-activations": "`--checkpoint-activations`",
    "own train_step": "tasks with their own `train_step`",
    "hydra": "`fairseq-hydra-train`",
    "base optimizers": "every base optimizer",
}

FAMILIES = {
    "one ascent": ("sam", "asam", "layer_sam", "awp"),
    "several steps": ("multistep_defense", "ga_sam", "model_perturbation"),
    "parts of a batch": ("efficient_sam", "msam", "instance_sam"),
    "losses of instances": ("esam", "delta_sam"),
    "Fisher mask": ("fisher_sam",),
    "combined gradients": ("gsam", "look_sam"),
    "random direction": ("random_sam",),
    "embeddings": ("freelb",),
}
IN_FAMILIES = sorted(preset for family in FAMILIES.values() for preset in family)
assert sorted(PRESETS) == IN_FAMILIES, "every preset belongs to one family"

HEADER = """# Training modes

What is verified of each mode of fairseq with each family of methods. The numbers are tests, listed below the table:
**CPU** ones run everywhere, in every run of the tests; **GPU** ones skip where there is no CUDA device, and say so
(so far there was none: they were not run yet).
*Refused* is ended before any data is read, with the reason and what to use instead; the number is the test that shows
the message. This page is written by the tests (`{command}`), and a run of all
tests fails where it differs from what they showed.

{families}

"""

FOOTER = """
Modes that fairseq 0.12 does not run on CPU are tested there with a stand-in for the CUDA call that stops it: flat
`--fp16` asks for the current device, `--amp` for a gradient scaler, `slowmo` for a synchronisation, `pytorch_ddp` for
device numbers. `--amp` on CPU shows the scaler only: fairseq's autocast does nothing there.

`slowmo` and `--zero-sharding` need `pip install fairscale`, as in plain fairseq. Where each worker has weights of its
own (`slowmo`, `--use-bmuf`), what a method remembers (Fisher mask, reused component) is each worker's own as well, and
a checkpoint holds that of the first.

`delta_sam` weighs instances by second differences of their losses. Half-precision weights round these away: it runs,
but its weights of instances are those of rounding; a warning at the start says so and names `--amp`.

What fairseq 0.12 itself no longer runs with today's torch and numpy, with or without the plugin:

| what | error |
|---|---|
| `--optimizer lamb`, and `--base-optimizer lamb` | `ImportError: Please install apex to use LAMB optimizer` |
| `--optimizer cpu_adam`, and `--base-optimizer cpu_adam` | `ImportError: Please install DeepSpeed` |
| masking of speech (`--mask-prob` of wav2vec and HuBERT) | `AttributeError: module 'numpy' has no attribute 'int'` |
| `--ddp-backend fully_sharded` on CPU | needs CUDA; the plugin refuses it everywhere |
"""


class Result(NamedTuple):
    """What one test showed."""

    mode: str
    preset: str
    test: str
    device: str
    refused: bool


def results_of(properties: Iterable[tuple[str, Any]]) -> list[Result]:
    """Read what `record` left in a report."""
    return [Result(*json.loads(value)) for key, value in properties if key == "mode"]


def record(item: Any) -> list[tuple[str, str]]:
    """Properties for the report of a test."""
    found = []
    preset = getattr(item, "callspec", None) and item.callspec.params.get("preset")
    device = "GPU" if item.get_closest_marker("gpu") else "CPU"
    test = f"{item.nodeid.partition('::')[0]}::{item.originalname}"
    for marker in item.iter_markers("mode"):
        presets = marker.kwargs.get("presets") or [preset]
        for mode in marker.args:
            assert mode in MODES and set(presets) <= set(PRESETS), f"{test}: {mode}, {presets}"
            found += [
                ("mode", json.dumps([mode, p, test, device, marker.kwargs.get("refused", False)])) for p in presets
            ]
    return found


def missing(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Pairs of a mode and a preset that no test showed anything of on CPU."""
    shown = {(result.mode, result.preset) for result in results if result.device == "CPU"}
    return [(mode, preset) for mode in MODES for preset in PRESETS if (mode, preset) not in shown]


def render(results: Iterable[Result]) -> str:
    """The document."""
    results = sorted(set(results))
    order = {mode: place for place, mode in enumerate(MODES)}
    tests = list(dict.fromkeys(r.test for r in sorted(results, key=lambda r: (order[r.mode], r.device, r.test))))
    number = {test: place + 1 for place, test in enumerate(tests)}
    lines = [f"| mode | {' | '.join(FAMILIES)} |", "|---|" + "---|" * len(FAMILIES)]
    for mode, flags in MODES.items():
        cells = [_cell([r for r in results if r.mode == mode], presets, number) for presets in FAMILIES.values()]
        lines.append(f"| {flags} | {' | '.join(cells)} |")
    families = "\n".join(f"- **{name}**: {', '.join(f'`{p}`' for p in presets)}" for name, presets in FAMILIES.items())
    legend = "\n".join(f"{number[test]}. `{test}`" for test in tests)
    return HEADER.format(command=COMMAND, families=families) + "\n".join(lines) + "\n\n" + legend + "\n" + FOOTER


def _cell(results: Sequence[Result], presets: Sequence[str], number: dict[str, int]) -> str:
    """What is shown of a family: of all its presets, or of some, which are named then."""
    parts = []
    for label, wanted in (("CPU", ("CPU", False)), ("GPU", ("GPU", False)), ("refused", ("CPU", True))):
        shown: dict[str, list[str]] = {}
        for result in results:
            if (result.device, result.refused) == wanted and result.preset in presets:
                shown.setdefault(result.test, []).append(result.preset)
        groups: dict[tuple[str, ...], list[int]] = {}
        for test, of in shown.items():
            groups.setdefault(tuple(p for p in presets if p in of), []).append(number[test])
        for of, numbers in sorted(groups.items(), key=lambda group: group[1]):
            names = "" if len(of) == len(presets) else f" ({', '.join(of)})"
            parts.append(f"{label} {', '.join(map(str, sorted(numbers)))}{names}")
    return "; ".join(parts) or "—"
