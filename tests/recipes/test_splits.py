"""Preparations keep their splits apart: what is trained on comes from training data and is in no other split.

The binarised data is read back and compared with the corpora, by letters alone: they stay the same in all subwords.
"""

import json
import random
import re
import shutil
import string
import sys
from itertools import combinations

import pytest

pytest.importorskip("fairseq", reason="preparations write fairseq's data")

from fairseq.data import Dictionary, data_utils
from tokenizers import Tokenizer, models, pre_tokenizers

import tests.adapter.runs  # noqa: F401  with it comes the path of the demo's grammar
from scripts.recipes.recipe import EXAMPLES, read_recipe
from scripts.recipes.sequences import train_sentencepiece
from scripts.recipes.sts import LAYOUTS, TRAINING
from scripts.recipes.text import SPECIAL
from tests import in_process
from tests.recipes import corpora, glue_files, sts_files
from tests.recipes.papers import RECIPES

pytestmark = pytest.mark.usefixtures("in_this_process")
WORDS = [*corpora.GOOD, *corpora.BAD]


def letters(text):
    return re.sub(r"[\W\d_]", "", text.lower())


def lines_of(path):
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def records_of(path):
    return [json.loads(line) for line in lines_of(path)]


def prepare(name, data, out, *options):
    """Run a preparation."""
    words = [sys.executable, EXAMPLES / name / "prepare.py", "--data", data, "--out", out, *map(str, options)]
    done = in_process.run(words)
    assert done.returncode == 0, done.stderr[-1000:]


def written(folder, splits=("train", "valid", "test"), suffix="", dictionary="dict.txt"):
    """Texts of binarised splits."""
    words = Dictionary.load(str(folder / dictionary))
    found = {}
    for split in splits:
        rows = data_utils.load_indexed_dataset(str(folder / f"{split}{suffix}"), words)
        found[split] = [letters(words.string(row)) for row in rows]
    return found


def assert_apart(splits, origins):
    """Each split has texts, each of them from where it should be, and none that another split has.

    Args:
        splits: texts by split.
        origins: by split, the texts that it may have.
    """
    assert splits.keys() == origins.keys()
    allowed = {split: {letters(text) for text in texts} for split, texts in origins.items()}
    for split, texts in splits.items():
        assert texts and set(texts) <= allowed[split], f"{split}: {sorted(set(texts) - allowed[split])[:3]}"
    for (first, one), (second, other) in combinations(splits.items(), 2):
        assert not set(one) & set(other), f"{first} and {second} have texts in common"
        same = allowed[first] & allowed[second]
        assert not same or same == allowed[first] == allowed[second], "the corpora are not apart"


def pretrained(folder, texts):
    """A folder like a pretrained model's, with subwords of all characters."""
    alphabet = " ".join(sorted({*string.printable}))
    train_sentencepiece([*(" ".join(text.split()) for text in texts), *[alphabet] * len(texts)], folder, 200)
    (folder / "model.pt").touch()
    return folder


def of_pairs(out, splits=("train", "valid", "test")):
    return written(out / "data-bin", splits, ".source-target.source", "dict.source.txt")


# -- one test for each preparation -------------------------------------------------------------------------------------


def test_every_preparation_is_tested_here():
    used = {read_recipe(name, size).prepare.parent.name for name in RECIPES for size in ["mini"]}
    tested = {name.removeprefix("test_splits_of_") for name in globals() if name.startswith("test_splits_of_")}
    assert used == tested == {path.parent.name for path in EXAMPLES.glob("*/prepare.py")}


def test_splits_of_ga_sam_table1_imdb(tmp_path):
    """Validation reviews are training reviews of the corpus that are not trained on."""
    corpora.write_imdb(tmp_path)
    texts = {
        name: [line.split("\t")[3].replace("<br />", " ") for line in lines_of(tmp_path / "imdb" / f"{name}.tsv")]
        for name in ("train", "test")
    }
    for number, options in enumerate(([], ["--num-train", 30, "--num-test", 20])):
        out = tmp_path / f"out{number}"
        prepare("ga_sam_table1_imdb", tmp_path, out, "--num-valid", 16, *options)
        splits = written(out / "data-bin" / "input0")
        assert_apart(splits, {"train": texts["train"], "valid": texts["train"], "test": texts["test"]})
        assert len(splits["valid"]) == 16 and len(splits["train"]) == (64, 30)[number]


def test_splits_of_ga_sam_table1_ptb(tmp_path):
    (tmp_path / "ptb").mkdir()
    texts = write_lines({split: tmp_path / "ptb" / f"ptb.{split}.txt" for split in ("train", "valid", "test")})
    prepare("ga_sam_table1_ptb", tmp_path, tmp_path / "out", "--num-lines", 20)
    assert_apart(written(tmp_path / "out" / "data-bin"), texts)


