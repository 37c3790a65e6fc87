#!/usr/bin/env python3
# ruff: noqa: UP006, UP035
# The lists are typed through `typing`: an old Python must get as far as the message that names the supported ones.
"""Sets up an environment for the plugin, checks it, and runs the demo and the tests.

    python3 user_dir_setup.py setup            makes .venv beside this file and installs everything into it
    python3 user_dir_setup.py check            says which versions are there, what is missing and how to mend it
    python3 user_dir_setup.py demo [ARGS]      set-up, then examples/demo/run.py with ARGS
    python3 user_dir_setup.py test [ARGS]      set-up, then all checks of scripts/check.py; with ARGS, pytest ARGS

A finished set-up is recognised and takes about a second; an interrupted one continues with the same command. Only the
standard library is needed to start it.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent
USER_DIR = ROOT / "fairseq_sam"
DEMO = ROOT / "examples" / "demo" / "run.py"
OPTIMIZERS = (
    "sam", "asam", "layer_sam", "multistep_defense", "ga_sam", "efficient_sam", "msam", "fisher_sam", "esam", "gsam",
    "delta_sam", "instance_sam", "random_sam", "model_perturbation", "awp", "look_sam", "freelb",
)  # fmt: skip

OLDEST_PYTHON = (3, 10)
OLDEST_TESTED_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)

# The newest release that the plugin was tested with. Left open, every new release of torch would be fetched here, with
# gigabytes of CUDA libraries, before anybody has tried the plugin with it. A torch that is already there and that
# pyproject.toml allows is kept.
TORCH_VERSION = "2.13.0"
# fairseq is compiled in the environment itself (--no-build-isolation), so what its build imports must be there.
BUILD_REQUIREMENTS = ("setuptools>=77", "wheel", "cython", "numpy")
# fairseq 0.12.2 asks for omegaconf 2.0, whose metadata pip 24.1 and newer refuse.
BUILD_REQUIREMENTS_PYTHON_3_10 = ("pip<24.1",)
SHOWN_PACKAGES = (
    "hessian-eigenthings", "hydra-core", "omegaconf", "numpy", "matplotlib", "PyYAML", "rouge-score", "sacrebleu",
    "sacremoses", "safetensors", "scikit-learn", "scipy", "sentencepiece", "subword-nmt", "tokenizers",
)  # fmt: skip
TEST_PACKAGES = (
    "curvlinops-for-pytorch", "fairscale", "mkdocs-material", "pytest", "pytest-xdist", "hypothesis",
    "pytorch_optimizer", "ruff", "mypy", "transformers",
)  # fmt: skip
# curvlinops, whose Hessian tests compare with, asks for backpack, which asks for torchvision, whose newest release
# replaces torch. None of them is needed for it, so that these come without what they ask for.
TEST_PACKAGES_ALONE = (
    "curvlinops-for-pytorch>=3", "backpack-for-pytorch>=1.7", "einconv>=0.1", "einops>=0.8", "linear_operator>=0.6",
    "opt_einsum>=3.4", "unfoldNd>=0.2",
)  # fmt: skip

NUM_STEPS = 6
SECONDS_BETWEEN_LINES = 20
# An environment with a CPU build of torch takes 1.4 GB, pip's temporary files come on top.
LEAST_FREE_GIGABYTES = 3.0

SPACE_NEEDED = "An environment takes about 2 GB with a CPU build of torch and about 8 GB with a CUDA build."
SPACE_CURE = "The disk is full. " + SPACE_NEEDED
COMPILER_CURE = """fairseq is compiled during the installation, which needs a C++ compiler:
  Debian, Ubuntu   sudo apt install g++
  Fedora           sudo dnf install gcc-c++
  macOS            xcode-select --install
