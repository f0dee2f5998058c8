"""The limits on memory and processor time of the process that parses files (worker.py); the system enforces them.

The limits for a file grow with its size at first, then with that of its frames. Nothing here affects other processes,
and memory is not limited without /proc.
"""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_ERRORS = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.EFBIG)
"""System errors in the confined process that come from its own limits, and thus from the file that it parses."""

_is_confined = False
_start: int | None = None
_deadline: int | None = None
"""In seconds of processor time since this process began."""


def confine() -> None:
    """Enable the limits in this process; until then, the other functions set none."""
    global _is_confined
    _is_confined = True


def allow_memory(extra: int) -> None:
    """Let this process allocate `extra` bytes in all since the last `lift_memory_limit`; more is a MemoryError."""
    global _start
    if _is_confined and (used := data_bytes()):
        _start = used if _start is None else _start
        _set_limit(resource.RLIMIT_DATA, _start + extra)


def lift_memory_limit() -> None:
    global _start
    if _is_confined:
        _start = None
        _set_limit(resource.RLIMIT_DATA, resource.RLIM_INFINITY)


def allow_seconds(seconds: int) -> None:
    """Let this process use `seconds` more of processor time; beyond that, the system kills it."""
    global _deadline
    if _is_confined:
        _deadline = _used_seconds() + seconds
        _set_limit(resource.RLIMIT_CPU, _deadline)


@contextmanager
def within_seconds(seconds: int) -> Iterator[None]:
    """Let the `with` body use at most `seconds` of the processor time that is allowed."""
    if _is_confined and _deadline is not None:
        _set_limit(resource.RLIMIT_CPU, min(_deadline, _used_seconds() + seconds))
    try:
        yield
    finally:
        if _is_confined and _deadline is not None:
            _set_limit(resource.RLIMIT_CPU, _deadline)


def data_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA bounds; 0 where it cannot be found."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmData:")), 0)
    except OSError:
        return 0


def _used_seconds() -> int:
    """Processor time of this process, rounded up."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int(usage.ru_utime + usage.ru_stime) + 1


def _set_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
