"""Encoders of Hugging Face, BERT and RoBERTa, as checkpoints of fairseq."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.masked_lm import MaskedLMTask
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.hugging_face import EncoderConfig, model_folder, read_config, read_tokenizer, read_weights
from fairseq_sam.adapter.subwords import symbols_of

ENCODER, HEAD = "encoder.sentence_encoder", "encoder.lm_head"
WORDS, POSITIONS = f"{ENCODER}.embed_tokens.weight", f"{ENCODER}.embed_positions.weight"
SEGMENTS = f"{ENCODER}.embed_positions.segments.weight"
FAIRSEQ_ORDER = ("<s>", "<pad>", "</s>", "<unk>")  # the first symbols of every dictionary
FAIRSEQ_EPSILON = 1e-5  # of its layer norms, as of RoBERTa's
FIRST_POSITION = 2  # fairseq's row of a text's first token: after the number of the padding
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # those of TensorFlow
INITIAL_SEED = 1


@dataclass(frozen=True)
class Conversion:
    """What was written, and what the user should know."""

    flags: list[str]  # of fairseq-train, for the model that the checkpoint holds
    num_parameters: int
    left_out: list[str]  # weights of the original that are not in it
    initialized: list[str]  # weights that the original does not have


def convert_encoder(source: str | Path, output: str | Path, *, keep_pooler: bool = True) -> Conversion:
    """Write a BERT or RoBERTa of Hugging Face as a fairseq checkpoint with the same outputs.

    ``dict.txt`` names the tokens so that each keeps its embedding, with fairseq's special symbols for BERT's: ``<s>``
    for ``[CLS]``, ``</s>`` for ``[SEP]``, ``<pad>``, ``<unk>``, ``<mask>``. RoBERTa becomes fairseq's ``roberta``, its
    one segment embedding added to those of the positions. BERT becomes ``bert``, and so does a RoBERTa whose layer
    norms have another epsilon than fairseq's 1e-5. The checkpoint's task is ``masked_lm``, and fairseq's interface of
    RoBERTa reads the folder: ``BertModel.from_pretrained(folder)``, with ``tokenizer_file=…`` where it was moved.
    Its ``encode(A, B)`` is ``<s> A </s> B </s>`` for ``bert``, ``<s> A </s> </s> B </s>`` for ``roberta``.

    Args:
        source: folder of the model, or ``package:NAME`` for the one in an installed Python package.
        output: folder to write: ``model.pt``, ``dict.txt``, ``tokenizer.json`` for ``--bpe hugging_face``, and the
            model's flags for ``fairseq-train``, ``model_flags.txt``.
        keep_pooler: store BERT's pooler, from which new classification heads then start. RoBERTa's is left out, since
            it is not pretrained.

    Returns:
        The flags of the model, and which weights are left out or new.

    Raises:
        ConfigurationError: if the model is of another kind, incomplete or damaged, or does not fit its configuration.
        OSError: if `output` cannot be written.
    """
    folder, output = model_folder(source), Path(output)
    if output.resolve() == folder.resolve():
        raise ConfigurationError(f"the output {output} is the folder of the model itself: name another")
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    symbols = symbols_of(tokenizer, config.num_words)
    if len(symbols) > config.num_words:
        raise ConfigurationError(
            f"the tokenizer in {folder} has {len(symbols)} tokens, the model {config.num_words} (vocab_size in "
            "config.json): take the tokenizer that belongs to the model"
        )
    order = sorted(range(len(symbols)), key=lambda number: _place(symbols[number], number))
    weights, left_out = _placed(read_weights(folder), config, folder)
    if config.kind == "roberta" or not keep_pooler:
        poolers = [name for name in weights if name.startswith("pooler.")]
        weights = {name: weight for name, weight in weights.items() if name not in poolers}
        left_out += poolers
    state = _as_fairseq_has_them(weights, config, order)
    flags = model_flags(config, tied=HEAD + ".weight" not in state)

    output.mkdir(parents=True, exist_ok=True)
    dictionary = Dictionary()
    for number in order[len(FAIRSEQ_ORDER) :]:
        dictionary.add_symbol(symbols[number])
    dictionary.save(str(output / "dict.txt"))
    tokenizer.save(str(output / "tokenizer.json"))
    (output / "model_flags.txt").write_text(" ".join(flags) + "\n", encoding="utf-8")
    checkpoint, initialized = _checkpoint(state, flags, dictionary, output.resolve())
    torch.save(checkpoint, output / "model.pt.tmp")
    (output / "model.pt.tmp").replace(output / "model.pt")
    return Conversion(flags, sum(weight.numel() for weight in state.values()), sorted(left_out), sorted(initialized))


def _place(symbol: str, number: int) -> tuple[int, int]:
    """Where a symbol is in a dictionary: fairseq's four first, then by the original's numbers."""
    first = FAIRSEQ_ORDER.index(symbol) if symbol in FAIRSEQ_ORDER else len(FAIRSEQ_ORDER)
    return first, number


def model_flags(config: EncoderConfig, *, tied: bool = True) -> list[str]:
    """Return the flags of ``fairseq-train`` for a model of this configuration.

    Args:
        config: the original's.
        tied: whether the weights of the LM head are the word embeddings.
    """
    values: dict[str, Any] = {
        "arch": _architecture(config),
        "encoder-layers": config.layers,
        "encoder-embed-dim": config.width,
        "encoder-ffn-embed-dim": config.ffn_width,
        "encoder-attention-heads": config.heads,
        "activation-fn": config.activation,
        "dropout": config.dropout,
        "attention-dropout": config.attention_dropout,
        "max-positions": config.num_positions - config.first_position,
    }
    if values["arch"] == "bert":
        values["num-segments"] = config.num_segments if config.kind == "bert" else 1
        values["layer-norm-epsilon"] = config.layer_norm_epsilon
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return flags if tied else [*flags, "--untie-weights-roberta"]


def _architecture(config: EncoderConfig) -> str:
    return "roberta" if config.kind == "roberta" and config.layer_norm_epsilon == FAIRSEQ_EPSILON else "bert"


# -- weights ----------------------------------------------------------------------------------------------------------


def _places(config: EncoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face's name of each weight, without prefix, with fairseq's name and the shape that it must have."""
    places: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(old: str, new: str, *shape: int, bias: bool = True) -> None:
        places[f"{old}.weight"] = (f"{new}.weight", shape)
        if bias:
            places[f"{old}.bias"] = (f"{new}.bias", shape[:1])

    width, ffn_width, words = config.width, config.ffn_width, config.num_words
    add("embeddings.word_embeddings", f"{ENCODER}.embed_tokens", words, width, bias=False)
    add("embeddings.position_embeddings", f"{ENCODER}.embed_positions", config.num_positions, width, bias=False)
    add("embeddings.token_type_embeddings", SEGMENTS.removesuffix(".weight"), config.num_segments, width, bias=False)
    add("embeddings.LayerNorm", f"{ENCODER}.layernorm_embedding", width)
    for layer in range(config.layers):
        old, new = f"encoder.layer.{layer}", f"{ENCODER}.layers.{layer}"
        for name, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            add(f"{old}.attention.self.{name}", f"{new}.self_attn.{projection}", width, width)
        add(f"{old}.attention.output.dense", f"{new}.self_attn.out_proj", width, width)
        add(f"{old}.attention.output.LayerNorm", f"{new}.self_attn_layer_norm", width)
        add(f"{old}.intermediate.dense", f"{new}.fc1", ffn_width, width)
        add(f"{old}.output.dense", f"{new}.fc2", width, ffn_width)
        add(f"{old}.output.LayerNorm", f"{new}.final_layer_norm", width)
    add("pooler.dense", "pooler.dense", width, width)
    if config.kind == "bert":
        head, dense, norm = "cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"
    else:
        head, dense, norm = "lm_head", "lm_head.dense", "lm_head.layer_norm"
    add(dense, f"{HEAD}.dense", width, width)
    add(norm, f"{HEAD}.layer_norm", width)
    places[f"{head}.bias"] = places[f"{head}.decoder.bias"] = (f"{HEAD}.bias", (words,))
    places[f"{head}.decoder.weight"] = (f"{HEAD}.weight", (words, width))
    return places