A compiler elsewhere can be named by the environment variable CXX."""
HEADERS_CURE = """fairseq is compiled during the installation, which needs the headers of Python (Python.h):
  Debian, Ubuntu   sudo apt install python3-dev
  Fedora           sudo dnf install python3-devel
  macOS            brew install python"""
INDEX_CURE = """The package index could not be reached. Check the network, the proxy (HTTPS_PROXY) and PIP_INDEX_URL;
then run the same command again, it continues where it stopped."""
NOT_FOUND_CURE = """The package index answered but has no such version for this Python and platform.
Check PIP_INDEX_URL, or use another Python."""
MEMORY_CURE = "The compiler was killed, most likely for lack of memory. Close other programs and run the command again."
VENV_CURE = """This Python cannot make virtual environments (its modules venv and ensurepip are incomplete):
  Debian, Ubuntu   sudo apt install python3-venv"""

# Each cure with what tells in pip's output that it is needed. The order matters: pip reports what went wrong last as
# the failure, and a full disk or a missing header also ends in "could not build".
CURES = (
    (SPACE_CURE, r"No space left on device|Disk quota exceeded|\[Errno 28\]|\[Errno 122\]"),
    (HEADERS_CURE, r"Python\.h: No such file|'Python\.h' file not found"),
    (MEMORY_CURE, r"Killed signal terminated program"),
    (COMPILER_CURE, r"error: command '\S*(?:g\+\+|gcc|cc|c\+\+|clang\+?\+?)' failed: No such file|No C\+\+ compiler"),
    (NOT_FOUND_CURE, r"Could not find a version that satisfies.*\(from versions: \d"),
    (
        INDEX_CURE,
        r"NewConnectionError|Failed to establish a new connection|Temporary failure in name resolution|"
        r"Name or service not known|ConnectTimeoutError|ReadTimeoutError|Read timed out|ProxyError|"
        r"Max retries exceeded|CERTIFICATE_VERIFY_FAILED|Connection (?:refused|reset)|Network is unreachable|"
        r"(?:40[137]|50[234]) (?:Client|Server) Error|\(from versions: none\)",
    ),
)

# Runs in the environment with -I: neither the working directory nor PYTHONPATH may pass for what is installed. torch's
# build is read from its version file since importing torch takes seconds.
PROBE = r"""
import importlib.metadata, importlib.util, json, pathlib, re, sys, sysconfig
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
cuda = None
torch = importlib.util.find_spec("torch")
if torch is not None and torch.origin:
    text = pathlib.Path(torch.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.M)
    cuda = found.group(1) if found else None
plugin = importlib.util.find_spec("fairseq_sam")
print(json.dumps({
    "python": list(sys.version_info[:3]),
    "include": sysconfig.get_config_var("INCLUDEPY") or sysconfig.get_paths()["include"],
    "site_packages": sysconfig.get_paths()["purelib"],
    "versions": versions,
    "cuda": cuda,
    "plugin": plugin.origin if plugin is not None else None,
}))
"""

PLUGIN_CHECK = r"""
import json, sys
from argparse import Namespace
import torch, fairseq, fairseq.optim, fairseq.utils
fairseq.utils.import_user_module(Namespace(user_dir=sys.argv[1]))
missing = [name for name in sys.argv[2:] if name not in fairseq.optim.OPTIMIZER_REGISTRY]
if missing:
    sys.exit("fairseq does not know these optimizers after loading the plugin: " + ", ".join(missing))
