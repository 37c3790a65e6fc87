"""Files that keep two processes from doing the same at once."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Wait until no other process holds the lock, and hold it; it is released when a process ends, however it does.

    Args:
        path: a file for the lock, which is made and stays.

    Yields:
        The file's descriptor; a child that inherits it holds the lock too, for as long as it lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
