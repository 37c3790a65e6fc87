"""The set-up script: what it refuses, how it resumes, what it advises. Nothing is installed and nothing is fetched."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "user_dir_setup.py"

UNREACHABLE = """\
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken by \
'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to establish a new \
connection: [Errno -3] Temporary failure in name resolution')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)
ERROR: No matching distribution found for torch==2.13.0
"""
NO_SUCH_VERSION = """\
ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: 2.0.0, 2.0.1, 2.1.0)
ERROR: No matching distribution found for torch==2.13.0
"""
DISK_FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
NO_HEADERS = """\
      fairseq/clib/libbase/balanced_assignment.cpp:16: fatal error: Python.h: No such file or directory
      error: command '/usr/bin/g++' failed with exit code 1
ERROR: Failed building wheel for fairseq-fixed
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> ModuleType:
    """The script, with a copy of the project in an empty folder as its root."""
    spec = importlib.util.spec_from_file_location("user_dir_setup", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "a project"
    (root / "fairseq_sam").mkdir(parents=True)
    (root / "pyproject.toml").write_text(SCRIPT.with_name("pyproject.toml").read_text())
    for name, value in {"ROOT": root, "USER_DIR": root / "fairseq_sam", "DEMO": root / "examples/demo/run.py"}.items():
        monkeypatch.setattr(module, name, value)
    return module


class Machine:
    """Stands in for pip and the environment's Python: it notes commands and pretends their effect."""

    def __init__(self, script: ModuleType, torch: str = "2.13.0+cpu"):
        self.script = script
        self.commands: list[str] = []
        self.versions = dict.fromkeys(("pip", "torch", "fairseq", "fairseq-fixed", *script.SHOWN_PACKAGES))
        self.versions |= dict.fromkeys(script.TEST_PACKAGES)
        self.index = {"": torch, "cuda-index": "2.13.0+cu126"}
        self.python = (3, 11, 7)
        self.plugin: str | None = None
        self.interrupt_at: str | None = None

    def works(self, environment) -> bool:
        return environment.python.is_file() and environment.python.read_text() == "works"

    def probe(self, environment):
        torch = self.versions["torch"] or ""
        cuda = "12.6" if "+cu" in torch else None
        site_packages = str(environment.path / "lib")
        return self.script.Facts(self.python, "/include", site_packages, dict(self.versions), cuda, self.plugin)

    def run(self, label, command, log) -> str:
        words = " ".join(command)
        if self.interrupt_at and self.interrupt_at in words:
            raise KeyboardInterrupt
        assert log.is_file() or "-m venv" in words
        self.commands.append(words)
        if "-m venv" in words:
            scripts = Path(command[-1]) / "bin"
            scripts.mkdir()
            (scripts / "python").write_text("works")
            (scripts.parent / "pyvenv.cfg").touch()
            self.versions["pip"] = "23.2.1"
        elif "uninstall" in words:
            self.versions["torch"] = None
        elif f"torch=={self.script.TORCH_VERSION}" in words:
            self.versions["torch"] = self.index["cuda-index" if "--index-url cuda-index" in words else ""]
        elif "fairseq-fixed==" in words:
            self.versions["fairseq-fixed"] = "0.12.3.1"
        elif " -e " in words:
            self.plugin = str(self.script.USER_DIR / "__init__.py")
            names = {*self.script.SHOWN_PACKAGES, *(self.script.TEST_PACKAGES if "test]" in words else ())}
            self.versions.update(dict.fromkeys(names - {"curvlinops-for-pytorch"}, "1.0"))
        elif "--no-deps" in words and "curvlinops-for-pytorch" in words:
            self.versions["curvlinops-for-pytorch"] = "1.0"
        return ""

    def count(self, words: str) -> int:
        """How many of the commands so far contain the words."""
        return sum(words in command for command in self.commands)


@pytest.fixture
def machine(script, monkeypatch) -> Machine:
    """A machine on which the script can set up without installing anything."""
    machine = Machine(script)
    monkeypatch.setattr(script, "probe", machine.probe)
    monkeypatch.setattr(script, "run_logged", machine.run)
    monkeypatch.setattr(script, "build_problem", lambda include: None)
    monkeypatch.setattr(script, "check_plugin", lambda environment: {"plugin": "1.0", "gpus": []})
    monkeypatch.setattr(script.Environment, "works", lambda environment: machine.works(environment))
    return machine


# --- What it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 18), (3, 14, 0)])
def test_unsupported_python_is_named_with_the_supported_range(script, version):
    problem = script.python_problem(version, "/usr/bin/python3")
    found = ".".join(map(str, version))
    assert re.search(
        rf"Python {re.escape(found)} \(/usr/bin/python3\) is too {'new' if version[1] > 13 else 'old'}", problem
    )
    assert "3.11 to 3.13" in problem


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 11, 0), (3, 13, 9)])
def test_supported_python_is_accepted(script, version):
    assert script.python_problem(version) is None


