"""fairseq's commands, run in processes of their own."""

import subprocess
import sys

from scripts.recipes.recipe import ROOT

PLUGIN = ROOT / "fairseq_sam"
# fairseq drops a last batch whose size is no multiple of this, which is 8 by default: up to 7 sentences of a test set.
ALL_INSTANCES = ("--required-batch-size-multiple", "1")


class CommandError(RuntimeError):
    """A command failed, or did not print what it should."""


def fairseq_command(command: str, *words: object) -> str:
    """Run a command of fairseq's with the plugin and return all it prints.

    Args:
        command: its module, such as ``eval_lm``.
        words: its command line.

    Raises:
        CommandError: with the end of its output, if it fails.
    """
    line = [sys.executable, "-m", f"fairseq_cli.{command}", *map(str, words), "--user-dir", str(PLUGIN)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        end = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise CommandError(f"fairseq-{command.replace('_', '-')} failed:\n{end}")
    return done.stdout + done.stderr
