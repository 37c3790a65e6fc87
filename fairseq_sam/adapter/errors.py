"""Errors that a user can mend: their message says how, and is all that the command prints."""

import pickle
import sys
from types import TracebackType
from typing import NoReturn

EXIT_STATUS = 2  # as for what argparse refuses


class UserError(Exception):
    """Ends fairseq's commands with one line instead of a traceback, and with exit status 2."""


class ConfigurationError(UserError, ValueError):
    """A flag, a value or a combination that cannot work."""


class CheckpointError(UserError, pickle.UnpicklingError):
    """A checkpoint that cannot be read, or holds what no checkpoint should.

    Args:
        finding: what is wrong with it.
        advice: what to do in training; follows the finding.
    """

    def __init__(self, finding: str, advice: str = "") -> None:
        super().__init__(finding + advice)
        self.finding = finding


def show_user_errors_in_one_line() -> None:
    """Let Python print a ``UserError`` that nothing catches as one line. All others are shown as before."""
    original = sys.excepthook
    if getattr(original, "shows_one_line", False):
        return

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, UserError):
            end(error)
        original(kind, error, traceback)

    excepthook.shows_one_line = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook


def end(error: UserError) -> NoReturn:
    """Print the message and leave.

    Raises:
        SystemExit: with status 2.
    """
    print(f"fairseq_sam: error: {error}", file=sys.stderr)
    raise SystemExit(EXIT_STATUS)