def write_lines(paths, number=40):
    """Lines of words, no two of them the same; returns them by name."""
    rng = random.Random(11)
    texts = {name: [" ".join(rng.choices(WORDS, k=rng.randint(6, 12))) for _ in range(number)] for name in paths}
    for name, path in paths.items():
        path.write_text("".join(f"{line}\n" for line in texts[name]), encoding="utf-8")
    assert len({line for lines in texts.values() for line in lines}) == number * len(texts)
    return texts


@pytest.mark.parametrize("language", ["en", "vi"])
def test_splits_of_iwslt15_en_vi(tmp_path, language):
    names, folder = {"train": "train", "valid": "tst2012", "test": "tst2013"}, tmp_path / "iwslt15_envi"
    folder.mkdir()
    texts = write_lines({split: folder / f"{name}.{language}" for split, name in names.items()})
    for name in names.values():
        shutil.copyfile(folder / f"{name}.{language}", folder / f"{name}.{'vi' if language == 'en' else 'en'}")
    prepare("iwslt15_en_vi", tmp_path, tmp_path / "out", "--num-train", 36)
    found = written(tmp_path / "out" / "data-bin", suffix=f".en-vi.{language}", dictionary=f"dict.{language}.txt")
    assert_apart(found, texts)


def test_splits_of_ga_sam_table1_deen(tmp_path):
    folder = tmp_path / "iwslt14_deen"
    folder.mkdir()
    texts = write_lines({split: folder / f"{split}.de" for split in ("train", "valid", "test")})
    for split in texts:
        shutil.copyfile(folder / f"{split}.de", folder / f"{split}.en")
    prepare("ga_sam_table1_deen", tmp_path, tmp_path / "out", "--num-merges", 20)
    assert_apart(written(tmp_path / "out" / "data-bin", suffix=".de-en.de", dictionary="dict.de.txt"), texts)


def test_splits_of_delta_sam_table3_cnndm(tmp_path):
    corpora.write_aeslc(tmp_path)
    corpora.write_summaries(tmp_path, "xsum")
    files = {"train": "train", "valid": "dev", "test": "test"}
    mails = {
        split: [row["body"] for row in records_of(tmp_path / "aeslc" / f"{name}.jsonl")]
        for split, name in files.items()
    }
    files["valid"] = "val"
    texts = {split: lines_of(tmp_path / "xsum" / f"{name}.source") for split, name in files.items()}
    model = pretrained(tmp_path / "bart", [text for each in (mails, texts) for part in each.values() for text in part])
    for corpus, origins in (("aeslc", mails), ("xsum", texts)):
        out = tmp_path / corpus / "out"
        prepare("delta_sam_table3_cnndm", tmp_path, out, "--corpus", corpus, "--model", model, "--num-train", 20)
        assert_apart(of_pairs(out), origins)


def test_splits_of_fsam_table2_conll(tmp_path):
    """JFLEG's dev is divided by sentences, not by corrections."""
    corpora.write_jfleg(tmp_path)
    corpora.write_conll(tmp_path)
    dev, test = (lines_of(tmp_path / "jfleg" / f"{name}.src") for name in ("dev", "test"))
    origins = {
        "jfleg": {"train": dev, "valid": dev, "test": test},
        "conll2014": {
            "train": lines_of(tmp_path / "conll2014" / "train.source"),
            "valid": lines_of(tmp_path / "conll2014" / "valid.source"),
            "test": [line[2:] for line in lines_of(tmp_path / "conll2014" / "test.m2") if line.startswith("S ")],
        },
    }
    model = pretrained(
        tmp_path / "bart", [text for each in origins.values() for part in each.values() for text in part]
    )
    for corpus, texts in origins.items():
        out = tmp_path / corpus / "out"
        prepare("fsam_table2_conll", tmp_path, out, "--corpus", corpus, "--model", model, "--num-valid", 10)
        splits = of_pairs(out)
        assert_apart(splits, texts)
        assert len(splits["train"]) == (40 if corpus == "conll2014" else 30 * 4)


def test_splits_of_bart_small(tmp_path):
    """Documents of the corpora's training parts alone."""
    corpora.write_aeslc(tmp_path)
    corpora.write_imdb(tmp_path)
    for path in (tmp_path / "aeslc" / "train.jsonl", tmp_path / "imdb" / "train.tsv"):
        path.write_text(path.read_text(encoding="utf-8").lower(), encoding="utf-8")  # no character is rare
    texts = [row["body"] for row in records_of(tmp_path / "aeslc" / "train.jsonl")]
    texts += [line.split("\t")[3].replace("<br />", " ") for line in lines_of(tmp_path / "imdb" / "train.tsv")]
    prepare("bart_small", tmp_path, tmp_path / "out", "--num-held-out", 10, "--num-subwords", 120)
    splits = written(tmp_path / "out" / "data-bin")
    assert_apart(splits, dict.fromkeys(splits, texts))
    assert [len(part) for part in splits.values()] == [len(texts) - 20, 10, 10]


