"""Every recipe trains an update on generated corpora, with the settings of its mini size."""

import subprocess

import pytest

pytest.importorskip("fairseq", reason="recipes run fairseq's commands")

from fairseq.trainer import Trainer
from fairseq_cli.train import main

from scripts.recipes.jobs import Job, data_folder
from scripts.recipes.recipe import RecipeError, column_names, command_line, read_recipe, recipe_folders
from scripts.recipes.runner import preparation
from tests.adapter import pretrained, runs
from tests.recipes import corpora, glue_files, sts_files

FEWER = {
    "num_train": 40, "num_valid": 16, "num_test": 16, "num_lines": 40, "max_train": 24, "held_out": 6,
    "num_held_out": 10, "num_subwords": 120, "num_sentences": 24, "layers": 1,
}  # fmt: skip
GLUE = {"glue": ("MRPC", "CoLA", "STS-B", "SST-2", "RTE"), "superglue": ("BoolQ", "CB", "COPA", "WiC")}
SHORTER = {"tokens-per-sample": "16"}  # the generated Penn TreeBank is shorter than a batch of the real one
MINILM = {"layers": 6, "embed-dim": 384, "ffn-embed-dim": 1536, "attention-heads": 12}
SMALLER = {"layers": 2, "embed-dim": 24, "ffn-embed-dim": 40, "attention-heads": 4}  # as pretrained.SIZES


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    corpora.write_imdb(folder)
    corpora.write_ptb(folder)
    corpora.write_envi(folder)
    corpora.write_deen(folder)
    corpora.write_aeslc(folder)
    corpora.write_jfleg(folder)
    corpora.write_wikitext(folder)
    sts_files.write_sets(folder)
    for benchmark, tasks in GLUE.items():
        for task in tasks:
            glue_files.write_task(folder / benchmark, task, num_train=30)
    (folder / "superglue" / "BoolQ" / "train.jsonl").unlink()  # as where only the validation file is to be had
    bart = command_line(read_recipe("bart_small", "mini").methods["Adam"])
    corpora.write_pretrained(folder / "bart", *bart)
    pretrained.write_original(folder / "encoder", "bert", max_position_embeddings=512)
    return folder


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in recipe_folders()])
def test_one_update(name, data, out, in_this_process, monkeypatch):
    """Of the last method; recipes on the same data share its preparation, as in real runs."""
    column = column_names(name, "mini")[-1]
    options = read_recipe(name, "mini", column).options
    changed = {key: value for key, value in FEWER.items() if key in options}
    named = {"encoder": "encoder", "model": "bart"}
    changed |= {option: str(data / folder) for option, folder in named.items() if option in options}
    recipe = read_recipe(name, "mini", column, changed)
    job = Job(recipe, list(recipe.methods)[-1], 1, out, cpu=True)
    if not (job.data / "data-bin").exists():
        subprocess.run(preparation(recipe, data, out), check=True)
    command = job.training()
    own = command[command.index("fairseq_cli.train") + 1 :]
    flags = [*own, "--max-update", "1", "--no-save", "--disable-validation"]
    flags += [word for flag, value in SHORTER.items() if flag in job.flags for word in (f"--{flag}", value)]
    if "encoder" in options:
        of_encoder = {key: job.flags[f"encoder-{key}"] for key in MINILM}
        assert of_encoder == {**MINILM, **({"layers": options["layers"]} if "layers" in options else {})}
        smaller = {**SMALLER, **({"layers": changed["layers"]} if "layers" in options else {})}
        flags += [word for key, value in smaller.items() for word in (f"--encoder-{key}", str(value))]
    job.run.mkdir(parents=True, exist_ok=True)
    cfg, updates, original = runs.configuration(flags), [], Trainer.set_num_updates
    monkeypatch.setattr(Trainer, "set_num_updates", lambda self, n: updates.append(n) or original(self, n))
    with runs.quiet():
        main(cfg)
    assert max(updates) == 1


@pytest.mark.slow
def test_the_first_pairs_are_validated_and_tested_on(data, tmp_path, in_this_process):
    recipe = read_recipe("ga_sam_table1_deen", "mini", changed={"num_valid": 4, "num_test": 3})
    subprocess.run(preparation(recipe, data, tmp_path), check=True)
    for split, number in (("valid", 4), ("test", 3)):
        for language in ("de", "en"):
            whole = (data / "iwslt14_deen_partial" / f"{split}.{language}").read_text().splitlines()
            kept = (data_folder(recipe, tmp_path) / "text" / f"{split}.{language}").read_text().splitlines()
            assert kept == whole[:number] and len(whole) == 10
    assert "num_valid" not in read_recipe("ga_sam_table1_deen", "paper").options


def test_an_option_that_the_recipe_does_not_have():
    with pytest.raises(RecipeError, match=r"has no option 'num_words_' \(--set\)"):
        read_recipe("ga_sam_table1_imdb", "mini", changed={"num_words_": 5})