import fairseq_sam
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print("PLUGIN " + json.dumps({"plugin": fairseq_sam.__version__, "gpus": gpus}))
"""


class SetupError(Exception):
    """Something the user has to mend; the text says what it is and how."""


class Options(NamedTuple):
    """The command line."""

    command: str
    venv: Path
    cuda: bool
    torch_index: Optional[str]
    passed_on: List[str]

    def as_typed(self, command: str) -> str:
        """The command line that runs ``command`` with the same options, to be shown in advice."""
        same = os.path.realpath(shutil.which("python3") or "") == os.path.realpath(sys.executable)
        script = str(ROOT / "user_dir_setup.py")
        relative = os.path.relpath(script)
        words = ["python3" if same else sys.executable, script if relative.startswith("..") else relative, command]
        if self.venv != ROOT / ".venv":
            words += ["--venv", str(self.venv)]
        if self.cuda:
            words += ["--cuda"]
        return " ".join(shlex.quote(word) for word in words)


class Facts(NamedTuple):
    """What is installed in an environment."""

    python: Tuple[int, int, int]
    include: str
    site_packages: str
    versions: Dict[str, Optional[str]]
    cuda: Optional[str]
    plugin: Optional[str]


class Environment:
    """A virtual environment and the files that the set-up keeps in it."""

    def __init__(self, path: Path):
        self.path = path
        windows = os.name == "nt"
        self.scripts = path / ("Scripts" if windows else "bin")
        self.python = self.scripts / ("python.exe" if windows else "python")
        self.log = path / "setup.log"
        self.stamp = path / "setup-stamp.json"
        self.constraints = path / "setup-constraints.txt"

    def works(self) -> bool:
        """Whether its Python runs and has pip: an interrupted creation leaves one that does not."""
        try:
            command = [str(self.python), "-I", "-m", "pip", "--version"]
            return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
        except OSError:
            return False

    def is_ours_to_remove(self) -> bool:
        """Whether the folder is a virtual environment or one begun here, and not, say, a home folder."""
        names = {entry.name for entry in self.path.iterdir()}
        begun = {self.log.name, "bin", "include", "lib", "lib64", "Scripts", "Include", "Lib"}
        return "pyvenv.cfg" in names or not names or (self.log.name in names and names <= begun)

    def pip(self, *arguments: str) -> List[str]:
        """The command that runs pip in this environment."""
        return [str(self.python), "-m", "pip", *arguments]

    def pip_install(self, *arguments: str) -> List[str]:
        """The command that installs into this environment without asking anything."""
        return self.pip("install", "--no-input", "--disable-pip-version-check", *arguments)

    def activation(self) -> str:
        """The line that activates it in a shell."""
        if os.name == "nt":
            return str(self.scripts / "activate")
        return "source " + shlex.quote(str(self.scripts / "activate"))


# --- What is there -----------------------------------------------------------------------------------------------


def python_problem(version: Sequence[int], executable: str = sys.executable) -> Optional[str]:
    """Why this Python cannot be used, or None."""
    found = ".".join(str(part) for part in version[:3])
    if OLDEST_PYTHON <= tuple(version[:2]) <= NEWEST_PYTHON:
        return None
    kind = "old" if tuple(version[:2]) < OLDEST_PYTHON else "new: torch and fairseq were not tested with it"
    return (
        f"Python {found} ({executable}) is too {kind}.\n"
        "Supported are Python 3.11 to 3.13 (3.10 may work). Install one of them and start this with it, for example:\n"
        "  python3.12 user_dir_setup.py setup"
    )


def find_compiler() -> Optional[Tuple[str, str]]:
    """The C++ compiler's path and the first line of its version, or None."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(name)
        path = shutil.which(words[0]) if words else None
        if path is None:
            continue
        # macOS has a c++ that only offers to install the real one; running it tells them apart.
        command = [path, *words[1:], "--version"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if result.returncode == 0:
            return path, (result.stdout.splitlines() or [""])[0]
    return None


def build_problem(include: str) -> Optional[str]:
    """What keeps fairseq from being compiled, and the cure, or None."""
    if find_compiler() is None:
        return "No C++ compiler was found.\n" + COMPILER_CURE
    if not (Path(include) / "Python.h").is_file():
        return f"Python.h is not in {include}.\n{HEADERS_CURE}"
    return None


def project_requirements() -> Tuple[List[str], str]:
    """The requirements for fairseq and torch's oldest version, as pyproject.toml states them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    fairseq = re.findall(r'^\s*"(fairseq(?:-fixed)?==[^"]+)",', text, re.M)
    torch = re.search(r'^\s*"torch>=([\d.]+)', text, re.M)
    if not fairseq or torch is None:
        raise SetupError(f"{ROOT / 'pyproject.toml'} does not state the versions of fairseq and torch as expected.")
    return fairseq, torch.group(1)


def wanted_fairseq(python: Sequence[int]) -> Tuple[str, str]:
    """Name and version of the fairseq for this Python: 0.12.2 itself fails to import on 3.11 and newer."""
    name = "fairseq-fixed" if tuple(python[:2]) >= (3, 11) else "fairseq"
    for requirement in project_requirements()[0]:
        match = re.match(re.escape(name) + r"==([\w.]+)", requirement)
        if match:
            return name, match.group(1)
    raise SetupError(f"pyproject.toml has no requirement {name}==...")


def probe(environment: Environment) -> Facts:
    """Asks the environment's Python what is installed there, in a fraction of a second."""
    names = ("pip", "torch", "torchaudio", "fairseq", "fairseq-fixed", "fairseq_sam", *SHOWN_PACKAGES, *TEST_PACKAGES)
    command = [str(environment.python), "-I", "-c", PROBE, *names]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(f"{environment.python} does not work:\n{result.stderr.strip()}")
    facts = json.loads(result.stdout)
    facts["python"] = tuple(facts["python"])
    return Facts(**facts)


def numbers(version: str) -> Tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cpu`` gives ``(2, 13, 0)``."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def torch_problem(facts: Facts) -> Optional[str]:
    """Why the installed torch does not do, or None."""
    found, oldest = facts.versions["torch"], project_requirements()[1]
    if found is None:
        return "torch is not installed"
    return f"torch {found} is older than {oldest}" if numbers(found) < numbers(oldest) else None


def package_problems(facts: Facts, extras: Sequence[str]) -> List[str]:
    """What is missing or has the wrong version."""
    name, version = wanted_fairseq(facts.python)
    problems = [problem for problem in (torch_problem(facts),) if problem]
    if facts.versions[name] != version:
        problems.append(f"{name} {version} is not installed (found: {facts.versions[name] or 'none'})")
    for package in SHOWN_PACKAGES + (TEST_PACKAGES if "test" in extras else ()):
        if facts.versions[package] is None:
            problems.append(f"{package} is not installed")
    if facts.plugin is None or Path(facts.plugin).resolve().parent != USER_DIR:
        problems.append(f"`import fairseq_sam` does not find {USER_DIR} (found: {facts.plugin or 'none'})")
    return problems


def cuda_problem(facts: Facts, options: Options) -> Optional[str]:
    """Why ``--cuda`` is not met, or None."""
    if not options.cuda or facts.versions["torch"] is None or facts.cuda is not None:
        return None
    return (
        f"--cuda: the installed torch {facts.versions['torch']} is a CPU build.\n"
        "Name an index with CUDA builds of torch (PyTorch's site lists them) and this replaces it:\n"
        f"  {options.as_typed('setup')} --torch-index URL\n"
        "Without --cuda the CPU build is accepted."
    )


# --- The stamp ---------------------------------------------------------------------------------------------------


def stamp_digest(python: Sequence[int]) -> str:
    """Changes with everything that decides what a set-up installs, apart from the extras."""
    constants = (TORCH_VERSION, BUILD_REQUIREMENTS, BUILD_REQUIREMENTS_PYTHON_3_10, str(ROOT), list(python))
    text = (ROOT / "pyproject.toml").read_bytes() + repr(constants).encode()
    return hashlib.sha256(text).hexdigest()


def read_stamp(environment: Environment) -> Dict[str, Any]:
    """The stamp of the last finished set-up; empty without one."""
    try:
        stamp = json.loads(environment.stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(environment: Environment, python: Sequence[int], extras: Sequence[str]) -> None:
    """Records a finished set-up; renamed into place so that a half-written stamp cannot exist."""
    stamp = {"digest": stamp_digest(python), "extras": sorted(extras), "venv": str(environment.path)}
    temporary = environment.stamp.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp), encoding="utf-8")
    os.replace(str(temporary), str(environment.stamp))


