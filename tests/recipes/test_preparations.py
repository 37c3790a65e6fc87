"""What the preparations of the sequence-to-sequence recipes read, and how their runs are scored."""

import importlib.util
import json
import sys

import pytest

pytest.importorskip("fairseq", reason="evaluations run fairseq's commands")

from scripts.recipes import evaluations, glue, runner
from scripts.recipes.jobs import data_folder
from scripts.recipes.recipe import EXAMPLES, read_recipe
from scripts.recipes.text import CorpusError
from tests.recipes import corpora, glue_files


def preparation(name):
    """The module of a recipe's prepare.py."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", EXAMPLES / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_text_for_pretraining(tmp_path):
    prepare = preparation("bart_small")
    with pytest.raises(CorpusError, match="has none of the folders aeslc, imdb, wikitext2_partial"):
        prepare.read_documents(tmp_path)
    corpora.write_wikitext(tmp_path)
    documents = prepare.read_documents(tmp_path)
    assert len(documents) == 30 and documents == prepare.read_documents(tmp_path)
    assert not any("<unk>" in text or "=" in text for text in documents) and all(
        " 0.7 . " in text for text in documents
    )
    corpora.write_aeslc(tmp_path)
    corpora.write_imdb(tmp_path)
    assert len(prepare.read_documents(tmp_path)) == 30 + 60 + 80
    assert not any("<br" in text or "\n" in text for text in prepare.read_documents(tmp_path))
    assert list(prepare.cut([list("abcde"), list("fg"), []], 2)) == [["a", "b"], ["c", "d"], ["e"], ["f", "g"]]


def test_too_little_text_for_pretraining(tmp_path, monkeypatch):
    """A model of less text would be another one under the same name."""
    prepare = preparation("bart_small")
    (tmp_path / "imdb").mkdir()
    reviews = "".join(f"1\t9\t{number}\tA film about {number} numbers.\n" for number in range(30))
    (tmp_path / "imdb" / "train.tsv").write_text(reviews)
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--num-held-out", "5", "--num-train", "100"]
    monkeypatch.setattr("sys.argv", ["prepare.py", *words])
    message = (
        r"wants 100 documents, but imdb in --data \S+ have only 20; add aeslc and wikitext2_partial, or .*num_train=20"
    )
    with pytest.raises(SystemExit, match=message):
        prepare.main()
    assert not (tmp_path / "out").exists()


def test_summaries(tmp_path):
    prepare = preparation("delta_sam_table3_cnndm")
    corpora.write_aeslc(tmp_path)
    pairs = prepare.read_emails(tmp_path / "aeslc", "train.jsonl")
    assert len(pairs) == 59 and all(body.startswith(subject) for body, subject in pairs)
    few = prepare.sampled(pairs, 10)
    assert len(few) == 10 and few == prepare.sampled(pairs, 10) and set(few) < set(prepare.sampled(pairs, 20))
    assert prepare.sampled(pairs, None) == pairs
    corpora.write_summaries(tmp_path, "xsum")
    assert len(prepare.read_sides(tmp_path / "xsum", "val")) == 11


@pytest.mark.parametrize("line", ['{"subject": "A"}', '["body", "subject"]', '{"body": 1, "subject": "A"}', "{"])
def test_damaged_emails(tmp_path, line):
    whole = '{"body": "A long text", "subject": "Short"}'
    (tmp_path / "train.jsonl").write_text(f"{whole}\n{line}\n", encoding="utf-8")
    message = r"train\.jsonl, line 2: expected an object with texts named body and subject, got "
    with pytest.raises(CorpusError, match=message):
        preparation("delta_sam_table3_cnndm").read_emails(tmp_path, "train.jsonl")


def test_corrections_of_jfleg(tmp_path):
    prepare = preparation("fsam_table2_conll")
    corpora.write_jfleg(tmp_path)
    splits = prepare.read_jfleg(tmp_path / "jfleg", tmp_path, 10)
    assert [len(pairs) for pairs in splits.values()] == [30 * 4, 10 * 4, 12]
    assert not {source for source, _ in splits["train"]} & {source for source, _ in splits["valid"]}
    assert all(target.split()[:-2] == source.split()[:-2] for source, target in splits["train"])
    assert len({target for _, target in splits["train"][:4]}) == 4
    with pytest.raises(CorpusError, match=r"--num-valid must be in 1\.\.39, got 40"):
        prepare.read_jfleg(tmp_path / "jfleg", tmp_path, 40)
    settings = {"data": str(tmp_path), "evaluation": {}}
    sources = [source for source, _ in splits["test"]]
    found = score(tmp_path, settings, "correction", [target for _, target in splits["test"]], sources)
    assert 50 < found["gleu"] < 100  # right by one of four
    assert score(tmp_path, settings, "correction", sources, sources)["gleu"] < found["gleu"]


def test_corrections_of_conll(tmp_path):
    prepare = preparation("fsam_table2_conll")
    corpora.write_conll(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    splits = prepare.read_conll(tmp_path / "conll2014", out)
    assert [len(pairs) for pairs in splits.values()] == [40, 12, 12]
    sources = [source for source, _ in splits["test"]]
    right = [source.replace("plott", "plot") for source in sources]
    settings = {"data": str(out), "evaluation": {}}
    assert score(tmp_path, settings, "correction", right, sources) == {"precision": 100, "recall": 100, "f0.5": 100}
    half = [*right[:6], *sources[6:]]
    assert score(tmp_path, settings, "correction", half, sources)["recall"] == pytest.approx(50)
    (tmp_path / "conll2014" / "test.m2").unlink()
    with pytest.raises(CorpusError, match=r"has no test\.m2"):
        prepare.read_conll(tmp_path / "conll2014", out)


def test_a_task_without_a_training_file(tmp_path):
    prepare, task = preparation("sam_language_models_table1"), glue.TASKS["BoolQ"]
    with pytest.raises(ValueError, match=r"neither superglue nor glue in --data .* has a folder BoolQ"):
        prepare.read_task(task, tmp_path, 4, 1)
    glue_files.write_task(tmp_path / "superglue", "BoolQ", num_train=24, num_valid=13)
    both = prepare.read_task(task, tmp_path, 4, 1)
    assert {split: len(found) for split, found in both.items()} == {"train": 24, "valid": 13}
    (tmp_path / "superglue" / "BoolQ" / "train.jsonl").unlink()
    divided = prepare.read_task(task, tmp_path, 4, 1)
    assert len(divided["train"]) == 9 and len(divided["valid"]) == 4
    assert sorted(divided["train"] + divided["valid"]) == sorted(both["valid"])
    with pytest.raises(ValueError, match=r"has no train\.jsonl"):
        prepare.read_task(task, tmp_path, 0, 1)
    (tmp_path / "superglue" / "RTE").mkdir()  # as SuperGLUE's archive has it
    (tmp_path / "superglue" / "RTE" / "val.jsonl").write_text("{}\n")
    glue_files.write_task(tmp_path / "glue", "RTE", num_train=9, num_valid=5)
    rte = prepare.read_task(glue.TASKS["RTE"], tmp_path, 0, 1)
    assert {split: len(found) for split, found in rte.items()} == {"train": 9, "valid": 5}
    glue_files.write_task(tmp_path / "glue", "MNLI")
    assert list(prepare.read_task(glue.TASKS["MNLI"], tmp_path, 0, 1)) == ["train", "valid", "valid1"]


def score(run, settings, name, lines, sources=(), targets=()):
    """What an evaluation makes of generated lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations, "generate", lambda *arguments: (list(lines), list(targets), list(sources)))
        return evaluations.EVALUATIONS[name](run, settings, [])


