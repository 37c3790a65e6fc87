"""RoBERTa from fairseq's own folder and from one of Hugging Face: prepared, loaded, and read as it was pretrained."""

import subprocess
from argparse import Namespace

import pytest

pytest.importorskip("fairseq", reason="recipes run fairseq's commands")

import torch
from fairseq.tasks.masked_lm import MaskedLMTask
from fairseq.trainer import Trainer
from fairseq_cli.train import main

from scripts.recipes.encoders import prepare_encoder
from scripts.recipes.jobs import Job
from scripts.recipes.recipe import read_recipe
from scripts.recipes.runner import preparation
from tests.adapter import pretrained, runs
from tests.recipes import glue_files
from tests.recipes.test_examples import SMALLER

WORDS = "encoder.sentence_encoder.embed_tokens.weight"


def write_fairseq_roberta(folder):
    """As its authors publish it: an old checkpoint, whose encoder is called decoder, beside GPT-2's subwords."""
    glue_files.write_gpt2(folder)
    sizes = [word for key, value in SMALLER.items() for word in (f"--encoder-{key}", str(value))]
    flags = [str(folder), "--arch", "roberta", "--task", "masked_lm", "--criterion", "masked_lm", *sizes]
    cfg = runs.configuration([*flags, "--optimizer", "adam", "--tokens-per-sample", "512", "--max-positions", "512"])
    task = MaskedLMTask.setup_task(cfg.task)
    weights = task.build_model(cfg.model).state_dict()
    state = {name.replace("encoder.", "decoder.", 1): weight for name, weight in weights.items()}
    history = [{"criterion_name": "MaskedLmLoss", "optimizer_name": "FairseqAdam", "num_updates": 5,
                "lr_scheduler_state": {"best": None}}]  # fmt: skip
    args = Namespace(**vars(cfg.model), **{"arch": "roberta"} if "arch" not in vars(cfg.model) else {})
    checkpoint = {"args": args, "model": state, "optimizer_history": history, "extra_state": {"epoch": 1}}
    torch.save(checkpoint, folder / "model.pt")
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders by kind."""
    place = tmp_path_factory.mktemp("encoders")
    (place / "fairseq").mkdir()
    pretrained.write_original(place / "hugging_face", "roberta", max_position_embeddings=514)
    return {"fairseq": write_fairseq_roberta(place / "fairseq"), "hugging_face": place / "hugging_face"}


@pytest.mark.parametrize("column", ["MRPC", "WiC"])
@pytest.mark.parametrize("kind", ["fairseq", "hugging_face"])
def test_roberta(kind, column, encoders, tmp_path, in_this_process, monkeypatch):
    """The recipe's own flags of RoBERTa load the encoder, and put <s> first and </s></s> between two sentences."""
    data = glue_files.write_task(tmp_path / "data" / ("glue" if column == "MRPC" else "superglue"), column).parent
    recipe = read_recipe("fsam_table1_roberta_large", "paper", column, {"encoder": str(encoders[kind])})
    job = Job(recipe, "SAM", 1, tmp_path / "out", cpu=True)
    subprocess.run(preparation(recipe, data, tmp_path / "out"), check=True)
    command = job.training()
    own = command[command.index("fairseq_cli.train") + 1 :]
    sizes = [word for key, value in SMALLER.items() for word in (f"--encoder-{key}", str(value))]
    seen, original = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, *args, **own: seen.append(self) or original(self, *args))
    job.run.mkdir(parents=True)
    with runs.quiet():
        main(runs.configuration([*own, *sizes, "--max-update", "1", "--no-save", "--disable-validation"]))
    trainer = seen[0]
    wanted = runs.load(job.data / "encoder" / "model.pt")["model"]
    wanted = wanted.get(WORDS, wanted.get(WORDS.replace("encoder.", "decoder.", 1)))
    torch.testing.assert_close(trainer.model.state_dict()[WORDS], wanted, rtol=0.0, atol=1e-4)
    row = trainer.task.dataset("train")[0]["net_input.src_tokens"].tolist()
    middle = row.index(2)
    assert (row[0], row[-1], row.count(2), row[middle + 1]) == (0, 2, 3, 2)
    assert 3 not in row, "unknown tokens"


def test_a_converted_folder_is_taken_as_it_is(encoders, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    split = prepare_encoder(str(encoders["hugging_face"]), first)
    again = prepare_encoder(str(first), second)
    assert split(["the bank runs"]) == again(["the bank runs"])
    assert (second / "model.pt").resolve() == (first / "model.pt").resolve()
    prepare_encoder(str(first), second)  # once more, over what is there


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("notes.txt",), r"must hold config\.json \(Hugging Face\) or model\.pt \(fairseq\); it has notes\.txt"),
        ((), "it has nothing"),
        (("model.pt",), r"no dict\.txt; put dict\.txt, encoder\.json, vocab\.bpe beside it"),
        (("model.pt", "dict.txt", "encoder.json"), r"no vocab\.bpe"),
    ],
)
def test_incomplete_folders_are_named(names, message, tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(ValueError, match=message):
        prepare_encoder(str(folder), tmp_path / "out")
    with pytest.raises(ValueError, match="there is no folder"):
        prepare_encoder(str(tmp_path / "nowhere"), tmp_path / "out")