def was_moved(environment: Environment) -> bool:
    """Whether the environment was copied or moved: its scripts then start the Python of the old place."""
    place = read_stamp(environment).get("venv")
    return place is not None and place != str(environment.path)


def is_set_up(environment: Environment, facts: Facts, extras: Sequence[str]) -> bool:
    """Whether a finished set-up with at least these extras is still what pyproject.toml and this file ask for."""
    stamp = read_stamp(environment)
    return (
        stamp.get("digest") == stamp_digest(facts.python)
        and set(extras) <= set(stamp.get("extras", []))
        and not was_moved(environment)
        and not package_problems(facts, extras)
    )


# --- Running commands --------------------------------------------------------------------------------------------


def diagnose(output: str) -> Optional[str]:
    """What the user can do about a failed step, judged by its output, or None."""
    # Earlier lines may be warnings about a connection that came back.
    end = "\n".join(output.splitlines()[-80:])
    for cure, pattern in CURES:
        if re.search(pattern, end):
            return cure
    return None


class Ticker:
    """Shows that a long step is alive: a running clock on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str):
        self.label = label
        self.begun = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.num_lines = 0
        if not self.terminal:
            print(f"{label} ...", flush=True)

    def seconds(self) -> int:
        """Seconds since the step began."""
        return int(time.monotonic() - self.begun)

    def tick(self, line: str) -> None:
        """Refreshes the clock and the step's last line of output; called several times a second."""
        if self.terminal:
            spinner = "|/-\\"[int(time.monotonic() * 4) % 4]
            text = f"{self.label} ... {spinner} {self.seconds()} s  {line}"
            print("\r" + text[: shutil.get_terminal_size().columns - 1] + "\x1b[K", end="", flush=True)
        elif self.seconds() >= SECONDS_BETWEEN_LINES * (self.num_lines + 1):
            self.num_lines += 1
            print(f"      {self.seconds()} s: {line[:90]}", flush=True)

    def finish(self, word: str) -> None:
        """Ends the step's line."""
        start = f"\r{self.label} ... " if self.terminal else "      "
        print(f"{start}{word} ({self.seconds()} s)" + ("\x1b[K" if self.terminal else ""), flush=True)