def test_unsupported_python_ends_every_command(script, machine, monkeypatch, capsys):
    monkeypatch.setattr(script, "python_problem", lambda version, executable="": "Python 3.9.18 is too old.")
    for command in ("setup", "check", "demo", "test"):
        assert script.main([command]) == 1
        assert "3.9.18" in capsys.readouterr().err
    assert machine.commands == []


def test_syntax_is_old_enough_to_give_that_message():
    import ast

    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_missing_compiler_stops_before_anything_is_made(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert script.find_compiler() is None
    assert script.main(["setup"]) == 1
    message = capsys.readouterr().err
    for words in ("No C++ compiler", "apt install g++", "dnf install gcc-c++", "xcode-select"):
        assert words in message
    assert not (script.ROOT / ".venv").exists()


def test_compiler_named_by_cxx_is_found_and_one_that_fails_is_not(script, monkeypatch, tmp_path):
    compiler = tmp_path / "my compiler"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", f"'{compiler}' -std=c++17")
    for status, expected in ((0, (str(compiler), "mine 1.0")), (1, None)):
        compiler.write_text(f"#!/bin/sh\necho mine 1.0\nexit {status}\n")
        compiler.chmod(0o755)
        assert script.find_compiler() == expected


def test_missing_headers_are_named(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "find_compiler", lambda: ("/usr/bin/c++", "c++ 12"))
    assert "python3-dev" in script.build_problem(str(tmp_path))
    (tmp_path / "Python.h").touch()
    assert script.build_problem(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (UNREACHABLE, "PIP_INDEX_URL"),
        ("ProxyError('Cannot connect to proxy.')", "HTTPS_PROXY"),
        (NO_SUCH_VERSION, "has no such version"),
        (DISK_FULL, "disk is full"),
        (NO_HEADERS, "python3-dev"),
        (UNREACHABLE + DISK_FULL, "disk is full"),
        ("error: command 'g++' failed: No such file or directory", "apt install g++"),
    ],
)
def test_output_of_pip_is_turned_into_advice(script, output, words):
    assert words in script.diagnose(output)


def test_unknown_failures_and_old_warnings_give_no_advice(script):
    assert script.diagnose("Successfully installed nothing") is None
    assert script.diagnose(UNREACHABLE + "compiling\n" * 100) is None


def test_environment_module_missing(script, machine, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name))
    assert script.main(["setup"]) == 1
    assert "python3-venv" in capsys.readouterr().err


# --- Set-up and resuming -----------------------------------------------------------------------------------------


def test_setup_installs_in_order_and_a_second_one_does_nothing(script, machine, capsys):
    assert script.main(["setup"]) == 0
    order = ("-m venv", "setuptools>=77", "torch==2.13.0", "fairseq-fixed==0.12.3.1", " -e ", "import_user_module")
    assert len(machine.commands) == len(order)
    for command, words in zip(machine.commands, order, strict=True):
        assert words in command
    for command in machine.commands[3:5]:
        assert "--no-build-isolation -c" in command
    assert (script.ROOT / ".venv" / "setup-constraints.txt").read_text() == "torch==2.13.0+cpu\n"
    assert f"--user-dir '{script.USER_DIR}'" in capsys.readouterr().out
    assert script.main(["setup"]) == 0
    assert len(machine.commands) == len(order)


