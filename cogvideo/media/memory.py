"""The memory limit of the process that runs FFmpeg. It has no effect in others, and none without /proc.

It grows with what a file is entitled to: at first with its size, then with that of its frames.
"""

import resource

_confined = False


def confine() -> None:
    """From now on `allow_memory` limits this process."""
    global _confined
    _confined = data_bytes() > 0


def allow_memory(extra: int) -> None:
    """Let this process allocate `extra` bytes in all since the last `lift_memory_limit`; more is a MemoryError."""
    global _start
    if _confined:
        _start = data_bytes() if _start is None else _start
        _limit(_start + extra)


def lift_memory_limit() -> None:
    global _start
    if _confined:
        _start = None
        _limit(resource.RLIM_INFINITY)


def data_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA bounds; 0 where it cannot be found."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmData:")), 0)
    except OSError:
        return 0


_start: int | None = None


def _limit(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