def last_line(log: Path, start: int) -> str:
    """The last line that was written to the log behind the position ``start``."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def end_process(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command and all it has started: politely, so that pip tidies up, then by force."""
    if os.name == "nt":
        process.kill()
        process.wait()
        return
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=10)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, ProcessLookupError):
        pass
    try:
        # What the command has started may outlive it, and would go on writing into the environment.
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_logged(label: str, command: Sequence[str], log: Path) -> str:
    """Runs a command with its output in the log and a sign of life on the screen.

    Args:
        label: what the screen says it is.
        command: the words of the command.
        log: file that the output is appended to.

    Returns:
        The command's output.

    Raises:
        SetupError: if it fails, with the end of its output and the cure where one is known.
    """
    ticker = Ticker(label)
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(shlex.quote(word) for word in command)}\n".encode())
        file.flush()
        start = file.tell()
        # A session of its own, so that an interrupt ends the compilers too and not only pip.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                ticker.tick(last_line(log, start))
        except BaseException:
            end_process(process)
            raise
    output = log.read_bytes()[start:].decode("utf-8", "replace")
    ticker.finish("done" if process.returncode == 0 else "FAILED")
    if process.returncode != 0:
        tail = "\n".join("  | " + line for line in output.splitlines()[-15:])
        cure = diagnose(output) or "The log may tell more."
        raise SetupError(f"This step failed: {label}\n{tail}\n{cure}\nThe whole log: {log}")
    return output


class Steps:
    """Numbers the steps of a set-up and runs them."""

    def __init__(self, log: Path):
        self.log = log
        self.number = 0

    def run(self, title: str, command: Sequence[str]) -> str:
        """Runs a command as the next step and returns its output."""
        self.number += 1
        return run_logged(f"[{self.number}/{NUM_STEPS}] {title}", command, self.log)

    def skip(self, title: str) -> None:
        """Counts a step that has nothing to do."""
        self.number += 1
        print(f"[{self.number}/{NUM_STEPS}] {title}", flush=True)


# --- Set-up ------------------------------------------------------------------------------------------------------


def make_environment(environment: Environment, steps: Steps) -> None:
    """Makes the virtual environment; replaces one that does not run, as an interrupted creation leaves it."""
    if environment.works() and not was_moved(environment):
        steps.skip(f"the environment is there: {environment.path}")
        return
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        raise SetupError(VENV_CURE)
    if environment.path.exists():
        remove_broken(environment)
    environment.path.mkdir(parents=True)
    # The log comes first: by it the next run knows that it may remove what an interrupted creation leaves.
    environment.log.touch()
    steps.run(f"making the environment {environment.path}", [sys.executable, "-m", "venv", str(environment.path)])
    if not environment.works():
        raise SetupError(f"The new environment has no working pip. {VENV_CURE}")


