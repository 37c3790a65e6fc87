"""Interrupts and signals that wait for what must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block is left, where a Python function handles them.

    A signal that ends the process at once still does. In threads other than the main one Python handles none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[Any, int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handled = {number: handler for number, handler in handlers.items() if callable(handler)}

    def wait(number: int, frame: FrameType | None) -> None:
        pending.append((handled[signal.Signals(number)], number, frame))

    try:
        for number in handled:
            signal.signal(number, wait)
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for handler, arrived, frame in pending:
            handler(arrived, frame)
