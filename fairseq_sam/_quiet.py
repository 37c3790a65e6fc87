"""Imports without what libraries say of packages that are not installed and of their own deprecations."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep libraries from writing to standard error; warnings of other kinds and errors are shown as ever.

    The root logger stays as it was: a module of fairseq sets it to show every library's debugging messages.
    """
    root, before = logging.root, logging.root.manager.disable
    level, handlers = root.level, root.handlers[:]
    logging.disable(max(before, logging.INFO))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        logging.disable(before)