def remove_broken(environment: Environment) -> None:
    """Removes an environment that does not work, unless that could destroy something else."""
    if not environment.path.is_dir() or not environment.is_ours_to_remove():
        raise SetupError(f"{environment.path} exists and is no virtual environment; name another folder with --venv.")
    if Path(sys.prefix).resolve() == environment.path.resolve():
        raise SetupError(f"{environment.path} is broken and active; run `deactivate` and then this command again.")
    print(f"The environment {environment.path} does not work here (broken or moved); it is made again.", flush=True)
    shutil.rmtree(str(environment.path))


def remove_half_installed(site_packages: Path) -> List[str]:
    """Removes the records of packages whose installation was interrupted, so that pip installs them again.

    pip unpacks METADATA, by which it later takes a package for installed, some time before it makes the package's
    commands and then notes itself in INSTALLER. An interrupt in between leaves a package that looks installed and lacks
    its commands.
    """
    removed = []
    for folder in sorted(site_packages.glob("*.dist-info")) + sorted(site_packages.glob("~*")):
        whole = (folder / "INSTALLER").exists()
        if folder.is_dir() and (folder.name.startswith("~") or not whole):
            shutil.rmtree(str(folder))
            removed.append(folder.name)
    return removed


def check_before_installing(environment: Environment, facts: Facts) -> None:
    """Finds what would stop the installation after minutes.

    Raises:
        SetupError: if the environment's Python, the compiler or the headers do not do.
    """
    problem = python_problem(facts.python, str(environment.python))
    if problem is None and facts.versions[wanted_fairseq(facts.python)[0]] is None:
        problem = build_problem(facts.include)
    if problem is not None:
        raise SetupError(problem)
    if facts.python[:2] < OLDEST_TESTED_PYTHON:
        print("Python 3.10: the plugin is tested with 3.11 to 3.13; this may work or not.", flush=True)
    free = shutil.disk_usage(str(environment.path)).free / 1e9
    if facts.versions["torch"] is None and free < LEAST_FREE_GIGABYTES:
        print(f"Only {free:.1f} GB are free at {environment.path}. {SPACE_NEEDED}", flush=True)


def install_torch(environment: Environment, steps: Steps, options: Options) -> None:
    """Installs torch where it is missing, too old, or a CPU build that ``--cuda --torch-index`` replaces."""
    facts = probe(environment)
    refused = cuda_problem(facts, options)
    if torch_problem(facts) is None and (refused is None or options.torch_index is None):
        steps.skip(f"torch {facts.versions['torch']} is there")
    else:
        index = ["--index-url", options.torch_index] if options.torch_index is not None else []
        if refused is not None:
            # pip takes the CPU build for the wanted version: it differs only behind the plus sign.
            run_logged("      removing the CPU build of torch", environment.pip("uninstall", "-y", "torch"), steps.log)
        steps.run(f"installing torch {TORCH_VERSION}", environment.pip_install(*index, f"torch=={TORCH_VERSION}"))
        facts = probe(environment)
        refused = cuda_problem(facts, options)
    if refused is not None:
        raise SetupError(refused)
    # Later steps must not trade this torch for another: torchaudio, which fairseq asks for, could want to.
    environment.constraints.write_text(f"torch=={facts.versions['torch']}\n", encoding="utf-8")


def install_packages(environment: Environment, steps: Steps, options: Options, extras: Sequence[str]) -> None:
    """Installs everything into a working environment, what is there already excepted."""
    facts = probe(environment)
    old = BUILD_REQUIREMENTS_PYTHON_3_10 if facts.python[:2] < OLDEST_TESTED_PYTHON else ()
    steps.run("installing what builds need", environment.pip_install(*BUILD_REQUIREMENTS, *old))
    install_torch(environment, steps, options)
    # Without isolation: an isolated build fetches a second torch.
    here = ["--no-build-isolation", "-c", str(environment.constraints)]
    name, version = wanted_fairseq(facts.python)
    if facts.versions[name] == version:
        steps.skip(f"{name} {version} is there")
    else:
        title = f"installing {name} {version}, compiled here: about three minutes"
        steps.run(title, environment.pip_install(*here, f"{name}=={version}"))
    project = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
    steps.run("installing fairseq_sam and what recipes need", environment.pip_install(*here, "-e", project))
    if "test" in extras:
        alone = environment.pip_install("--no-deps", *TEST_PACKAGES_ALONE)
        run_logged("      installing what tests compare with", alone, steps.log)


