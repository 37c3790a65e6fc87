"""The snippets of examples/README.md make corpora of their originals, here small made-up ones."""

import json
import re

import pytest

from scripts.recipes.recipe import EXAMPLES

README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^(\w+): [^\n]*\n\n```python\n(.*?)```", README, re.S | re.M)
SPLITS = ("train", "dev", "test")
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
STS = ("test-gold", "test-gs", "sts-en-test-gs-2014", "test_evaluation_task2a", "sts2016-english-with-gs-v1.0")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def write_imdb(folder):
    texts = {"neg/10_1": "bad\tfilm\x85.<br />x", "neg/2_4": "é", "pos/0_9": '"good"', "pos/3_10": ""}
    for split in ("train", "test"):
        for name, text in texts.items():
            write(folder / "aclImdb" / split / f"{name}.txt", f"{split} {text}")
    write(folder / "aclImdb" / "train" / "unsup" / "0_0.txt", "not read")


def write_mrpc(folder):
    rows = [MRPC, "1\t11\t12\tA .\tB .", '0\t21\t22\t" C\tD "', "1\t12\t11\tE\tF\x85g"]
    write(folder / "msr_paraphrase_train.txt", "\ufeff" + "".join(f"{row}\r\n" for row in rows))
    write(folder / "mrpc_dev_ids.tsv", "21\t22\n99\t98\n")


def write_aeslc(folder):
    annotations = "\n\n@ann0\none\n\n@ann1\ntwo"
    for split in SPLITS:
        place = folder / "AESLC" / "enron_subject_line" / split
        write(place / "a_1.subject", f"Hi {split},\n\nsee you.\n\n@subject\nMeeting")
        write(place / "a.subject", "Yes.\n\n@subject\nRe: é" + (annotations if split != "train" else ""))


def write_sts(folder):
    for name in STS:
        prefix = "STS2016" if "2016" in name else "STS"
        pairs = 'a b\tc "d\r\nunscored\tpair\r\ne\tf\thttp://x\thttp://y\r\n'
        write(folder / name / f"{prefix}.input.surprise.OnWN.txt", pairs)
        write(folder / name / f"{prefix}.gs.surprise.OnWN.txt", "4.50\n\n0\n")
        write(folder / name / f"{prefix}.gs.ALL.txt", "4.50\n\n0\n")


def rows_of_imdb(split):
    negative = f"0\t4\t2\t{split} é\n0\t1\t10\t{split} bad film\x85.<br />x\n"
    return f'{negative}1\t9\t0\t{split} "good"\n1\t10\t3\t{split} \n'


ORIGINALS = {"IMDB": write_imdb, "MRPC": write_mrpc, "AESLC": write_aeslc, "STS": write_sts}
SCORED = 'task\tscore\tsentence1\tsentence2\nsurprise.OnWN\t4.50\ta b\tc "d\nsurprise.OnWN\t0\te\tf\n'
EXPECTED = {
    "IMDB": {f"imdb/{split}.tsv": rows_of_imdb(split) for split in ("train", "test")},
    "MRPC": {
        "glue/MRPC/train.tsv": f"{MRPC}\n1\t11\t12\tA .\tB .\n1\t12\t11\tE\tF\x85g\n",
        "glue/MRPC/dev.tsv": f'{MRPC}\n0\t21\t22\t" C\tD "\n',
    },
    "AESLC": {
        f"aeslc/{split}.jsonl": [
            {"id": "a", "body": "Yes.", "subject": "Re: é"},
            {"id": "a_1", "body": f"Hi {split},\n\nsee you.", "subject": "Meeting"},
        ]
        for split in SPLITS
    },
    "STS": {f"sts/STS{year}.tsv": SCORED for year in range(12, 17)},
}


@pytest.mark.parametrize(("name", "code"), SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_snippets(name, code, tmp_path, monkeypatch):
    """A snippet is run beside the originals; what it writes has their rows, in the order of their numbers or names."""
    ORIGINALS[name](tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {})
    corpora = tmp_path / "corpora"
    written = [path for path in corpora.rglob("*") if path.is_file()]
    found = {str(path.relative_to(corpora)): path.read_bytes().decode() for path in written}
    if name == "AESLC":
        found = {path: [json.loads(line) for line in text.splitlines()] for path, text in found.items()}
    assert found == EXPECTED[name]


def test_every_snippet_is_run():
    assert [name for name, _ in SNIPPETS] == list(ORIGINALS)
    assert README.count("```python") == len(SNIPPETS)
