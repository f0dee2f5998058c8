"""The logger and the progress bar of all commands, shown on rank 0 only.

Both write to stderr; commands print results to stdout. The rank is read from RANK, which every launcher sets.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

DISK_ADVICE = {
    errno.ENOSPC: "free some space, or choose a folder on another disk, and run the same command again",
    errno.EDQUOT: "your quota is used up: remove files, or choose a folder elsewhere, and run the same command again",
    errno.EFBIG: "raise the limit on file size (ulimit -f), or choose a folder on another file system",
    errno.EIO: "the disk fails to read or write: check it, or choose a folder on another disk",
    errno.EROFS: "choose a folder on a disk that is mounted for writing",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can('t|not) allocate memory|bad_alloc"
    r"|could not (create|execute) a (primitive|memory object)$",  # all that oneDNN says
    re.IGNORECASE,
)
"""Matches messages of torch and of C++ libraries that mean that memory is full."""
NO_THREAD = "can't start new thread"
"""Python's message when the limit on processes and threads is reached."""


def rank() -> int:
    """This process's rank, 0 outside a launcher; RANK is validated where processes connect."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def get_logger(name: str = "cogvideo") -> logging.Logger:
    """A logger that writes to stderr; ranks other than 0 only write errors, with their rank."""
    top = logging.getLogger("cogvideo")
    if not any(isinstance(handler, _StderrHandler) for handler in top.handlers):
        top.addHandler(_StderrHandler())
        top.propagate = False  # or our lines are printed twice if a library configures the root logger
    top.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    return top if name == "cogvideo" else top.getChild(name.removeprefix("cogvideo."))


def progress(
    work: Iterable[Any] | int | None,
    desc: str,
    unit: str = "it",
    *,
    initial: int = 0,
    seconds_between_lines: float = 10.0,
) -> tqdm:
    """A progress bar over an iterable, or over `work` steps (None: unknown) that the caller reports with `.update(n)`.

    On a terminal it is a live bar; elsewhere (a log file, a pipe) a plain line every `seconds_between_lines`; on ranks
    above 0 nothing. Use it as an iterator or a context manager; `.set_postfix_str(...)` adds text such as a loss.
    """
    live = sys.stderr.isatty()
    is_total = work is None or isinstance(work, int)
    return tqdm(
        None if is_total else work,
        total=work if is_total else None,
        desc=desc,
        unit=unit,
        initial=initial,
        disable=rank() != 0,
        file=sys.stderr if live else _Lines(),
        position=None if live else 0,  # no cursor movement in a log
        mininterval=0.2 if live else seconds_between_lines,
        miniters=1,  # check the clock at every step: steps are slow and uneven here
        dynamic_ncols=live,
        bar_format=None if live else "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def one_line(error: BaseException, memory_advice: str = "process less at a time") -> str:
    """An error as one line for the user, with advice if the disk or memory is full or no thread can be started."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    if NO_THREAD in text:
        return f"{text}; raise the limit on processes and threads (ulimit -u, or the container's), or use fewer threads"
    if _is_out_of_memory(error):
        return f"out of memory ({text[:200]}); {memory_advice}, or use a machine with more memory"
    if isinstance(error, OSError) and error.errno in DISK_ADVICE:
        return f"{text} ({_describe_disk(error.filename)}); {DISK_ADVICE[error.errno]}"
    return text


def is_exhausted(error: BaseException) -> bool:
    """Whether an error of Python, torch or a library means that there is no more memory, or no more threads."""
    return _is_out_of_memory(error) or (isinstance(error, RuntimeError) and NO_THREAD in str(error))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))
    )


def _describe_disk(name: str | None) -> str:
    """The disk that a file is on, and its free space."""
    folder = Path(name or ".").absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return f"the disk of {folder}"
    while not folder.is_mount() and folder != folder.parent:
        folder = folder.parent
    return f"the disk at {folder} has {free / 1e6:,.0f} MB free"


class _StderrHandler(logging.Handler):
    """Writes above a live progress bar, to the current sys.stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        prefix = prefix if rank() == 0 else f"[rank {rank()}] {prefix}"
        with contextlib.suppress(OSError):  # the terminal or the log's disk is gone; work goes on
            tqdm.write(prefix + self.format(record), file=sys.stderr)


class _Lines:
    """Turns tqdm's carriage returns into lines, for a stderr that is not a terminal."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            with contextlib.suppress(OSError):
                sys.stderr.write(text + "\n")

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