def fairseq_encoder(folder):
    folder.mkdir()
    glue_files.write_wordpiece(folder)
    (folder / "model.pt").touch()
    return folder


def test_splits_of_delta_sam_table1_bert_base(tmp_path):
    """Of the task itself, of which a part is trained on, and of one to transfer to."""
    for name in ("RTE", "CoLA"):
        glue_files.write_task(tmp_path / "glue", name)
    encoder, out = fairseq_encoder(tmp_path / "encoder"), tmp_path / "out"
    options = ["--task", "RTE", "--rate", 0.5, "--transfer", "CoLA", "--encoder", encoder]
    prepare("delta_sam_table1_bert_base", tmp_path, out, *options)
    for name, column, folder, number in (("RTE", 1, "data-bin", 12), ("CoLA", 3, "transfer/CoLA", 24)):
        files = {"train": "train", "valid": "dev"}
        rows = {split: lines_of(tmp_path / "glue" / name / f"{file}.tsv") for split, file in files.items()}
        texts = {
            split: [line.split("\t")[column] for line in lines if "sentence1" not in line]
            for split, lines in rows.items()
        }
        splits = written(out / folder / "input0", ("train", "valid"))
        assert_apart(splits, texts)
        assert (len(splits["train"]), len(splits["valid"])) == (number, 13)


def test_splits_of_delta_sam_table2_mirror_bert(tmp_path, monkeypatch):
    """Sentences of STS-B's training pairs, and none of a set that is scored."""
    data, encoder = tmp_path / "corpora", tmp_path / "encoder"
    sts_files.write_sets(data)
    texts = {
        name: [text for *pair, _ in sts_files.pairs_of(name) for text in pair] for name in [*LAYOUTS, "STS-B train"]
    }
    words = sorted({word for part in texts.values() for text in part for word in text.split()})
    encoder.mkdir()
    (encoder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(encoder / "tokenizer.json"))
    monkeypatch.setattr("fairseq_sam.adapter.encoders.convert_encoder", shutil.copytree)
    prepare("delta_sam_table2_mirror_bert", data, tmp_path / "out", "--encoder", encoder, "--num-sentences", 20)
    (found,) = written(tmp_path / "out" / "data-bin", ("train",)).values()
    scored = {letters(text) for name in LAYOUTS for text in texts[name]}
    assert (
        len(found) == 20 and set(found) <= {letters(text) for text in texts["STS-B train"]} and not scored & set(found)
    )
    for layout in LAYOUTS.values():
        names = [path.name for path in (tmp_path / "out" / "corpora" / layout.folder).iterdir()]
        assert any(name.removesuffix(".xz") == layout.file for name in names)
        assert layout.file == "train.tsv" or not any(name.startswith(TRAINING.file) for name in names)


def test_splits_of_sam_language_models_table1(tmp_path):
    """Where a task has no training file, its validation instances are divided; parts.json has those that are left."""
    for name in ("BoolQ", "CB"):
        glue_files.write_task(tmp_path / "superglue", name)
    (tmp_path / "superglue" / "BoolQ" / "train.jsonl").unlink()
    model, out = (
        pretrained(tmp_path / "bart", [glue_files.sentence(random.Random(n)) for n in range(60)]),
        tmp_path / "out",
    )
    prepare("sam_language_models_table1", tmp_path, out, "--tasks", "BoolQ", "CB", "--held-out", 5, "--model", model)

    def instances(name, file):
        rows = records_of(tmp_path / "superglue" / name / f"{file}.jsonl")
        texts = ("question", "passage") if name == "BoolQ" else ("premise", "hypothesis")
        return [" ".join([name, *(f"{text} {row[text]}" for text in texts)]) for row in rows], rows

    divided, rows = instances("BoolQ", "val")
    train, valid = (instances("CB", file)[0] for file in ("train", "val"))
    splits = of_pairs(out, ("train", "valid"))
    own = {split: [text for text in texts if text.startswith("boolq")] for split, texts in splits.items()}
    assert_apart(own, {"train": divided, "valid": divided})
    assert (len(own["train"]), len(own["valid"])) == (8, 5)
    others = {split: [text for text in texts if text.startswith("cb")] for split, texts in splits.items()}
    assert_apart(others, {"train": train, "valid": valid})
    assert (len(others["train"]), len(others["valid"])) == (24, 13)
    answers = {letters(text): str(row["label"]) for text, row in zip(divided, rows, strict=True)}
    (first, _) = json.loads((out / "parts.json").read_text())
    assert first[:2] == ["boolq", "BoolQ"] and first[2] == [answers[text] for text in own["valid"]]