def plugin_check_command(environment: Environment) -> List[str]:
    """The command that loads the plugin as ``--user-dir`` does and looks for its optimizers."""
    return [str(environment.python), "-c", PLUGIN_CHECK, str(USER_DIR), *OPTIMIZERS]


def install(environment: Environment, options: Options, extras: Sequence[str]) -> None:
    """Brings the environment to what is wanted; each step finds out by itself what is left to do."""
    steps = Steps(environment.log)
    begun = time.monotonic()
    if not environment.works():
        include = sysconfig.get_config_var("INCLUDEPY") or sysconfig.get_paths()["include"]
        problem = build_problem(include)
        if problem is not None:
            raise SetupError(problem)
    make_environment(environment, steps)
    extras = sorted(set(extras) | set(read_stamp(environment).get("extras", [])))
    if environment.stamp.exists():
        environment.stamp.unlink()
    remove_half_installed(Path(probe(environment).site_packages))
    facts = probe(environment)
    check_before_installing(environment, facts)
    install_packages(environment, steps, options, extras)
    steps.run("checking that fairseq finds the plugin", plugin_check_command(environment))
    problems = package_problems(probe(environment), extras)
    if problems:
        raise SetupError("The installation ended, but:\n  " + "\n  ".join(problems) + f"\nThe log: {environment.log}")
    write_stamp(environment, facts.python, extras)
    print(f"Set up in {int(time.monotonic() - begun)} s.")


def set_up(options: Options, extras: Sequence[str] = ()) -> Environment:
    """Makes sure that the environment is there and whole; a second call takes a moment.

    Raises:
        SetupError: with the cure, if it cannot be made.
    """
    environment = Environment(options.venv)
    if environment.works():
        facts = probe(environment)
        refused = cuda_problem(facts, options)
        if refused is not None and options.torch_index is None:
            raise SetupError(refused)
        if refused is None and is_set_up(environment, facts, extras):
            return environment
    install(environment, options, extras)
    return environment


def usage(environment: Environment) -> str:
    """What the user pastes to use the plugin."""
    return (
        f"Activate the environment:   {environment.activation()}\n"
        f"Then give fairseq-train:    --user-dir {shlex.quote(str(USER_DIR))} --optimizer ga_sam"
    )


# --- Commands ----------------------------------------------------------------------------------------------------


def run_setup(options: Options) -> int:
    """The command ``setup``."""
    environment = set_up(options)
    facts = probe(environment)
    name = wanted_fairseq(facts.python)[0]
    print(f"Ready: torch {facts.versions['torch']}, {name} {facts.versions[name]}.\n{usage(environment)}")
    return 0


def run_demo(options: Options) -> int:
    """The command ``demo``."""
    if not DEMO.is_file():
        raise SetupError(f"{DEMO} is missing from this copy of the project.")
    environment = set_up(options)
    return subprocess.call([str(environment.python), str(DEMO), *options.passed_on], cwd=str(ROOT))


def run_test(options: Options) -> int:
    """The command ``test``: what CI checks, or only the tests that the arguments name."""
    environment = set_up(options, extras=("docs", "test"))
    words = ["pytest", *options.passed_on] if options.passed_on else ["scripts.check"]
    return subprocess.call([str(environment.python), "-m", *words], cwd=str(ROOT))


