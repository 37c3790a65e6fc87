"""Models of fairseq and batches to time their training steps: an LSTM, a Transformer, BART, at several sizes."""

import contextlib
import io
import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "fairseq_sam"


@dataclass(frozen=True)
class Model:
    """A model to time.

    Attributes:
        flags: of fairseq-train: task, architecture, sizes.
        length: tokens of a sentence.
        is_language_model: whether it has no source.
    """

    flags: str
    length: int
    is_language_model: bool = False


def _transformer(dimension: int, inner: int, heads: int, layers: int, words: int) -> str:
    sizes = " ".join(
        f"--{side}-embed-dim {dimension} --{side}-ffn-embed-dim {inner} --{side}-attention-heads {heads} "
        f"--{side}-layers {layers}"
        for side in ("encoder", "decoder")
    )
    return f"--task dummy_mt --arch transformer {sizes} --share-all-embeddings --dict-size {words}"


def _lstm(dimension: int, layers: int, words: int) -> str:
    return (
        f"--task dummy_lm --arch lstm_lm --decoder-embed-dim {dimension} --decoder-hidden-size {dimension} "
        f"--decoder-out-embed-dim {dimension} --decoder-layers {layers} --share-decoder-input-output-embed "
        f"--dict-size {words}"
    )


# By name; the number is that of parameters.
MODELS = {
    "LSTM, 5M": Model(_lstm(400, 2, 6000), 35, is_language_model=True),
    "LSTM, 20M": Model(_lstm(800, 2, 12000), 35, is_language_model=True),
    "Transformer, 1M": Model(_transformer(128, 256, 4, 2, 2000), 30),
    "Transformer, 5M": Model(_transformer(256, 512, 4, 3, 4000), 30),
    "Transformer, 20M": Model(_transformer(384, 1024, 6, 5, 12000), 30),
    "Transformer, 60M": Model(_transformer(512, 2048, 8, 6, 32000), 30),
    "Transformer, 200M": Model(_transformer(1024, 4096, 16, 6, 24000), 30),
    "BART, 400M": Model("--task dummy_mt --arch bart_large --dict-size 50000", 60),
}


def trainer(model: Model, optimizer: str, tokens: int, *, cpu: bool, flags: str = "") -> Trainer:
    """Return fairseq's Trainer of a model.

    Args:
        model: the model.
        optimizer: flags of the optimizer: ``--optimizer adam``.
        tokens: of a batch.
        cpu: use the CPU even if there is a GPU.
        flags: further flags, such as ``--fp16``.
    """
    words = [*model.flags.split(), *optimizer.split(), *flags.split(), *(["--cpu"] if cpu else [])]
    size = f"--tokens-per-sample {model.length}" if model.is_language_model else (
        f"--src-len {model.length} --tgt-len {model.length}"
    )  # fmt: skip
    words += [*size.split(), "--batch-size", str(sentences(model, tokens)), "--lr", "1e-4", "--seed", "1"]
    words += ["--criterion", "cross_entropy", "--dropout", "0.1", "--user-dir", str(PLUGIN), "--num-workers", "0"]
    with quiet():
        utils.import_user_module(Namespace(user_dir=str(PLUGIN)))
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
        torch.manual_seed(1)
        task = tasks.setup_task(cfg.task)
        made = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
        made.begin_epoch(1)
    return made


def sentences(model: Model, tokens: int) -> int:
    """How many sentences make a batch of so many tokens."""
    return max(1, round(tokens / model.length))


def batches(model: Model, tokens: int, words: int, number: int = 4) -> list[dict[str, Any]]:
    """Return batches of random tokens.

    Args:
        model: the model.
        tokens: of a batch, of its target.
        words: of the dictionary.
        number: how many.
    """
    generator = torch.Generator().manual_seed(1)
    size = sentences(model, tokens)

    def draw() -> torch.Tensor:
        return torch.randint(4, words, (size, model.length), generator=generator)

    found = []
    for _ in range(number):
        source, target = draw(), draw()
        lengths = torch.full((size,), model.length, dtype=torch.long)
        inputs = {"src_tokens": source, "src_lengths": lengths}
        if not model.is_language_model:
            inputs["prev_output_tokens"] = target.roll(1, 1)
        found.append({
            "id": torch.arange(size), "nsentences": size, "ntokens": size * model.length, "net_input": inputs,
            "target": target,
        })  # fmt: skip
    return found


@contextlib.contextmanager
def quiet() -> Any:
    """Keep fairseq's log out of the table's way."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
