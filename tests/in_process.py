"""Python commands, run in this process: a new one takes seconds to import torch and fairseq."""

import contextlib
import io
import logging
import runpy
import subprocess
import sys
import threading
import warnings

import torch

_run = subprocess.run
_one_at_a_time = threading.RLock()  # of the threads in which a table's jobs run


def run(command, *, check=False, **options):
    """Stands in for ``subprocess.run`` where the command is a script or module for this Python; others run as ever."""
    words = [str(word) for word in command]
    if words[0] != sys.executable or words[1] == "-c":
        return _run(command, check=check, **options)
    out, err = io.StringIO(), io.StringIO()
    with _one_at_a_time, _as_a_process(words, out, err):
        status = _status_of(words, err)
    done = subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
    if check:
        done.check_returncode()
    return done


class Process:
    """Stands in for ``subprocess.Popen``, as far as recipes use it."""

    def __init__(self, command, stdout, **_):
        done = run(command)
        stdout.write((done.stdout + done.stderr).encode())
        self._status = done.returncode

    def wait(self):
        return self._status


def _status_of(words, err):
    try:
        if words[1] == "-m":
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=err)
            return 1
        return end.code or 0
    return 0


def _forget_the_best_score():
    """fairseq keeps it in an attribute of a function, where the next training would find it."""
    module = sys.modules.get("fairseq.checkpoint_utils")
    if module is not None:
        vars(module.save_checkpoint).pop("best", None)


@contextlib.contextmanager
def _as_a_process(words, out, err):
    """Its own arguments, output, log, warnings and random numbers."""
    root = logging.getLogger()
    loggers = [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]
    handlers = [(logger, logger.handlers[:]) for logger in loggers]
    level, path, argv = root.level, sys.path[:], sys.argv
    log = logging.StreamHandler(err)
    log.setFormatter(logging.Formatter("%(levelname)s | %(name)s | %(message)s"))
    _forget_the_best_score()
    try:
        root.handlers[:] = [log]
        root.setLevel(logging.INFO)
        sys.argv = words[2:] if words[1] == "-m" else words[1:]
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        _forget_the_best_score()
        sys.argv, sys.path[:] = argv, path
        root.setLevel(level)
        logging.disable(logging.NOTSET)
        for logger, before in handlers:
            logger.handlers[:] = before
        for logger in root.manager.loggerDict.values():
            if isinstance(logger, logging.Logger) and logger not in loggers:
                logger.handlers.clear()