def _placed(weights: dict[str, Tensor], config: EncoderConfig, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in fp32 by fairseq's names, and the names of those that have no place.

    Raises:
        ConfigurationError: if the encoder, or half of a head, is missing, or a shape is not the configuration's.
    """
    places = _places(config)
    placed: dict[str, Tensor] = {}
    left_out = []
    for name, weight in weights.items():
        plain = re.sub(r"^(bert|roberta)\.", "", name)
        for old, new in OLD_NAMES.items():
            plain = plain.replace(old, new)
        if plain in BUFFERS:
            continue
        if plain not in places:
            if plain.startswith(("embeddings.", "encoder.")):
                raise ConfigurationError(
                    f"{folder} has the weight {name}, which the encoder of its config.json has not: take files of one "
                    "model without adapters, relative positions and cross-attention"
                )
            left_out.append(name)
            continue
        place, shape = places[plain]
        if tuple(weight.shape) != shape:
            raise ConfigurationError(
                f"{name} in {folder} is of shape {tuple(weight.shape)}, but {shape} by config.json: take both from one "
                "model"
            )
        if place not in placed or plain.endswith("decoder.bias"):  # what is added; the other is its older name
            placed[place] = weight.float()
    _refuse_missing(placed, places, folder)
    return placed, left_out


def _refuse_missing(placed: dict[str, Tensor], places: dict[str, tuple[str, tuple[int, ...]]], folder: Path) -> None:
    """Refuse weights without the encoder. The pooler and the LM head may be missing, but not a part of them."""
    optional = [prefix for prefix in ("pooler.", f"{HEAD}.") if not any(name.startswith(prefix) for name in placed)]
    missing = [
        old
        for old, (new, _) in places.items()
        if new not in placed and new != f"{HEAD}.weight" and not new.startswith(tuple(optional))
    ]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ConfigurationError(f"the weights in {folder} lack {shown}: fetch all files of a BERT or RoBERTa encoder")


def _as_fairseq_has_them(weights: dict[str, Tensor], config: EncoderConfig, order: list[int]) -> dict[str, Tensor]:
    """Rows of words in the dictionary's order, positions from fairseq's first, RoBERTa's one segment in them."""
    state = dict(weights)
    for name in (WORDS, f"{HEAD}.weight", f"{HEAD}.bias"):
        if name in state:
            state[name] = state[name][order]
    if f"{HEAD}.weight" in state and torch.equal(state[f"{HEAD}.weight"], state[WORDS]):
        del state[f"{HEAD}.weight"]
    positions, segments = state[POSITIONS][config.first_position :], state[SEGMENTS]
    if config.kind == "roberta":  # its texts are all of segment 0
        segments = segments[:1]
    if _architecture(config) == "roberta":
        positions = positions + segments
        del state[SEGMENTS]
    else:
        state[SEGMENTS] = segments
    state[POSITIONS] = torch.cat([positions.new_zeros(FIRST_POSITION, config.width), positions])
    return state


# -- checkpoint -------------------------------------------------------------------------------------------------------


def _checkpoint(
    state: dict[str, Tensor], flags: list[str], dictionary: Dictionary, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint as fairseq writes it before the first update, of plain containers; what is new in it.

    The model is built, so that what the original lacks gets its initial value.
    """
    import fairseq_sam.models.bert  # noqa: F401  registers the architecture

    cfg = _configuration(flags, folder)
    task = MaskedLMTask(cfg.task, dictionary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(INITIAL_SEED)
        model = task.build_model(cfg.model)
    # As torch does it: fairseq's own would give the pooler away and count its checkpoint's version down.
    torch.nn.Module.load_state_dict(model, state, strict=False)
    initialized = [name for name, _ in model.named_parameters() if name not in state]
    pooler = {name: weight for name, weight in state.items() if name.startswith("pooler.")}
    content: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    content["model"] = {"_name": cfg.model.arch, **vars(cfg.model)}
    checkpoint = {
        "args": None,
        "cfg": content,
        "model": {**model.state_dict(), **pooler},
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "MaskedLmLoss",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True},
            "previous_training_time": 0,
        },
    }
    return checkpoint, initialized


def _configuration(flags: list[str], folder: Path) -> Any:
    """What fairseq makes of the command line that would train such a model."""
    positions = flags[flags.index("--max-positions") + 1]
    command = [str(folder), *flags, "--task", "masked_lm", "--criterion", "masked_lm", "--optimizer", "adam"]
    command += ["--tokens-per-sample", positions, "--bpe", "hugging_face"]
    command += ["--tokenizer-file", str(folder / "tokenizer.json")]
    parser = options.get_training_parser()
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=command))