def test_rouge_by_sentence(tmp_path):
    """Summary-level ROUGE-L takes each sentence on its own: their order does not count."""
    settings = {"data": str(tmp_path), "evaluation": {}}
    wanted, found = "The cat sat. A dog ran!", "A dog ran! The cat sat."
    scores = score(tmp_path, settings, "summarisation", [found], targets=[wanted])
    assert scores["rouge1"] == scores["rougeLsum"] == 100 > scores["rougeL"]
    assert (tmp_path / "generated.txt").read_text() == f"{found}\n"


def test_the_evaluation_of_a_mixture(tmp_path):
    parts = [("cola", "CoLA", ["1", "0"]), ("rte", "RTE", ["entailment", "not_entailment"])]
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    lines = ["acceptable", "unacceptable", "entailment", "entailment"]
    scores = score(tmp_path, {"data": str(tmp_path), "evaluation": {"beam": 1}}, "mixture", lines)
    assert scores == {"cola_matthews": 100, "rte_accuracy": 50, "average": 75}


@pytest.mark.slow
def test_the_layout_of_the_paper(tmp_path, monkeypatch, capsys):
    """CNN/DailyMail's files and the folder of fairseq's BART, with GPT-2's subwords."""
    corpora.write_summaries(tmp_path, "cnn_dm")
    (tmp_path / "models" / "bart.large").mkdir(parents=True)
    glue_files.write_gpt2(tmp_path / "models" / "bart.large")
    (tmp_path / "models" / "bart.large" / "model.pt").touch()
    recipe = read_recipe("delta_sam_table3_cnndm", "paper", changed={"model": str(tmp_path / "models")})
    monkeypatch.setattr(sys, "argv", runner.preparation(recipe, tmp_path, tmp_path / "out")[1:])
    preparation(recipe.name).main()
    assert capsys.readouterr().out == "train: 39 pairs, valid: 11 pairs, test: 11 pairs\n"
    data = data_folder(recipe, tmp_path / "out")
    assert (data / "data-bin" / "test.source-target.target.bin").stat().st_size > 0
    assert (data / "model" / "vocab.bpe").exists() and (data / "subwords" / "train.source").read_text()[0].isdigit()
