"""Interrupts a call at any line or bytecode that chosen files execute."""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ENGINE = Path(__file__).resolve().parents[1] / "fairseq_sam" / "core"
ADAPTER = ENGINE.parent / "adapter"
FILES = (str(ENGINE), str(ADAPTER), contextlib.__file__)
ERRORS = {
    "exception": lambda: RuntimeError("boom"),
    "interrupt": lambda: None,  # a SIGINT, as Ctrl-C sends
    "out of memory": lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "SIGTERM": lambda: None,  # its handler raises SystemExit
}
RAISED = (RuntimeError, KeyboardInterrupt, SystemExit)

Place = tuple[str, int]  # file and line, or offset of the bytecode


class _Tracer:
    """Counts places as they are executed, and raises at one of them. Python stops tracing when a tracer raises."""

    def __init__(self, event: str, at: int | None, error: str) -> None:
        self.event, self.at, self.error = event, at, error
        self.seen: list[Place] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> "_Tracer | None":
        if not frame.f_code.co_filename.startswith(FILES):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        if event == self.event:
            where = frame.f_lineno if event == "line" else (frame.f_code.co_firstlineno << 16) + frame.f_lasti
            self.seen.append((frame.f_code.co_filename, where))
            if len(self.seen) - 1 == self.at:
                self._interrupt()
        return self

    def _interrupt(self) -> None:
        error = ERRORS[self.error]()
        if error is not None:
            raise error
        sys.settrace(None)
        os.kill(os.getpid(), signal.SIGINT if self.error == "interrupt" else signal.SIGTERM)


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def trace(call: Callable[[], Any], event: str = "line", at: int | None = None, error: str = "exception") -> list[Place]:
    """Run `call`, interrupted by `error` at the `at`-th place that it executes; returns the places.

    Raises:
        BaseException: what the interruption raised, unless the call dealt with it.
    """
    tracer, before = _Tracer(event, at, error), sys.gettrace()
    gc.disable()  # what an earlier interruption left is not closed meanwhile: errors in there would be ignored
    with _handlers():
        sys.settrace(tracer)
        try:
            call()
        finally:
            sys.settrace(before)
            gc.enable()
    return tracer.seen


def first_and_last(seen: Sequence[Place]) -> list[int]:
    """Where each place is executed for the first and for the last time."""
    first = {place: number for number, place in reversed(list(enumerate(seen)))}
    last = {place: number for number, place in enumerate(seen)}
    return sorted({*first.values(), *last.values()})
