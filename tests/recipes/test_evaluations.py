"""Evaluations score the checkpoint and the split that they say, against values worked out one instance at a time.

The models of a run's checkpoints have learnt nothing; they differ from each other, as all splits do, so that each
checkpoint and split has scores of its own.
"""

import json
import math
import random
import shutil
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fairseq", reason="evaluations run fairseq's commands")

import torch
from fairseq import tasks
from fairseq.data import Dictionary, data_utils
from fairseq.trainer import Trainer
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from sacremoses import MosesDetokenizer
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, matthews_corrcoef
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, models, pre_tokenizers

from fairseq_sam.__main__ import main
from scripts.recipes import evaluations, glue, measures, sts
from scripts.recipes.sequences import train_sentencepiece
from scripts.recipes.subwords import TokenizerFile
from scripts.recipes.text import SPECIAL, write_indexed
from tests.adapter import runs
from tests.recipes import corpora, glue_files, sts_files

BEST, LAST = "checkpoint_best.pt", "checkpoint_last.pt"
CPU = ["--cpu"]
SPLITS = ("train", "valid", "test")
pytestmark = pytest.mark.usefixtures("in_this_process")


class Models:
    """Random models of one configuration, one for each checkpoint of a run.

    Args:
        run: folder of the run.
        flags: fairseq-train's.
        names: of the checkpoints.
        spread: weights are multiplied with it, so that models are sure of what they say.
    """

    def __init__(self, run, flags, names=(BEST, LAST), spread=3.0):
        run.mkdir(parents=True, exist_ok=True)
        with runs.quiet():
            self.cfg = runs.configuration([*map(str, flags), *runs.common_flags(), "--no-save-optimizer-state"])
            self.task = tasks.setup_task(self.cfg.task)
            criterion = self.task.build_criterion(self.cfg.criterion)
            for seed, name in enumerate(names):
                torch.manual_seed(seed)
                model = self.task.build_model(self.cfg.model)
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.mul_(spread if weight.dim() > 1 else 1.0)
                Trainer(self.cfg, self.task, model, criterion).save_checkpoint(
                    str(run / name), {"train_iterator": {"epoch": 1}}
                )
        self.run = run

    def __getitem__(self, name):
        return self.of(torch.load(self.run / name, weights_only=False)["model"])

    def of(self, weights):
        model = self.task.build_model(self.cfg.model)
        model.load_state_dict(weights)
        return model.eval()

    def dataset(self, split):
        self.task.load_dataset(split)
        return self.task.dataset(split)


def dictionary_of(path, words):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
    return Dictionary.load(str(path))


def write_rows(prefix, lines, dictionary):
    """Binarised lines of words; returns their numbers."""
    rows = [dictionary.encode_line(line, add_if_not_exist=False).int() for line in lines]
    write_indexed(prefix, rows, len(dictionary))
    return [row.long() for row in rows]


def assert_apart(values, least):
    """Every checkpoint and split has another value, or a test would not notice which one was scored."""
    found = sorted(values)
    assert min(second - first for first, second in pairwise(found)) > least, found


