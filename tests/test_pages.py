"""The pages of docs/ say what is so: their snippets run, their commands and flags exist, what they list is all."""

import dataclasses
import functools
import os
import re
import shlex
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml

from fairseq_sam import PRESETS
from tests.pages import DOCS, LINKED, PAGES, ROOT, TEXT, blocks, needs_fairseq, prose

# -- the site ----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name functions of mkdocs."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def nav_of(part) -> Iterator[str]:
    for entry in part:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else nav_of(value)


def test_every_page_is_in_the_nav():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    listed = list(nav_of(config["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_the_index_links_to_every_page():
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", TEXT["index"]))
    others = {"index.md", "theory.md", "figures/README.md"}  # which analysis and gallery link to
    assert linked | others == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def headings(path: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    texts = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line).lower() for line in lines]  # of a link, its text
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


def test_links_name_headings_that_are_there():
    for page in LINKED:
        for target, anchor in re.findall(r"\]\(([^()\s:#]*)#([^()\s]+)\)", prose(page.read_text(encoding="utf-8"))):
            path = page.parent / target if target else page
            assert anchor in headings(path), f"{page.relative_to(ROOT)} links to {target}#{anchor}, which is not there"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs docs/requirements.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "repository" / "examples" / "demo" / "index.html").exists()
    results = (tmp_path / "results.html").read_text(encoding="utf-8")
    assert 'href="repository/examples/ga_sam_table1_imdb/index.html"' in results


# -- Python ------------------------------------------------------------------------------------------------------------


def test_the_python_of_the_readme_runs():
    model, data = torch.nn.Linear(3, 1), torch.ones(4, 3)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        loss = model(data).square().mean()
        loss.backward()
        return loss

    names: dict = {"torch": torch, "model": model, "closure": closure}
    (block,) = blocks("README", "python")
    exec(compile(block, "README.md", "exec"), names)
    assert names["sam"].last_step.num_passes == 2 and names["loss"] > 0
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_loop_in_plain_pytorch_runs(tmp_path, monkeypatch):
    """All of it in one process, which is the only worker."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    for key, value in {**place, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    seen = []
    for block in blocks("plain-pytorch", "python"):
        exec(compile(block, "plain-pytorch.md", "exec"), names)
        sam = names.get("sam")
        seen.append(None if sam is None else sam.last_step.num_passes)
    assert seen == [None, *[2.0] * (len(seen) - 1)] and len(seen) == 10
    assert names["delta"].last_step.num_forwards == 2 and names["sam"].num_updates == 1
    for attribute in re.findall(r"^\| `sam\.([\w.]+)` \|", TEXT["plain-pytorch"], re.MULTILINE):
        functools.reduce(getattr, attribute.split("."), names["sam"])


def test_code_of_the_walk_is_that_of_the_files():
    """Each line of the snippets is in the file that the walk is in."""
    places = ("fairseq_sam/core/method.py", "tests/reference.py", "fairseq_sam/core/scales.py")
    snippets = blocks("adding-a-method", "python")
    for snippet, place in zip(snippets, places, strict=True):
        source = [line.strip().rstrip(",") for line in (ROOT / place).read_text(encoding="utf-8").splitlines()]
        for line in snippet.splitlines():
            assert line.strip() in source, f"{place} has no line {line.strip()}"


def test_the_walk_names_tests_that_are_there():
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT["adding-a-method"]):
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(name: str) -> list[list[str]]:
    """Words of each command line of a page."""
    lines = "".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


def training_flags(words: Sequence[str]) -> list[str] | None:
    """What fairseq-train is given, if it is the command."""
    place = next((i for i, word in enumerate(words) if word in ("fairseq-train", "$(which fairseq-train)")), None)
    return None if place is None else list(words[place + 1 :])


TRAININGS = [
    (name, words)
    for name in PAGES
    for words in commands(name)
    if training_flags(words) is not None and "…" not in words  # which stands for a reader's own flags
]


@needs_fairseq
@pytest.mark.parametrize(("name", "words"), TRAININGS, ids=lambda value: value if isinstance(value, str) else "")
def test_training_commands_are_accepted(name, words):
    from fairseq_sam.adapter.config import check_config
    from tests.adapter import runs

    flags = training_flags(words)
    place = flags.index("--user-dir") + 1
    assert flags[place] == "$(python -m fairseq_sam path)"
    flags[place] = runs.PLUGIN
    cfg = runs.configuration(flags)
    check_config(cfg)
    assert cfg.optimizer._name in PRESETS


@needs_fairseq
def test_the_yaml_is_accepted():
    from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY

    from fairseq_sam.adapter.choices import check_base, method_of, rise_of

    (text,) = blocks("your-command", "yaml")
    section = yaml.safe_load(text)["optimizer"]
    name = section["_name"]
    keys = {field.name for field in dataclasses.fields(OPTIMIZER_DATACLASS_REGISTRY[name])}
    assert set(section) <= keys | {"_name"}
    cfg = Namespace(**{**dict.fromkeys(keys), **section})
    check_base(cfg)
    assert method_of(name, cfg).start_epoch == 2 and rise_of(name, cfg) == 0.01


def test_commands_of_the_gallery_made_the_figures():
    made = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("figures/README.md", "theory.md"))
    known = [shlex.split(line) for line in re.findall(r"^(fairseq-sam .*)$", made.replace("\\\n", " "), re.MULTILINE)]
    shown = commands("gallery")
    assert shown and all(words in known for words in shown)
    pictures = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT["gallery"]))
    assert pictures == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.png")}


def test_other_commands_are_known():
    for name in PAGES:
        for words in commands(name):
            if training_flags(words) is None:
                assert words[0] in ("fairseq-sam", "tensorboard", "source") or _is_script(words), words


def _is_script(words: Sequence[str]) -> bool:
    """Whether a command is one of ours, and its flags are in it."""
    if words[0] not in ("python", "python3"):
        return False
    path = ROOT / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
    text = path.read_text(encoding="utf-8")
    return all(f'"{word}"' in text for word in words[2:] if word.startswith("--"))


# -- flags -------------------------------------------------------------------------------------------------------------


@functools.cache
def known_flags() -> set[str]:
    """Flags of fairseq, of the plugin, of its scripts, of torchrun, pip and mkdocs."""
    import fairseq
    from torch.distributed.run import get_args_parser

    from fairseq_sam.adapter.flags import SAM_FLAGS, base_flags, base_names

    found = {"--strict", "--logdir"} | {f"--sam-{flag.name}" for flag in SAM_FLAGS}
    found |= {f"--{name}" for base in base_names() for name in base_flags(base)} | {"--base-optimizer"}
    found |= {option for action in get_args_parser()._actions for option in action.option_strings}
    folder = Path(fairseq.__file__).parent
    read = [folder / "options.py", folder / "dataclass" / "configs.py"]
    for place in ("criterions", "models", "tasks", "optim", "modules"):
        read += (folder / place).rglob("*.py")
    for place in ("fairseq_sam", "scripts", "benchmarks"):
        read += (ROOT / place).rglob("*.py")
    for path in [*read, ROOT / "user_dir_setup.py", *ROOT.glob("tests/conftest.py")]:
        text = path.read_text(encoding="utf-8", errors="replace")
        found |= set(re.findall(r"[\"'](--[a-z][\w-]+)[\"']", text))
        found |= {f"--{name}" for name in re.findall(r"^    (\w+): .*= (?:field|II)\(", text, re.MULTILINE)}
    return {flag.replace("_", "-") for flag in found}


@needs_fairseq
@pytest.mark.parametrize("name", PAGES)
def test_flags_exist(name):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w(?![\w-])", TEXT[name]))
    unknown = {flag for flag in named if flag.replace("_", "-") not in known_flags()}
    assert not unknown, unknown


@needs_fairseq
@pytest.mark.parametrize("name", PAGES)
def test_optimizers_exist(name):
    named = set(re.findall(r"--optimizer (\w+)", TEXT[name])) - {"NAME", "METHOD"}
    assert named <= {*PRESETS, "adam", "sgd"}, named


# -- what is logged and saved ------------------------------------------------------------------------------------------


class Writer:
    """In place of TensorBoard's: keeps the names of scalars by folder."""

    names: ClassVar[dict[str, set[str]]] = {}

    def __init__(self, folder: str) -> None:
        self._folder = os.path.basename(folder)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.names.setdefault(self._folder, set()).add(name)

    def add_text(self, *args: object) -> None: ...

    def flush(self) -> None: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every field: forward passes beside, and weights in half precision. Its checkpoint and its scalars."""
    pytest.importorskip("fairseq")
    from fairseq.logging import progress_bar

    from tests.adapter import runs

    folder = tmp_path_factory.mktemp("pages")
    data = runs.write_translation_data(folder)
    flags = [*runs.TRANSLATION, "--optimizer", "delta_sam", "--memory-efficient-bf16", "--max-update", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_bar, "SummaryWriter", Writer)
        patch.setattr(progress_bar, "_tensorboard_writers", {})
        patch.setattr(runs, "COMMON", runs.COMMON.replace("--disable-validation", ""))
        Writer.names = {}
        state = runs.train(data, folder / "run", *flags, "--log-interval", "1", "--tensorboard-logdir", str(folder))
    return Namespace(folder=folder / "run", state=state, scalars=Writer.names)


def test_fields_of_the_log_are_those_of_the_page(run):
    (table,) = re.findall(r"^\| field \|.*?\n\n", TEXT["watching"], re.MULTILINE | re.DOTALL)
    documented = set(re.findall(r"^\| `(sam_\w+)` \|", table, re.MULTILINE))
    for folder in ("train_inner", "train"):
        assert {name for name in run.scalars[folder] if name.startswith("sam_")} == documented
    assert not any(name.startswith("sam_") for name in run.scalars["valid"]) and "loss" in run.scalars["valid"]
    assert {*run.scalars} == {"train_inner", "train", "valid"}
    logs = [path for path in (ROOT / "fairseq_sam").rglob("*.py") if "metrics.log_scalar" in path.read_text("utf-8")]
    literals = {word for path in logs for word in re.findall(r'"(sam_[a-z]+)"', path.read_text(encoding="utf-8"))}
    assert literals == documented, "also what no run of this test logs"
    for page in PAGES:
        known = documented | {f"sam_{name}" for name in ("epsilon", "start_epoch")}
        assert set(re.findall(r"(?<![\w.`-])`?(sam_[a-z_]+)", TEXT[page])) <= known | {"sam_"}, page


def test_entries_of_a_checkpoint_are_those_of_the_page(run):
    page = TEXT["checkpoints"]
    own = page[page.index("| key | what |") : page.index("The last three")]
    documented = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", own, re.MULTILINE))))
    on_demand = {"component", "fisher", "search"}
    assert documented - on_demand == set(run.state["last_optimizer_state"]["sharpness_aware"])
    memory = (ROOT / "fairseq_sam" / "core" / "memory.py").read_text(encoding="utf-8")
    assert on_demand == set(re.findall(r'state\["(\w+)"\] = ', memory))
    entries = page[page.index("| entry | what |") : page.index("`last_optimizer_state[")]
    documented = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", entries, re.MULTILINE))))
    assert set(run.state) - {"criterion"} == documented


def test_code_of_the_page_on_checkpoints_runs(run, monkeypatch):
    import torch

    monkeypatch.chdir(run.folder.parent)
    for number in range(1, 6):
        (run.folder / f"checkpoint{number}.pt").write_bytes((run.folder / "checkpoint_last.pt").read_bytes())
    names: dict = {}
    before = torch.serialization.get_safe_globals()
    for block in blocks("checkpoints", "python"):
        exec(compile(block, "checkpoints.md", "exec"), names)
    added = set(torch.serialization.get_safe_globals()) - set(before)
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)
    assert names["state"]["model"].keys() == run.state["model"].keys() and len(added) == 1


# -- what is said of results -------------------------------------------------------------------------------------------


def test_no_method_has_beaten_its_baseline_by_more_than_chance():
    """docs/choosing.md says so; a result that changes this changes the page."""
    rows = [line.split(" | ") for line in (DOCS / "results.md").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row) >= 8 and ("↑" in row[2] or "↓" in row[2])]
    better = [row for row in rows if "↑" in row[2] and row[3] not in ("", " ") and float(row[3].lstrip("<")) < 0.05]
    assert len(rows) > 30 and not better, better
    worse = [row for row in rows if "↓" in row[2] and row[3].startswith("<0.001")]
    assert {"SAM", "FreeLB", "GA-SAM"} <= {row[0].lstrip("| ") for row in worse}, "the loss on En-Vi"
