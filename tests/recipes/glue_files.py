"""Generated files in the official layouts of GLUE and SuperGLUE, tokenizers, and small runs on them."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from scripts.recipes import glue
from scripts.recipes.subwords import TokenizerFile

WORDS = "the old cat dog bank river table light green runs sleeps sees near under with unhappily quickly".split()
HEADERS = {
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
}
ROWS = {
    "CoLA": "gj04\t{label}\t*\t{a}",
    "SST-2": "{a}\t{label}",
    "MRPC": "{label}\t12\t34\t{a}\t{b}",
    "QQP": "5\t12\t34\t{a}\t{b}\t{label}",
    "STS-B": "5\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\t{a}\t{b}\t{label}",
    "MNLI": "5\t12\t12e\tfiction\t( x )\t( y )\t(ROOT x)\t(ROOT y)\t{a}\t{b}\tneutral\t{label}",
    "QNLI": "5\t{a}\t{b}\t{label}",
    "RTE": "5\t{a}\t{b}\t{label}",
}
DEV_NAMES = {"MNLI": ("dev_matched", "dev_mismatched"), "jsonl": ("val",), "tsv": ("dev",)}


def sentence(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + " ."


def record(name, label, rng):
    """An instance of a jsonl file."""
    a, b, word = sentence(rng), sentence(rng), rng.choice(WORDS)
    if name == "WiC":
        first, second = f"{a} {word} {b}", f"{word} {a}"
        place = len(a) + 1
        return {"word": word, "sentence1": first, "sentence2": second, "start1": place, "end1": place + len(word),
                "start2": 0, "end2": len(word), "version": 1.1, "idx": 0, "label": label == "True"}  # fmt: skip
    if name == "WSC":
        text = f"{a} Mary Ann saw it , because she {b}"
        start = a.count(" ") + 1
        target = {"span1_text": "Mary Ann", "span1_index": start, "span2_text": "she", "span2_index": start + 6}
        return {"text": text, "target": target, "idx": 0, "label": label == "True"}
    if name == "COPA":
        question = rng.choice(["cause", "effect"])
        return {"premise": a, "choice1": b, "choice2": sentence(rng), "question": question, "label": int(label)}
    if name == "CB":
        return {"premise": a, "hypothesis": b, "label": label, "idx": 0}
    return {"question": a, "passage": b, "label": label == "True", "idx": 0}


def label(task, rng):
    return f"{rng.uniform(0, 5):.3f}" if task.is_regression else rng.choice(task.labels)


def lines(name, number, seed=0):
    """Lines of an official file, with the header if it has one."""
    task, rng = glue.TASKS[name], random.Random(seed)
    if task.ending == "jsonl":
        return [json.dumps(record(name, label(task, rng), rng)) for _ in range(number)]
    rows = [ROWS[name].format(a=sentence(rng), b=sentence(rng), label=label(task, rng)) for _ in range(number)]
    return [HEADERS[name], *rows] if name in HEADERS else rows


def write_task(folder, name, num_train=24, num_valid=13):
    """Write the official files of a task; returns the folder that has the task's."""
    task, place = glue.TASKS[name], folder / name
    place.mkdir(parents=True, exist_ok=True)
    parts = {"train": num_train}
    parts.update(dict.fromkeys(DEV_NAMES.get(name, DEV_NAMES[task.ending]), num_valid))
    for seed, (part, number) in enumerate(parts.items()):
        (place / f"{part}.{task.ending}").write_text("\n".join(lines(name, number, seed)) + "\n", encoding="utf-8")
    return folder


def write_wordpiece(folder):
    """A BERT-like tokenizer whose words fall into pieces, and its dictionary."""
    pieces = ["[PAD]", "[UNK]", "un", "##hap", "##pily", "quick", "##ly", "mary", "ann", "she", "it", "saw", "because",
              "?", "what", "was", "of", "this", "cause", "happened", "as", "a", "result", ",", ".", "(", ")", "'", "\"",
              "##s", "caf", "##e", *WORDS[:15]]  # fmt: skip
    model = models.WordPiece(vocab={piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces[1:]), encoding="utf-8")
    return folder


def write_gpt2(folder, text=()):
    """Files of a small byte-level BPE as RoBERTa has them, and its dictionary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text or [" ".join(WORDS)] * 3, trainer)
    tokenizer.model.save(str(folder))
    merges = [line for line in (folder / "merges.txt").read_text().split("\n") if line and line[0] != "#"]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "encoder.json").write_text((folder / "vocab.json").read_text())
    numbers = range(tokenizer.get_vocab_size())
    (folder / "dict.txt").write_text("".join(f"{number} 1\n" for number in numbers))
    return folder


def prepared(folder, name, tokens, **options):
    """A task's folder for fairseq, from generated files and a tokenizer of write_wordpiece."""
    task, out = glue.TASKS[name], folder / f"{name}-bin"
    files = glue.find_files(task, write_task(folder, name))
    glue.prepare(task, files, out, tokens / "dict.txt", TokenizerFile(tokens / "tokenizer.json"), **options)
    return out


ENCODER = (
    "--arch roberta --encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 "
    "--encoder-attention-heads 2 --max-positions 64 --dropout 0.1"
).split()


def flags_of(name, separator=2):
    """Flags of a small fine-tuning."""
    return [*glue.training_flags(glue.TASKS[name], separator), *ENCODER]


def paths_below(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
