"""Turn termination signals into exceptions in the main thread, so that temporary files and locks are removed."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

REPEAT_SECONDS = 5.0
"""Launchers may send SIGTERM more than once; a repeat within this time must not interrupt the cleanup."""

_depth = 0
"""How many nested `postponed_signals` blocks the main thread is in."""
_pending: KeyboardInterrupt | SystemExit | None = None


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt or SystemExit on signals that end a process; yields the list of those received.

    Ignored signals stay ignored (`nohup`), and handlers that a calling program has installed stay in place.
    """
    received: list[int] = []
    last = -math.inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        is_repeated, last = time.monotonic() - last < REPEAT_SECONDS, time.monotonic()
        received.append(number)
        if is_repeated and number != signal.SIGINT:
            return
        _raise(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in map(int, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def postponed_signals() -> Iterator[None]:
    """Defer the exceptions of `signals_as_exceptions` to the end of the body, which must be short.

    For calls that create something to be removed later: an exception before the result is stored would leave it behind.
    """
    global _depth, _pending
    if threading.current_thread() is not threading.main_thread():  # Python runs signal handlers in the main thread only
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0 and _pending is not None:
            error, _pending = _pending, None
            raise error


def _raise(error: KeyboardInterrupt | SystemExit) -> None:
    global _pending
    if _depth == 0:
        raise error
    _pending = error