@pytest.mark.parametrize(
    "place", ["-m venv", "setuptools>=77", "torch==", "fairseq-fixed==", " -e ", "import_user_module"]
)
def test_interrupted_setup_leaves_no_stamp_and_continues(script, machine, place, capsys):
    machine.interrupt_at = place
    assert script.main(["setup"]) == 130
    assert "interrupted; run the same command again to continue" in capsys.readouterr().err
    assert not (script.ROOT / ".venv" / "setup-stamp.json").exists()
    machine.interrupt_at = None
    assert script.main(["setup"]) == 0
    assert (script.ROOT / ".venv" / "setup-stamp.json").exists()
    for once in ("-m venv", "torch==2.13.0", "fairseq-fixed=="):
        assert machine.count(once) == 1


def test_stale_stamp_does_not_survive_an_interrupted_update(script, machine):
    script.main(["setup"])
    machine.versions["sacrebleu"] = None
    machine.interrupt_at = " -e "
    assert script.main(["setup"]) == 130
    assert not (script.ROOT / ".venv" / "setup-stamp.json").exists()


def test_broken_environment_is_made_again(script, machine, capsys):
    venv = script.ROOT / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("half an interpreter")
    (venv / "pyvenv.cfg").touch()
    (venv / "left over").touch()
    assert script.main(["setup"]) == 0
    assert machine.count("-m venv") == 1
    assert not (venv / "left over").exists()
    assert "made again" in capsys.readouterr().out


def test_real_environments_are_told_from_broken_ones(script, tmp_path):
    environment = script.Environment(tmp_path)
    assert not environment.works()
    environment.scripts.mkdir()
    environment.python.write_text("half an interpreter")
    environment.python.chmod(0o755)
    assert not environment.works()
    for status in (1, 0):
        environment.python.write_text(f"#!/bin/sh\nexit {status}\n")
        assert environment.works() == (status == 0)


@pytest.mark.parametrize("names", [["thesis.tex"], ["bin", "lib"], ["setup.log", "src"]])
def test_folder_that_is_no_environment_is_not_removed(script, machine, tmp_path, names, capsys):
    folder = tmp_path / "home"
    for name in names:
        (folder / name).mkdir(parents=True)
    assert script.main(["setup", "--venv", str(folder)]) == 1
    assert "--venv" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_copied_environment_is_made_again(script, machine):
    script.main(["setup"])
    (script.ROOT / ".venv").rename(script.ROOT / "copy")
    assert script.main(["setup", "--venv", str(script.ROOT / "copy")]) == 0
    assert machine.count("-m venv") == 2


def test_half_installed_packages_are_forgotten(script, tmp_path):
    # An interrupted installation of torch left just these: RECORD is the wheel's own until pip rewrites it.
    unpacked = ["METADATA", "RECORD", "WHEEL"]
    for name, files in {"torch-2": unpacked, "numpy-2": [*unpacked, "INSTALLER"]}.items():
        for file in files:
            path = tmp_path / f"{name}.dist-info" / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
    (tmp_path / "~orch").mkdir()
    assert script.remove_half_installed(tmp_path) == ["torch-2.dist-info", "~orch"]
    assert sorted(path.name for path in tmp_path.glob("*.dist-info")) == ["numpy-2.dist-info"]


