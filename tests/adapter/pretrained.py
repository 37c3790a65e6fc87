"""Small random models of the transformers package, with trained tokenizers, in the folders that it writes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from fairseq import options
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.adapter import runs

try:
    import torchaudio  # noqa: F401  transformers imports it, and fairseq may have brought one that does not fit torch
except (ImportError, OSError):
    sys.modules["torchaudio"] = None

transformers = pytest.importorskip("transformers", reason="the originals that conversions are compared with")

BERT_SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NUM_FILLERS = 3  # rows of embeddings beyond the tokens, as where a vocabulary is padded to a multiple of 8
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXTS = [
    "",
    "the nofak will prasul a gimol near this tom",
    "Ünïcödé: naïve café, 'Ça va?' (c'est l'été)...",
    "北京 is big, 東京 is bigger",
    "🙂 emoji 👩‍👩‍👧 joined, and\tcontrol\u200b\u00a0spaces\u3000here",
    "punctuation!?;:#@$%^&*()_+-=[]{}|\\/~` e.g. 3.14, 1,000 and U.S.A.",
    "long" * 60,
    "x" * 150 + " short",
    "[CLS] [MASK] and [SEP], <s> <mask> </s> <unk> in a text",
    "  two  spaces, and a space at the end ",
]
PAIRS = [("the nofak will prasul", "a gimol"), ("", "café 北京"), ("a gimol near this tom. again", "")]


def lines():
    from grammar import sentence_pairs

    return [source for source, _ in sentence_pairs(200, seed=3)] + TEXTS


def train_tokenizer(kind):
    """A vocabulary (and merges) of 260 tokens at most."""
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=260, special_tokens=BERT_SPECIAL, limit_alphabet=120, show_progress=False
        )
        tokenizer.train_from_iterator(lines(), trainer)
        return transformers.BertTokenizer(vocab=tokenizer.get_vocab())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=ROBERTA_SPECIAL[:4],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], "<mask>": len(model["vocab"])}
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]])


def random_model(kind, num_words, cls=None, **config):
    """A model each of whose weights is random, also those that begin as zeros or ones."""
    sizes = {**SIZES, "vocab_size": num_words, **config}
    if kind == "bert":
        sizes = {"max_position_embeddings": 300, **sizes}
        model = (cls or transformers.BertForMaskedLM)(transformers.BertConfig(**sizes))
    else:
        sizes = {"max_position_embeddings": 302, "type_vocab_size": 1, "layer_norm_eps": 1e-5, **sizes}
        model = (cls or transformers.RobertaForMaskedLM)(transformers.RobertaConfig(**sizes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.eval()


def write_original(folder: Path, kind, form="model.safetensors", cls=None, tokenizer=None, **config):
    """Write a folder as Hugging Face has them; return its model and tokenizer."""
    tokenizer = tokenizer or train_tokenizer(kind)
    torch.manual_seed(1)
    model = random_model(kind, len(tokenizer) + NUM_FILLERS, cls, **config)
    folder.mkdir(exist_ok=True)
    if form == "pytorch_model.bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / form)
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "1GB")
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def hidden_states_and_logits(model, tokenizer, *texts):
    """What the original makes of a padded batch: last hidden states, logits if it has a head, and what is no padding.

    Args:
        model: with or without an LM head.
        tokenizer: the original's.
        texts: one list of texts, or two of the same length.
    """
    inputs = tokenizer(*map(list, texts), return_tensors="pt", padding=True)
    if "token_type_ids" in inputs:
        inputs["token_type_ids"].clamp_(max=model.config.type_vocab_size - 1)
    with torch.no_grad():
        encoder = getattr(model, model.base_model_prefix, model)
        hidden = encoder(**inputs).last_hidden_state
        logits = model(**inputs).logits if encoder is not model else None
    return hidden, logits, inputs["attention_mask"].bool()


def write_pairs(folder: Path, converted: Path, encode):
    """Binarise pairs of sentences, with a label each, by the dictionary of a converted model."""
    from grammar import sentence_pairs

    texts = [source for source, _ in sentence_pairs(60, seed=9)]
    for name, shift in (("input0", 0), ("input1", 7)):
        shifted = [encode(text) for text in texts[shift:] + texts[:shift]]
        binarise(folder / name, shifted, "--srcdict", str(converted / "dict.txt"))
    binarise(folder / "label", [str(int(" will " in text)) for text in texts])
    return folder


def binarise(folder: Path, texts, *flags):
    """Write texts as fairseq-preprocess does: two thirds for training, the rest for validation."""
    from fairseq_cli import preprocess

    folder.mkdir(parents=True)
    count = len(texts) * 2 // 3
    for split, part in (("train", texts[:count]), ("valid", texts[count:])):
        (folder / f"{split}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    prefixes = [word for split in ("train", "valid") for word in (f"--{split}pref", str(folder / f"{split}.txt"))]
    parser = options.get_preprocessing_parser()
    with runs.quiet():
        preprocess.main(parser.parse_args([*prefixes, "--destdir", str(folder), "--only-source", *flags]))
