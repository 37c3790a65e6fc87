"""Small runs of fairseq's commands, in this process, on generated text."""

import contextlib
import io
import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from fairseq_sam import PRESETS
from tests.adapter import composing

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = tempfile.TemporaryDirectory()  # where fairseq leaves crash.pt after an error
PLUGIN = str(ROOT / "fairseq_sam")
sys.path.insert(0, str(ROOT / "examples" / "demo"))

TINY = (
    "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 24 "
    "--decoder-ffn-embed-dim 24 --encoder-attention-heads 2 --decoder-attention-heads 2"
).split()
TRANSLATION = [
    "--arch", "transformer", *TINY, "--share-decoder-input-output-embed", "--dropout", "0.2",
    "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1",
]  # fmt: skip
# The same recipe in hydra's words, to be formatted with the data folder.
YAML_RECIPE = """\
task: {{_name: translation, data: {data}, source_lang: src, target_lang: tgt}}
model:
  _name: transformer
  dropout: 0.0
  share_decoder_input_output_embed: true
  encoder: {{embed_dim: 16, ffn_embed_dim: 24, layers: 1, attention_heads: 2}}
  decoder: {{embed_dim: 16, ffn_embed_dim: 24, layers: 1, attention_heads: 2}}
criterion: {{_name: label_smoothed_cross_entropy, label_smoothing: 0.1}}
"""
COMMON = (
    "--user-dir {plugin} --cpu --num-workers 0 --max-tokens 300 --lr 0.003 --seed 3 --no-progress-bar "
    "--log-format none --disable-validation"
)


def common_flags() -> list[str]:
    return COMMON.format(plugin=PLUGIN).split()


def shares_a_perturbation(preset: str) -> bool:
    """Whether the preset allows the scope of a whole update."""
    method = PRESETS[preset]
    return method.ascent != "instance" and method.m == 1 and method.where == "weights"


SCOPED = [
    (p, scope) for p in PRESETS for scope in ("microbatch", "update") if scope[0] == "m" or shares_a_perturbation(p)
]


def steps_flag(preset: str, steps: int) -> list[str]:
    """Several ascent steps, for presets that take them."""
    return [] if PRESETS[preset].ascent == "random" else ["--sam-steps", str(steps)]


def write_translation_data(folder: Path) -> Path:
    """Binarise 240 generated pairs, at word level."""
    from grammar import sentence_pairs

    pairs = sentence_pairs(300, seed=5)
    for split, part in (("train", pairs[:240]), ("valid", pairs[240:270]), ("test", pairs[270:])):
        for language, lines in zip(("src", "tgt"), zip(*part, strict=True), strict=True):
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")
    preprocess(folder, folder / "data-bin", "--source-lang", "src", "--target-lang", "tgt")
    return folder / "data-bin"


def write_monolingual_data(folder: Path) -> Path:
    """Binarise generated sentences for language models."""
    preprocess(folder, folder / "lm-bin", "--only-source", suffix=".tgt")
    return folder / "lm-bin"


def write_classification_data(folder: Path) -> Path:
    """Binarise sentences with a label (whether the sentence is about the future) and with a score."""
    sentences = {split: (folder / f"{split}.src").read_text().splitlines() for split in ("train", "valid", "test")}
    for split, lines in sentences.items():
        (folder / f"{split}.label").write_text("\n".join(str(int(" will " in line)) for line in lines) + "\n")
    out = folder / "cls-bin"
    preprocess(folder, out / "input0", "--only-source", suffix=".src")
    preprocess(folder, out / "label", "--only-source", suffix=".label")
    rng = random.Random(0)
    for split, lines in sentences.items():
        scores = (f"{len(line.split()) / 10 + rng.random() / 10:.3f}" for line in lines)
        (out / "label" / f"{split}.label").write_text("\n".join(scores) + "\n")
    return out


def preprocess(text: Path, out: Path, *flags: str, suffix: str = "") -> None:
    from fairseq_cli.preprocess import main

    prefixes = [f"--{split}pref" for split in ("train", "valid", "test")]
    if suffix:
        flags = (*flags, "--source-lang", suffix[1:])
    words = ["--destdir", str(out), *flags]
    for prefix in prefixes:
        words += [prefix, str(text / prefix[2:-4])]
    with quiet():
        main(options.get_preprocessing_parser().parse_args(words))
    if suffix:
        for file in [*out.glob(f"*{suffix}-None{suffix}.*"), *out.glob(f"dict{suffix}.txt")]:
            file.rename(out / file.name.replace(f"{suffix}-None{suffix}", "").replace(suffix, ""))


def configuration(flags: Sequence[str]) -> Any:
    parser = options.get_training_parser()
    parsed = options.parse_args_and_arch(parser, input_args=list(flags))
    with composing.remembering():
        return convert_namespace_to_omegaconf(parsed)


def train(data: Path, save_dir: Path, *flags: str) -> dict[str, Any]:
    """Run fairseq-train to its end and return the last checkpoint."""
    from fairseq_cli.train import main

    with quiet():
        main(configuration([str(data), *common_flags(), "--save-dir", str(save_dir), *flags]))
    return load(save_dir / "checkpoint_last.pt")


def command_in_subprocess(command: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", f"fairseq_cli.{command}", *flags], capture_output=True, text=True)


def train_in_subprocess(*flags: str) -> subprocess.CompletedProcess[str]:
    return command_in_subprocess("train", *flags)


def load(path: Path) -> dict[str, Any]:
    return checkpoint_utils.load_checkpoint_to_cpu(str(path))


@contextlib.contextmanager
def quiet() -> Any:
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def build_trainer(data: Path, *flags: str) -> tuple[Trainer, list[Any]]:
    """A trainer as fairseq-train builds it, and all its micro-batches."""
    with quiet():
        return trainer_of(configuration([str(data), *common_flags(), "--save-dir", SCRATCH.name, *flags]))


def trainer_of(cfg: Any) -> tuple[Trainer, list[Any]]:
    """The trainer of a configuration at the start of epoch 1, and this worker's micro-batches, not shuffled."""
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    iterator = trainer.get_train_iterator(epoch=1)
    trainer.begin_epoch(1)
    return trainer, list(iterator.next_epoch_itr(shuffle=False))


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def same_state(first: Any, second: Any) -> bool:
    """Nested containers are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_state, first, second))
    return bool(first == second)
