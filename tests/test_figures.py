"""The committed figures are those of the commands beside them."""

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("fairseq")

from fairseq_sam.__main__ import COMMANDS, main
from fairseq_sam.commands import common, options, settings

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
TEXT = (FIGURES / "README.md").read_text(encoding="utf-8")
LINES = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("fairseq-sam ")
]
FOLDERS = sorted(path.name for path in FIGURES.iterdir() if path.is_dir())


class FlagsError(Exception):
    """Raised instead of running a command, with its flags."""


def test_each_folder_has_a_command():
    assert sorted(words[words.index("--out") + 1] for words in LINES) == FOLDERS


@pytest.mark.parametrize("words", LINES, ids=lambda words: words[words.index("--out") + 1])
def test_the_command_has_the_flags_of_the_tables(monkeypatch, words):
    folder, command = FIGURES / words[words.index("--out") + 1], words[1]
    (run,) = json.loads((folder / f"{command}.json").read_text(encoding="utf-8"))["runs"]
    assert command in COMMANDS and all(measured["finished"] for measured in run["measured"])
    parse = options.Parser.parse_args

    def parse_args(self, arguments):
        raise FlagsError(parse(self, arguments))

    monkeypatch.setattr(options.Parser, "parse_args", parse_args)
    monkeypatch.setattr(common, "run", lambda command, arguments: command(arguments))
    with pytest.raises(FlagsError) as found:
        main(words[1:])
    flags = vars(found.value.args[0])
    given = {name for name in flags if f"--{name.replace('_', '-')}" in words} - {*settings.NO_SETTINGS}
    assert given or command == "gradients", "which has no flags"
    for name in given - {"before"}:  # a path
        assert json.loads(json.dumps(flags[name])) == run["flags"][name], name
    names = [measured["name"] for measured in run["measured"]]
    assert flags.get("names") == names
    assert list(folder.glob("*.png")) and list(folder.glob("*.tsv"))
    assert "/tmp" not in (folder / f"{command}.json").read_text(encoding="utf-8")