def test_stamp_follows_pyproject_python_and_extras(script, machine):
    script.main(["setup"])
    before = script.stamp_digest((3, 11, 7))
    assert script.stamp_digest((3, 12, 1)) != before
    with (script.ROOT / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert script.stamp_digest((3, 11, 7)) != before
    script.main(["setup"])
    assert machine.count(" -e ") == 2
    # The extras are told by the stamp: tools that happen to be there need not be all of them.
    machine.versions |= dict.fromkeys(script.TEST_PACKAGES, "1.0")
    script.set_up(script.parse(["test"]), extras=("test",))
    assert machine.count("test]") == 1
    # A plain set-up is content with the larger one, and one that has to run keeps the extras.
    script.main(["setup"])
    assert machine.count(" -e ") == 3
    machine.versions["numpy"] = None
    script.main(["setup"])
    assert machine.count("test]") == 2


def test_suitable_torch_is_kept_and_an_old_one_is_not(script, machine):
    script.main(["setup"])
    for version, num_installs in (("2.6.1", 1), ("2.20.0", 1), ("2.5.1", 2)):
        machine.versions |= {"torch": version, "numpy": None}
        assert script.main(["setup"]) == 0
        assert machine.count("torch==2.13.0") == num_installs


def test_python_3_10_gets_its_fairseq_and_an_older_pip(script, machine):
    assert script.wanted_fairseq((3, 10, 13)) == ("fairseq", "0.12.2")
    assert script.wanted_fairseq((3, 13, 0)) == ("fairseq-fixed", "0.12.3.1")
    machine.python = (3, 10, 13)
    machine.interrupt_at = "torch=="
    script.main(["setup"])
    assert machine.count("pip<24.1") == 1


# --- CUDA --------------------------------------------------------------------------------------------------------


def test_cuda_refuses_a_cpu_build_before_fairseq_is_compiled(script, machine, capsys):
    assert script.main(["setup", "--cuda"]) == 1
    message = capsys.readouterr().err
    assert "torch 2.13.0+cpu is a CPU build" in message
    assert "--cuda --torch-index URL" in message
    assert machine.count("fairseq-fixed==") == 0
    assert script.main(["setup"]) == 0
    assert script.main(["setup", "--cuda"]) == 1
    assert (script.ROOT / ".venv" / "setup-stamp.json").exists()
    assert script.main(["check", "--cuda"]) == 1


def test_torch_index_replaces_a_cpu_build_and_only_torch_uses_it(script, machine):
    script.main(["setup"])
    assert script.main(["setup", "--cuda", "--torch-index", "cuda-index"]) == 0
    assert machine.versions["torch"] == "2.13.0+cu126"
    assert machine.count("uninstall") == 1
    assert machine.count("cuda-index") == 1
    assert script.main(["check", "--cuda"]) == 0


# --- Commands ----------------------------------------------------------------------------------------------------


def test_check_before_set_up_names_setup(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "build_problem", lambda include: None)
    assert script.main(["check"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"is not there yet: run `.*user_dir_setup\.py'? setup`", output)
    assert str(script.USER_DIR) in output
    assert not (script.ROOT / ".venv").exists()


def test_check_names_what_is_missing(script, machine, capsys):
    script.main(["setup"])
    assert script.main(["check"]) == 0
    output = capsys.readouterr().out
    assert "All is well" in output
    assert "CPU build" in output
    machine.versions["subword-nmt"] = None
    machine.plugin = "/elsewhere/fairseq_sam/__init__.py"
    assert script.main(["check"]) == 1
    output = capsys.readouterr().out
    assert "subword-nmt is not installed" in output
    assert "found: /elsewhere" in output


def test_check_tells_when_the_plugin_does_not_load(script, machine, monkeypatch, capsys):
    def fail(environment):
        raise script.SetupError("the plugin does not load:\nImportError: libtorch")

    script.main(["setup"])
    monkeypatch.setattr(script, "check_plugin", fail)
    assert script.main(["check"]) == 1
    assert "ImportError: libtorch" in capsys.readouterr().out


def test_demo_passes_arguments_on(script, machine, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: calls.append(command) or 7)
    assert script.main(["demo", "--steps", "3"]) == 1
    assert "run.py is missing" in capsys.readouterr().err
    script.DEMO.parent.mkdir(parents=True)
    script.DEMO.touch()
    assert script.main(["demo", "--steps", "3"]) == 7
    assert calls == [[str(script.ROOT / ".venv/bin/python"), str(script.DEMO), "--steps", "3"]]


@pytest.mark.parametrize(
    ("arguments", "words"), [([], ["scripts.check"]), (["-k", "a b"], ["pytest", "-k", "a b"])], ids=["all", "some"]
)
@pytest.mark.parametrize("status", [0, 1])
def test_test_runs_all_checks_or_what_is_asked(script, machine, monkeypatch, arguments, words, status):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: calls.append((command, cwd)) or status)
    assert script.main(["test", *arguments]) == status
    assert calls == [([str(script.ROOT / ".venv/bin/python"), "-m", *words], str(script.ROOT))]
    assert machine.count("[docs,test]") == 1


def test_arguments(script, capsys):
    assert script.parse(["check"]) == ("check", script.ROOT / ".venv", False, None, [])
    options = script.parse(["test", "--cuda", "tests/core", "-k", "sam", "--venv", "~/there", "--", "--cuda"])
    assert options.passed_on == ["tests/core", "-k", "sam", "--cuda"]
    assert options.cuda
    assert options.venv == Path.home() / "there"
    for wrong in (["setup", "now"], ["check", "--fast"], ["install"], []):
        with pytest.raises(SystemExit) as caught:
            script.parse(wrong)
        assert caught.value.code == 2


# --- Running commands --------------------------------------------------------------------------------------------


def test_failed_step_shows_the_end_of_the_output_and_the_cure(script, tmp_path, capsys):
    log = tmp_path / "setup.log"
    log.write_text(DISK_FULL)
    program = f"print({UNREACHABLE!r}); raise SystemExit(1)"
    with pytest.raises(script.SetupError) as caught:
        script.run_logged("[3/6] installing torch", [sys.executable, "-c", program], log)
    for words in ("[3/6] installing torch", "No matching distribution found", "PIP_INDEX_URL", str(log)):
        assert words in str(caught.value)
    assert "disk" not in str(caught.value)
    assert "FAILED" in capsys.readouterr().out


def test_long_step_shows_that_it_is_alive(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "SECONDS_BETWEEN_LINES", 1)
    program = "import time; print('compiling', flush=True); time.sleep(1.6)"
    script.run_logged("[4/6] fairseq", [sys.executable, "-c", program], tmp_path / "setup.log")
    assert re.search(r"\[4/6\] fairseq \.\.\.\n( +\d+ s: compiling\n)+ +done \(\d+ s\)", capsys.readouterr().out)


@pytest.mark.skipif(os.name == "nt", reason="process groups are a POSIX matter")
def test_interrupt_ends_what_pip_has_started(script, monkeypatch, tmp_path):
    mark = tmp_path / "process id"
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    program = (
        "import subprocess, sys, pathlib, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )

    def interrupt(ticker, line):
        if mark.exists() and mark.read_text():
            # Time for the child to get past its first line; else the interrupt ends it by itself.
            time.sleep(0.3)
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Ticker, "tick", interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.run_logged("pip", [sys.executable, "-c", program], tmp_path / "setup.log")
    for _ in range(50):
        if not is_running(int(mark.read_text())):
            return
        time.sleep(0.1)
    os.kill(int(mark.read_text()), signal.SIGKILL)
    pytest.fail("the grandchild outlived the interrupt")


def is_running(process_id: int) -> bool:
    """Whether the process exists and is no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process_id)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_probe_reads_a_real_environment(script, tmp_path):
    environment = script.Environment(tmp_path)
    environment.python = Path(sys.executable)
    facts = script.probe(environment)
    assert facts.python == tuple(sys.version_info[:3])
    assert facts.versions["pytest"] == pytest.__version__
    torch = pytest.importorskip("torch")
    assert facts.cuda == torch.version.cuda


def test_the_check_looks_for_every_method(script):
    pytest.importorskip("torch")
    from fairseq_sam import PRESETS

    assert script.OPTIMIZERS == tuple(PRESETS)