# -- classes of sentences ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Labelled pairs of RTE in three splits, sentences of CoLA to transfer to, and models."""
    folder = tmp_path_factory.mktemp("sentences")
    tokens = glue_files.write_wordpiece(folder)
    tokenizer = TokenizerFile(tokens / "tokenizer.json")
    for name, out in (("RTE", "data-bin"), ("CoLA", "transfer/CoLA")):
        task, files = glue.TASKS[name], {}
        for seed, split in enumerate(SPLITS):
            files[split] = folder / f"{name}-{split}.tsv"
            lines = glue_files.lines(name, 30 - 4 * seed, seed)
            files[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
        glue.prepare(task, files, folder / out, tokens / "dict.txt", tokenizer)
    flags = [folder / "data-bin", *glue_files.flags_of("RTE"), "--optimizer", "adam"]
    return SimpleNamespace(folder=folder, models=Models(folder / "run", flags))


def labels_of(folder, name, split):
    """Answers as the official file has them."""
    rows = [line.split("\t") for line in (folder / f"{name}-{split}.tsv").read_text().splitlines()]
    return [row[1] for row in rows] if name == "CoLA" else [row[-1] for row in rows[1:]]


def probabilities(found, name, split):
    """Of RTE's second label, by instance."""
    model, dataset = found.models[name], found.models.dataset(split)
    with torch.inference_mode():
        rows = [
            model(dataset[n]["net_input.src_tokens"][None], features_only=True,
                  classification_head_name="sentence_classification_head")[0][0].softmax(0)[1].item()
            for n in np.argsort([dataset[n]["id"] for n in range(len(dataset))])
        ]  # fmt: skip
    return rows


def accuracies(found):
    """Accuracy and loss in bits by checkpoint and split."""
    scores = {}
    for name, split in product((BEST, LAST), SPLITS):
        shares = probabilities(found, name, split)
        wanted = [label == "entailment" for label in labels_of(found.folder, "RTE", split)]
        right = 100 * accuracy_score(wanted, [share > 0.5 for share in shares])
        scores[name, split] = right, log_loss(wanted, shares, labels=[False, True]) / math.log(2)
    assert_apart([right for right, _ in scores.values()], 0.5)
    return scores


def settings_of(folder, **others):
    return {"data": str(folder), "evaluation": {}, "options": {}, "flags": {}, **others}


def test_classification_is_of_the_best_checkpoint(sentences):
    expected = accuracies(sentences)
    found = evaluations.classification(sentences.models.run, settings_of(sentences.folder), CPU)
    (test, test_loss), (valid, valid_loss) = expected[BEST, "test"], expected[BEST, "valid"]
    wanted = {"accuracy": test, "test_loss": test_loss, "valid_accuracy": valid, "valid_loss": valid_loss}
    assert found == pytest.approx(wanted, abs=1e-4)


def test_glue_is_of_the_best_checkpoint(sentences):
    expected = accuracies(sentences)
    found = evaluations.glue(sentences.models.run, settings_of(sentences.folder), CPU)
    wanted = {"accuracy": expected[BEST, "valid"][0], "test_accuracy": expected[BEST, "test"][0]}
    assert found == pytest.approx(wanted, abs=1e-4)
    for split in ("valid", "test"):
        rows = (sentences.models.run / f"{split}.predictions.tsv").read_text().splitlines()[1:]
        assert [row.split("\t")[1] for row in rows] == labels_of(sentences.folder, "RTE", split)
        shares = probabilities(sentences, BEST, split)
        assert [float(row.split("\t")[-1]) for row in rows] == pytest.approx(shares, abs=1e-4)


def features(found, name, split):
    """Of CoLA's sentences, the first token's."""
    model = found.models[name].encoder.sentence_encoder
    place = found.folder / "transfer" / "CoLA" / "input0"
    rows = data_utils.load_indexed_dataset(str(place / split), Dictionary.load(str(place / "dict.txt")))
    with torch.inference_mode():
        outputs = [model(torch.cat([torch.tensor([0]), row.long()])[None])["encoder_out"][0][0, 0] for row in rows]
    return torch.stack(outputs).numpy()


def test_transfer_is_of_the_best_checkpoint(sentences):
    """Both the scores of its own task and those of a linear model on its features."""
    expected = {}
    for name in (BEST, LAST):
        known, new = (features(sentences, name, split) for split in ("train", "valid"))
        answers, wanted = (labels_of(sentences.folder, "CoLA", split) for split in ("train", "valid"))
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(known, answers)
        expected[name] = 100 * matthews_corrcoef(wanted, linear.predict(new))
    assert_apart(expected.values(), 5)
    settings = settings_of(sentences.folder, options={"transfer": ["CoLA"]})
    found = evaluations.transfer(sentences.models.run, settings, CPU)
    assert found["CoLA_matthews"] == pytest.approx(expected[BEST], abs=1e-3)
    assert found["accuracy"] == pytest.approx(accuracies(sentences)[BEST, "valid"][0])


def test_task_transfer_as_a_command(sentences, tmp_path, capsys):
    """Each model on each task: values as worked out apart, a table, a plot."""
    expected = {}
    for name in (BEST, LAST):
        known, new = (features(sentences, name, split) for split in ("train", "valid"))
        answers, wanted = (labels_of(sentences.folder, "CoLA", split) for split in ("train", "valid"))
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(known, answers)
        expected[name] = 100 * matthews_corrcoef(wanted, linear.predict(new))
    checkpoints = [str(sentences.models.run / name) for name in (BEST, LAST)]
    tasks = [str(sentences.folder / folder) for folder in ("transfer/CoLA", "data-bin")]
    words = ["--names", "best", "last", "--tasks", *tasks, "--out", str(tmp_path), "--cpu"]
    assert main(["transfer", *checkpoints, *words]) == 0
    lines = [line.split("\t") for line in (tmp_path / "transfer.tsv").read_text().splitlines()]
    assert lines[0] == ["model", "task", "metric", "value"]
    found = {(model, task, metric): float(value) for model, task, metric, value in lines[1:]}
    assert {(model, task) for model, task, _ in found} == set(product(("best", "last"), ("CoLA", "RTE")))
    for name, model in ((BEST, "best"), (LAST, "last")):
        assert found[model, "CoLA", "matthews"] == pytest.approx(expected[name], abs=1e-3)
    shown = capsys.readouterr()
    assert f"| best | {expected[BEST]:.2f} |" in shown.out and "last on RTE: " in shown.err
    assert (tmp_path / "transfer.png").stat().st_size > 10_000


def transfer(found, out, *folders, words=()):
    return main(["transfer", str(found.models.run / BEST), "--tasks", *map(str, folders), "--out", str(out), *words])


def test_a_task_of_spans_is_no_task_to_transfer_to(sentences, tmp_path, capsys):
    folder = tmp_path / "WiC"
    shutil.copytree(sentences.folder / "transfer" / "CoLA", folder)
    (folder / "glue.json").write_text(
        json.dumps({**json.loads((folder / "glue.json").read_text()), "task": "WiC", "trainer": "span_prediction"})
    )
    assert transfer(sentences, tmp_path, folder) == 2
    assert "error: run, WiC: WiC is a task of span_prediction" in capsys.readouterr().err


def test_data_with_other_words_of_the_same_number(sentences, tmp_path, capsys):
    """Their numbers would be taken for those of the model's words."""
    folder = tmp_path / "CoLA"
    shutil.copytree(sentences.folder / "transfer" / "CoLA", folder)
    path = folder / "input0" / "dict.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]) + "\n")
    assert transfer(sentences, tmp_path / "out", folder) == 2
    assert "do not fit together: the data must be made with the model's dictionary" in capsys.readouterr().err


def test_transfer_to_folders_of_fairseq_itself(sentences, tmp_path, capsys):
    """Without ``glue.json``: usual scores, of a regression too; tasks of one name are told apart by their folders."""
    own = sentences.folder / "transfer" / "CoLA"
    for name in ("first", "second"):
        shutil.copytree(own, tmp_path / name / "CoLA")
        (tmp_path / name / "CoLA" / "glue.json").unlink()
    shutil.copytree(tmp_path / "first" / "CoLA", tmp_path / "length")
    shutil.rmtree(tmp_path / "length" / "label")
    (tmp_path / "length" / "label").mkdir()
    for split in ("train", "valid"):  # the number of tokens, as a score from 0 to 1
        rows = data_utils.load_indexed_dataset(
            str(own / "input0" / split), Dictionary.load(str(own / "input0" / "dict.txt"))
        )
        (tmp_path / "length" / "label" / f"{split}.label").write_text("".join(f"{len(row) / 50}\n" for row in rows))
    folders = [tmp_path / "first" / "CoLA", tmp_path / "second" / "CoLA", tmp_path / "length"]
    assert transfer(sentences, tmp_path / "out", *folders) == 0
    lines = [line.split("\t") for line in (tmp_path / "out" / "transfer.tsv").read_text().splitlines()[1:]]
    values = {(task, metric): float(value) for _, task, metric, value in lines}
    names = ["CoLA (first)", "CoLA (second)", "length"]
    assert list(values) == [
        *((name, metric) for name in names[:2] for metric in ("accuracy", "f1", "matthews")),
        *((names[2], metric) for metric in ("pearson", "spearman")),
    ]
    known, new = (features(sentences, BEST, split) for split in ("train", "valid"))
    answers, wanted = (labels_of(sentences.folder, "CoLA", split) for split in ("train", "valid"))
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(known, answers)
    assert values[names[0], "accuracy"] == pytest.approx(100 * accuracy_score(wanted, linear.predict(new)), abs=1e-3)
    assert values[names[2], "pearson"] > 50, "the length of a sentence is in its features"
    whole = json.loads((tmp_path / "out" / "transfer.json").read_text())
    tasks = whole["runs"][0]["measured"][0]["tasks"]
    assert {name: task["folder"] for name, task in tasks.items()} == dict(zip(names, map(str, folders), strict=True))
    assert tasks[names[0]]["digest"] == tasks[names[1]]["digest"] != tasks[names[2]]["digest"]
    capsys.readouterr()
    shutil.copytree(own, tmp_path / "other")
    with (tmp_path / "other" / "input0" / "dict.txt").open("a") as file:
        file.write("another 1\n")
    for words, error in (
        ([tmp_path / "other"], "do not fit together: the data must be made with the model's dictionary"),
        ([folders[0], folders[0]], "--tasks must name different folders, got one twice"),
        ([tmp_path], f"expected a folder with input0 and label, as sentence_prediction reads it, got {tmp_path}"),
        ([folders[0], "--subset", "dev"], "has no answers of dev, in label"),
        ([folders[0], "--user-dir", "nowhere"], "--user-dir must be the folder of a plugin of fairseq, got nowhere"),
    ):
        assert transfer(sentences, tmp_path / "none", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert error in line


# -- similarity of sentences -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Words as tokens, generated sets, and models."""
    folder = tmp_path_factory.mktemp("encoders")
    sts_files.write_sets(folder / "corpora")
    texts = [text for name in [*sts.LAYOUTS, "STS-B train"] for row in sts_files.pairs_of(name) for text in row[:2]]
    words = sorted({word for text in texts for word in text.split()})
    (folder / "encoder").mkdir()
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate([*SPECIAL, "<mask>", *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "encoder" / "tokenizer.json"))
    dictionary = dictionary_of(folder / "data-bin" / "dict.txt", words)
    flags = "--task sentence_embedding --criterion mirror --pooling mean --optimizer adam".split()
    run = Models(folder / "run", [folder / "data-bin", *flags, *glue_files.ENCODER])
    return SimpleNamespace(folder=folder, models=run, dictionary=dictionary)


def correlation(found, name, set_name):
    """Spearman's correlation of the cosines of mean features with the scores."""
    model, sides = found.models[name].encoder.sentence_encoder, ([], [])
    rows = sts_files.pairs_of(set_name)
    with torch.inference_mode():
        for row in rows:
            for side, text in zip(sides, row[:2], strict=True):
                words = found.dictionary.encode_line(text, add_if_not_exist=False)
                outputs = model(torch.cat([torch.tensor([0]), words.long()])[None])["encoder_out"][0]
                side.append(outputs[:, 0].mean(0))
    cosines = torch.cosine_similarity(torch.stack(sides[0]), torch.stack(sides[1]))
    return 100 * spearmanr(cosines.numpy(), [score for *_, score in rows])[0]


def test_similarity_is_of_the_last_checkpoint(encoders):
    names = ["STS12", "STS-B", "SICK-R", sts.DEVELOPMENT]
    expected = {(name, each): correlation(encoders, name, each) for name, each in product((BEST, LAST), names)}
    assert_apart(expected.values(), 0.05)
    settings = settings_of(encoders.folder, evaluation={"max_length": 60})
    found = evaluations.sts(encoders.models.run, settings, CPU)
    assert found["valid"] == pytest.approx(expected[LAST, sts.DEVELOPMENT], abs=0.02)
    for name in names[:-1]:
        assert found[name] == pytest.approx(expected[LAST, name], abs=0.02)
    assert found["avg."] == pytest.approx(np.mean([found[name] for name in sts.SETS]))


# -- language models ---------------------------------------------------------------------------------------------------

PIECE = 40  # words


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    words = [*corpora.OTHER, *corpora.GOOD]
    dictionary, rng, rows = dictionary_of(folder / "data-bin" / "dict.txt", words), random.Random(1), {}
    (folder / "text").mkdir()
    for split in SPLITS:
        lines = [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(9)]
        (folder / "text" / split).write_text("".join(f"{line}\n" for line in lines))
        rows[split] = write_rows(folder / "data-bin" / split, lines, dictionary)
    flags = "--task language_modeling --criterion cross_entropy --arch lstm_lm --decoder-embed-dim 8 --optimizer sgd "
    flags += f"--decoder-hidden-size 8 --decoder-out-embed-dim 8 --decoder-layers 1 --tokens-per-sample {PIECE}"
    return SimpleNamespace(
        folder=folder, models=Models(folder / "run", [folder / "data-bin", *flags.split()]), rows=rows
    )


def perplexity(model, rows, end):
    """Over pieces of the text, each of which begins with the word before it."""
    words = torch.cat(rows)
    before, losses = torch.cat([torch.tensor([end]), words[:-1]]), []
    with torch.inference_mode():
        for start in range(0, len(words), PIECE):
            shares = model(before[None, start : start + PIECE])[0][0].log_softmax(1)
            losses += shares[range(len(shares)), words[start : start + PIECE]].tolist()
    return math.exp(-sum(losses) / len(words))


def test_perplexity_is_of_the_best_checkpoint(language_models):
    found, end = language_models, language_models.models.task.dictionary.eos()
    expected = {
        (name, split): perplexity(found.models[name], found.rows[split], end)
        for name, split in product((BEST, LAST), SPLITS)
    }
    assert_apart(expected.values(), 0.02)
    settings = settings_of(found.folder, evaluation={"length": PIECE})
    wanted = {"perplexity": expected[BEST, "test"], "valid_perplexity": expected[BEST, "valid"]}
    assert evaluations.perplexity(found.models.run, settings, CPU) == pytest.approx(wanted, abs=0.006)


# -- text to text ------------------------------------------------------------------------------------------------------

LABELS = ["acceptable", "unacceptable", "entailment", "not_entailment"]
SHORTEST, LONGEST = 4, 6  # words that are generated
EPOCHS = [f"checkpoint{epoch}.pt" for epoch in range(1, 5)]
SEQUENCES = "--task translation --source-lang source --target-lang target --arch transformer --optimizer adam".split()


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """Lines of words, targets of labels' words as whole pieces of SentencePiece, and models."""
    folder = tmp_path_factory.mktemp("sequences")
    sources = [*corpora.OTHER, *corpora.GOOD]
    train_sentencepiece([corpora.text(random.Random(n)) for n in range(60)], folder / "model", 100)
    dictionaries = {
        "source": dictionary_of(folder / "data-bin" / "dict.source.txt", sources),
        "target": dictionary_of(folder / "data-bin" / "dict.target.txt", [f"▁{label}" for label in LABELS]),
    }
    (folder / "text").mkdir()
    rng, rows, targets = random.Random(2), {}, {}
    for split in SPLITS:
        lines = [" ".join(rng.choices(sources, k=rng.randint(3, 9))) for _ in range(10)]
        targets[split] = [" ".join(rng.choices(LABELS, k=3)) for _ in lines]
        pieces = {"source": lines, "target": [f"▁{line}".replace(" ", " ▁") for line in targets[split]]}
        for side, text in (("source", lines), ("target", targets[split])):
            prefix = folder / "data-bin" / f"{split}.source-target.{side}"
            rows[split, side] = write_rows(prefix, pieces[side], dictionaries[side])
            (folder / "text" / f"{split}.{side}").write_text("".join(f"{line}\n" for line in text))
    run = Models(folder / "run", [folder / "data-bin", *SEQUENCES, *runs.TINY], [LAST, *EPOCHS, BEST])
    return SimpleNamespace(folder=folder, models=run, rows=rows, targets=targets)


def generated(found, model, split, beam=2, shortest=SHORTEST, longest=LONGEST):
    """Words of the best hypotheses, one line at a time."""
    task, lines = found.models.task, []
    settings = SimpleNamespace(beam=beam, min_len=shortest, max_len_b=longest)
    words, generator = task.target_dictionary, task.build_generator([model], settings)
    for row in found.rows[split, "source"]:
        sample = {"net_input": {"src_tokens": row[None], "src_lengths": torch.tensor([len(row)])}}
        (hypotheses,) = task.inference_step(generator, [model], sample)
        kept = (number for number in hypotheses[0]["tokens"].tolist() if number not in (words.bos(), words.eos()))
        lines.append(" ".join(words[number] for number in kept))
    return lines


def text_of(pieces):
    return [line.replace(" ", "").replace("▁", " ").strip() for line in pieces]


def texts_of(found, **options):
    """Generated texts by checkpoint and split, no two of them the same."""
    texts = {
        (name, split): text_of(generated(found, found.models[name], split, **options))
        for name, split in product((BEST, LAST), SPLITS)
    }
    assert len({tuple(lines) for lines in texts.values()}) == len(texts)
    return texts


@pytest.fixture(scope="module")
def texts(sequences):
    return texts_of(sequences)


def with_files(found, folder, files):
    """A folder with the same data and other files beside it."""
    for name in ("data-bin", "model", "text"):
        (folder / name).symlink_to(found.folder / name)
    for name, lines in files.items():
        path = folder / name
        if path.parent.is_symlink():  # of which the others are kept
            shutil.copytree(path.parent.resolve(), folder / "own", dirs_exist_ok=True)
            path.parent.unlink()
            (folder / "own").rename(path.parent)
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


DECODING = {"beam": 2, "min-len": SHORTEST, "max-len-b": LONGEST}


def test_summaries_are_of_the_best_checkpoint_and_the_test_set(sequences, texts):
    names = ["rouge1", "rouge2", "rougeL"]
    scorer, expected = RougeScorer(names, use_stemmer=True), {}
    for (name, split), lines in texts.items():
        rows = [scorer.score(*pair) for pair in zip(sequences.targets[split], lines, strict=True)]
        expected[name, split] = {each: 100 * np.mean([row[each].fmeasure for row in rows]) for each in names}
    assert_apart([scores["rouge1"] for scores in expected.values()], 0.05)
    settings = settings_of(sequences.folder, evaluation=DECODING)
    found = evaluations.summarisation(sequences.models.run, settings, CPU)
    assert {name: found[name] for name in names} == pytest.approx(expected[BEST, "test"])
    assert (sequences.models.run / evaluations.GENERATED).read_text().splitlines() == texts[BEST, "test"]


def test_corrections_are_of_the_best_checkpoint_and_the_test_set(sequences, texts, tmp_path):
    """The annotators have written what the best checkpoint writes for the test set: no other text is as good."""
    right = texts[BEST, "test"]
    data = with_files(sequences, tmp_path, {"references/0": right, "references/1": right})
    settings = settings_of(data, evaluation=DECODING)
    assert evaluations.correction(sequences.models.run, settings, CPU) == {"gleu": pytest.approx(100)}
    blocks = []
    for source, line in zip((data / "text" / "test.source").read_text().splitlines(), right, strict=True):
        blocks += [f"S {source}", f"A 0 {len(source.split())}|||R|||{line}|||REQUIRED|||-NONE-|||0", ""]
    (data / "test.m2").write_text("\n".join(blocks))
    found = evaluations.correction(sequences.models.run, settings, CPU)
    assert found == {"precision": 100, "recall": 100, "f0.5": pytest.approx(100)}


def test_mixtures_are_of_the_best_checkpoint_and_the_validation_set(sequences, tmp_path):
    """A word of each line, the first half of one task; the best checkpoint is right in most lines."""
    texts = texts_of(sequences, beam=1, shortest=1, longest=1)
    wanted = [line if line in LABELS[2:] else LABELS[2] for line in texts[BEST, "valid"]]
    wanted[::4] = [LABELS[2] if line == LABELS[3] else LABELS[3] for line in wanted[::4]]
    half = len(wanted) // 2
    parts = [["rte", "RTE", wanted[:half]], ["qnli", "QNLI", wanted[half:]]]
    expected = {
        key: tuple(100 * accuracy_score(wanted[part], lines[part]) for part in (slice(half), slice(half, None)))
        for key, lines in texts.items()
    }
    own = expected.pop((BEST, "valid"))
    assert min(own) > 0 and own not in expected.values()
    data = with_files(sequences, tmp_path, {"parts.json": [json.dumps(parts)]})
    settings = settings_of(data, evaluation={"beam": 1, "max-len-b": 1})
    found = evaluations.mixture(sequences.models.run, settings, CPU)
    assert found == pytest.approx({"rte_accuracy": own[0], "qnli_accuracy": own[1], "average": sum(own) / 2})


def averaged(found, names):
    states = [torch.load(found.models.run / name, weights_only=False)["model"] for name in names]
    return found.models.of({key: sum(state[key] for state in states) / len(states) for key in states[0]})


@pytest.mark.parametrize("count", [1, 3])
def test_translations_are_of_as_many_averaged_checkpoints(sequences, tmp_path, count):
    """Of the last ones; BLEU is that of sacreBLEU, by which only these translations are right."""
    lines = {number: generated(sequences, averaged(sequences, EPOCHS[-number:]), "test") for number in range(1, 5)}
    assert len({tuple(each) for each in lines.values()}) == len(lines)
    own = lines[count]
    references = [line.replace("▁not_entailment", "▁acceptable") if n % 3 == 0 else line for n, line in enumerate(own)]
    data = with_files(sequences, tmp_path, {"text/test.target": references})
    settings = settings_of(data, evaluation={"average": count, "target": "target", "beam": 2})
    flags = [*CPU, "--min-len", str(SHORTEST), "--max-len-b", str(LONGEST)]
    found = evaluations.translation(sequences.models.run, settings, flags)
    plain = MosesDetokenizer(lang="en")
    hypotheses, wanted = ([plain.detokenize(line.split()) for line in each] for each in (own, references))
    by_tokens = {n: corpus_bleu(each, [references], tokenize="none", force=True).score for n, each in lines.items()}
    expected = {"bleu": corpus_bleu(hypotheses, [wanted]).score, "bleu_tokenised": by_tokens.pop(count)}
    assert found == pytest.approx(expected) and found["bleu"] > 10
    for name, text in (("hypotheses.txt", hypotheses), ("references.txt", wanted)):
        assert (sequences.models.run / name).read_text().splitlines() == text
    assert max(by_tokens.values()) < found["bleu_tokenised"] - 5


def moved(model, loss, distance):
    """Put a model's weights this far along the gradient of a loss, in 2-norm; returns what puts them back."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.cat([g.reshape(-1) for g in gradients if g is not None]).norm()
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.add_(distance * gradient / norm)

    def put_back():
        with torch.no_grad():
            for parameter, weights in zip(parameters, before, strict=True):
                parameter.copy_(weights)

    return put_back


def test_robustness_is_of_the_averaged_model_that_is_corrupted(sequences, tmp_path):
    """One step along the gradient of the test set's loss; the corrupted model translates, its text is kept."""
    model, wanted, losses = averaged(sequences, EPOCHS[-2:]), {}, {}
    flags = [*CPU, "--min-len", str(SHORTEST), "--max-len-b", str(LONGEST)]
    plain = MosesDetokenizer(lang="en")

    def mean_loss():
        total = number = 0
        for source, target in zip(sequences.rows["test", "source"], sequences.rows["test", "target"], strict=True):
            inputs = torch.cat([torch.tensor([2]), target[:-1]])[None]
            logits = model(source[None], torch.tensor([len(source)]), inputs)[0][0]
            total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum") / math.log(2)
            number += len(target)
        return total / number

    clean = mean_loss()
    references = generated(sequences, model, "test")
    data = with_files(sequences, tmp_path, {"text/test.target": references})
    for radius in (0.5, 3.0):
        put_back = moved(model, mean_loss(), radius)
        hypotheses = [plain.detokenize(line.split()) for line in generated(sequences, model, "test")]
        wanted[f"bleu l2 {radius:g}"] = corpus_bleu(
            hypotheses, [[plain.detokenize(r.split()) for r in references]]
        ).score
        losses[f"loss l2 {radius:g}"] = float(mean_loss())
        put_back()
    assert_apart([*wanted.values(), 100.0], 1)
    settings = settings_of(data, evaluation={"average": 2, "target": "target", "beam": 2})
    measured = {"radii": {"l2": [0.5, 3.0]}, "steps": 1, "subset": "test"}
    found = measures.robustness(sequences.models.run, settings, measured, flags)
    assert found == pytest.approx({"loss": float(clean), **losses, **wanted}, rel=1e-4)
    assert (sequences.models.run / "hypotheses bleu l2 3.txt").read_text().splitlines() == hypotheses
    assert not list(sequences.models.run.glob("tmp*"))


def test_adversarial_risk_is_of_each_instance(sentences):
    """At the weights along its own gradient, on the validation split, of the best checkpoint, in nats."""
    model, dataset = sentences.models[BEST], sentences.models.dataset("valid")
    clean, risks = [], []
    for number in range(len(dataset)):
        instance = dataset[number]

        def loss(instance=instance):
            logits = model(
                instance["net_input.src_tokens"][None], features_only=True,
                classification_head_name="sentence_classification_head",
            )[0]  # fmt: skip
            return torch.nn.functional.cross_entropy(logits, instance["target"].reshape(1))

        clean.append(float(loss()))
        put_back = moved(model, loss(), 0.3)
        risks.append(max(clean[-1], float(loss())))
        put_back()
    measured = {"subset": "valid", "epsilon": 0.3, "steps": 1}
    found = measures.adversarial_risk(sentences.models.run, settings_of(sentences.folder), measured, CPU)
    expected = {"risk": sum(risks) / len(risks), "loss": sum(clean) / len(clean)}
    assert found == pytest.approx(expected, rel=1e-4) and found["risk"] > 1.01 * found["loss"]


# -- denoising ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def denoisers(tmp_path_factory):
    """Models that read the text as it is: fairseq's noise is other in every process."""
    folder = tmp_path_factory.mktemp("denoising")
    words, rng, rows = [*corpora.OTHER, *corpora.GOOD], random.Random(3), {}
    dictionary = dictionary_of(folder / "data-bin" / "dict.txt", words)
    (folder / "model").mkdir()
    (folder / "model" / "dict.txt").write_text((folder / "data-bin" / "dict.txt").read_text())
    for split in SPLITS:
        lines = [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(7)]
        rows[split] = write_rows(folder / "data-bin" / split, lines, dictionary)
    flags = "--task denoising --mask 0 --rotate 0 --permute-sentences 0 --sample-break-mode eos --tokens-per-sample 60 "
    flags += "--arch bart_base --share-all-embeddings --criterion cross_entropy --optimizer adam"
    places = ["--max-source-positions", "64", "--max-target-positions", "64"]
    run = Models(folder / "run", [folder / "data-bin", *flags.split(), *runs.TINY, *places], spread=6.0)
    return SimpleNamespace(folder=folder, models=run, rows=rows)


def bits(found, name, split):
    """Loss of a token, that of the begin too."""
    model, words = found.models[name], found.models.task.dictionary
    begin, end, losses = torch.tensor([words.bos()]), torch.tensor([words.eos()]), []
    with torch.inference_mode():
        for row in found.rows[split]:
            text = torch.cat([begin, row])
            before = torch.cat([end, text[:-1]])
            shares = model(text[None], torch.tensor([len(text)]), before[None])[0][0].log_softmax(1)
            losses += shares[range(len(text)), text].tolist()
    return -sum(losses) / len(losses) / math.log(2)


def test_denoising_is_of_the_best_checkpoint(denoisers):
    """The scores, and the model that others begin with."""
    expected = {(name, split): bits(denoisers, name, split) for name, split in product((BEST, LAST), SPLITS)}
    assert_apart(expected.values(), 0.005)
    settings = settings_of(denoisers.folder, flags={"max-tokens": 200})
    found = evaluations.denoising(denoisers.models.run, settings, CPU)
    wanted = {"loss": expected[BEST, "test"], "valid_loss": expected[BEST, "valid"]}
    assert found == pytest.approx(wanted, abs=2e-3)
    best, kept = (runs.load(denoisers.models.run / name)["model"] for name in (BEST, "model/model.pt"))
    assert runs.same_bits(best, kept)