def check_plugin(environment: Environment) -> Dict[str, Any]:
    """Loads the plugin in the environment.

    Raises:
        SetupError: with the end of the output, if the plugin cannot be loaded.
    """
    result = subprocess.run(
        plugin_check_command(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=str(environment.path),
    )
    answers = [line[len("PLUGIN ") :] for line in result.stdout.splitlines() if line.startswith("PLUGIN ")]
    if result.returncode != 0 or not answers:
        raise SetupError("the plugin does not load:\n" + "\n".join(result.stdout.splitlines()[-8:]))
    answer: Dict[str, Any] = json.loads(answers[-1])
    return answer


def show(name: str, value: Optional[str]) -> None:
    """Prints one line of the check."""
    print(f"  {name:<15}{value or 'missing'}", flush=True)


def show_versions(environment: Environment, facts: Facts) -> None:
    """Prints what is installed."""
    show("Python", f"{'.'.join(str(part) for part in facts.python)}  {environment.python}")
    show("pip", facts.versions["pip"])
    build = f"CUDA {facts.cuda} build" if facts.cuda else "CPU build"
    show("torch", facts.versions["torch"] and f"{facts.versions['torch']}  ({build})")
    name = wanted_fairseq(facts.python)[0]
    show(name, facts.versions[name])
    for package in SHOWN_PACKAGES:
        show(package, facts.versions[package])


def check_environment(environment: Environment, options: Options) -> List[str]:
    """Prints what is in the environment and returns what is wrong with it."""
    again = f"run `{options.as_typed('setup')}`"
    if not environment.works():
        show("Python", f"{sys.version.split()[0]}  {sys.executable}")
        show("environment", None)
        include = sysconfig.get_config_var("INCLUDEPY") or sysconfig.get_paths()["include"]
        problem = build_problem(include)
        state = "does not work" if environment.path.exists() else "is not there yet"
        return ([problem] if problem else []) + [f"The environment {environment.path} {state}: {again}"]
    facts = probe(environment)
    show_versions(environment, facts)
    problems = [text for text in (python_problem(facts.python, str(environment.python)),) if text]
    if problems:
        return problems
    missing = package_problems(facts, ())
    if missing:
        problems.append("; ".join(missing) + f": {again}")
    if facts.versions[wanted_fairseq(facts.python)[0]] is None:
        problems += [text for text in (build_problem(facts.include),) if text]
    problems += [text for text in (cuda_problem(facts, options),) if text]
    if not missing:
        problems += check_loading(environment, facts, again)
    return problems


def check_loading(environment: Environment, facts: Facts, again: str) -> List[str]:
    """Loads the plugin, prints what came of it and returns what is wrong."""
    try:
        answer = check_plugin(environment)
    except SetupError as error:
        show("fairseq_sam", "does not load")
        return [f"{error}\n{again[0].upper()}{again[1:]}"]
    show("fairseq_sam", f"{answer['plugin']}  registers {', '.join(OPTIMIZERS)}")
    show("GPUs", ", ".join(answer["gpus"]) or "none visible")
    if not is_set_up(environment, facts, ()):
        print(f"  (pyproject.toml or the set-up has changed since the last set-up: {again} to bring it up to date)")
    return []


def run_check(options: Options) -> int:
    """The command ``check``."""
    print("Found:")
    environment = Environment(options.venv)
    problems = check_environment(environment, options)
    compiler = find_compiler()
    show("C++ compiler", f"{compiler[1]}  {compiler[0]}" if compiler else None)
    print(usage(environment))
    if not problems:
        print("All is well.")
        return 0
    print("To mend:")
    for problem in problems:
        print("  - " + problem.replace("\n", "\n    "))
    return 1


# --- Command line ------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line; what demo and test do not know, and all behind ``--``, is passed on."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=("setup", "check", "demo", "test"))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR", help="default: .venv here")
    parser.add_argument("--cuda", action="store_true", help="insist on a CUDA build of torch")
    parser.add_argument(
        "--torch-index", metavar="URL", help="package index for torch alone; used when torch is installed"
    )
    known, unknown = parser.parse_known_args(words[:cut])
    passed_on = unknown + words[cut + 1 :]
    if passed_on and known.command in ("setup", "check"):
        parser.error(f"{known.command} does not know: {' '.join(passed_on)}")
    venv = Path(os.path.abspath(os.path.expanduser(str(known.venv))))
    return Options(known.command, venv, known.cuda, known.torch_index, passed_on)


def raise_interrupt(number: int, frame: Any) -> NoReturn:
    """Ends the program like Ctrl-C does, so that a running pip is not left behind."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    options = parse(arguments)
    commands = {"setup": run_setup, "check": run_check, "demo": run_demo, "test": run_test}
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), raise_interrupt)
    try:
        problem = python_problem(sys.version_info[:3])
        if problem is not None:
            raise SetupError(problem)
        return commands[options.command](options)
    except SetupError as error:
        sys.stdout.flush()
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (28, 122):
            raise
        print(f"\n{SPACE_CURE}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
