"""Runs FFmpeg and other C libraries in separate processes (worker.py), with limits on memory, time, files and output.

    info = index_frames(path, spans=None, exact=False, limits=Limits())
    for pixels, time in read_frames(path, info, info.seconds, None, Limits()): ...
    for fields, arrays in run(path, function, {"path": path, "limits": Limits()}, max_bytes=1 << 20): ...

A file that crashes such a process, hangs it or takes too much memory causes a ValueError about that file. What is not
the file's fault causes an OSError: the disk fails, or the system ends the process because memory is full. Processes are
reused for further files; there are as many as there are concurrent calls.
"""

import errno
import fcntl
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvideo.media import worker
from cogvideo.media.byte_range import FILE_ERRORS, MediaPath
from cogvideo.media.container import DamagedVideoError, Limits, TooLargeError
from cogvideo.media.frame_index import Spans, VideoInfo
from cogvideo.media.pixels import MAX_PIXELS, Framing
from cogvideo.media.worker import Answer

START = "import sys; sys.path[:] = sys.argv[1:]; from cogvideo.media.worker import main; main()"
WALL_FACTOR = 10
"""Wall-clock time that a file may take, as a multiple of its processor time: the machine may be busy, the disk slow."""
MAX_LINE = 1 << 16
PIPE_BYTES = 1 << 20  # several small frames, so that the processes seldom wait for each other
ERRORS: dict[str, type[ValueError]] = {"TooLargeError": TooLargeError, "DamagedVideoError": DamagedVideoError}
CRASHES = (
    *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
    *(signal.SIGTRAP, signal.SIGSYS, signal.SIGXFSZ),
)
"""Signals by which a process ends because of the file that it parses. Others come from outside."""
END_SECONDS = 10
"""How long a process whose answers have ended may take to exit."""
DTYPES = ("|u1", "<i8", "<f8")
"""Dtypes that arrays in answers may have."""
MAX_ARRAYS = 3
"""Maximum number in one answer."""


class Parser(NamedTuple):
    """What messages say about a library that crashes."""

    name: str
    advice: str


FFMPEG = Parser("FFmpeg", "convert it to mp4 first")


def index_frames(path: MediaPath, *, spans: Spans | None, exact: bool, limits: Limits) -> VideoInfo:
    """`frame_index.index_frames`, in another process.

    Raises: ValueError likewise, and for a file beyond its limits; OSError for what is not the file's fault.
    """
    request = {"path": path, "spans": spans, "exact": exact, "limits": limits}
    fields, arrays = last_answer(path, run(path, worker.index, request, max_bytes=8 * limits.max_frames))
    with damaged_answers(path):
        seconds = _numbers(arrays[0], np.float64, 1, limits.max_frames)
        return VideoInfo(
            _of_type(fields["width"], int),
            _of_type(fields["height"], int),
            seconds,
            _numbers(arrays[1], np.float64, 0, len(seconds)),
            Fraction(*fields["pixel_aspect"]),
            _of_type(fields["exif_orientation"], int, NoneType),
            _of_type(fields["origin"], int),
            _numbers(arrays[2], np.int64, len(seconds), len(seconds)) if len(arrays) > 2 else None,
            _of_type(fields["damage"], str, NoneType),
        )


def read_frames(
    path: MediaPath, info: VideoInfo, wanted: NDArray[np.float64], framing: Framing | None, limits: Limits
) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """The frames of `decoder.decode_frames` as RGB pixels (H, W, 3), from another process.

    Raises: as `index_frames`.
    """
    request = {"path": path, "info": info, "wanted": wanted, "framing": framing, "limits": limits}
    for fields, arrays in run(path, worker.decode, request, max_bytes=3 * MAX_PIXELS):
        with damaged_answers(path):
            pixels, time = _picture(arrays), float(fields["time"])
        yield pixels, time


def read_picture(path: Path, limits: Limits) -> NDArray[np.uint8]:
    """`container.read_picture`, in another process. Raises: as `index_frames`."""
    request = {"path": path, "limits": limits}
    _, arrays = last_answer(path, run(path, worker.picture, request, max_bytes=3 * limits.max_pixels))
    with damaged_answers(path):
        return _picture(arrays)


class _Worker:
    """One worker process."""

    def __init__(self) -> None:
        folders = [os.path.abspath(folder) for folder in sys.path]
        # One thread for NumPy: others would only take memory.
        environment = os.environ | {
            **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            "ARROW_DEFAULT_MEMORY_POOL": "system",  # others reserve memory, which the limit counts
        }
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        with suppress(OSError, AttributeError):  # over the limit on all of a user's pipes; not Linux
            fcntl.fcntl(self._answers, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def ask(self, operation: Callable[..., Iterator[Answer]], arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the fields of each answer, whose arrays must be read before the next; the last one marks the end.

        Raises: EOFError if the process ends before that; TypeError for what is not JSON.
        """
        try:
            folder = os.getcwd()
        except FileNotFoundError:
            folder = None
        pickle.dump((folder, operation, arguments), self._requests)
        self._requests.flush()
        while True:
            line = self._answers.readline(MAX_LINE)
            if not line.endswith(b"\n"):
                raise EOFError
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                raise TypeError from None
            yield fields
            if fields["kind"] != "part":
                return

    def read(self, max_bytes: int, dtype: str, shape: list[int]) -> NDArray[Any]:
        """Raises: TypeError for an array that `max_bytes` or DTYPES do not allow; EOFError if it is cut short."""
        sound = dtype in DTYPES and len(shape) <= 3 and all(type(size) is int and size >= 0 for size in shape)
        if not sound or math.prod(shape) * np.dtype(dtype).itemsize > max_bytes:
            raise TypeError
        array = np.empty(shape, dtype)
        if self._answers.readinto(array.data.cast("B")) != array.nbytes:  # type: ignore[attr-defined]
            raise EOFError
        return array

    def kill(self) -> int:
        """End the process; returns its exit code."""
        self.process.kill()
        code = self.process.wait()
        for pipe in (self._requests, self._answers):
            with suppress(BrokenPipeError):
                pipe.close()
        return code


_idle: deque[_Worker] = deque()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a forked process must not use its parent's workers


def run(
    path: MediaPath,
    operation: Callable[..., Iterator[Answer]],
    arguments: dict[str, Any],
    *,
    max_bytes: int,
    parser: Parser = FFMPEG,
) -> Iterator[Answer]:
    """Call a module-level function in another process; `arguments` include the file's "path" and "limits".

    Yields its answers: fields, which came as JSON, and up to MAX_ARRAYS arrays of at most `max_bytes` each. Neither can
    be trusted. A process that is lost before its first answer is replaced by a new one, once.
    Raises: ValueError for whatever is wrong with the file; OSError for a failing disk; ChildProcessError if the process
    is lost, for example because memory is full.
    """
    answered = False
    try:
        with closing(_run(_idle_worker(), path, operation, arguments, max_bytes, parser)) as answers:
            for answer in answers:
                answered = True
                yield answer
        return
    except ChildProcessError:
        if answered:
            raise
    yield from _run(_Worker(), path, operation, arguments, max_bytes, parser)


def _idle_worker() -> _Worker:
    try:
        return _idle.pop()
    except IndexError:
        return _Worker()


def _run(
    process: _Worker,
    path: MediaPath,
    operation: Callable[..., Iterator[Answer]],
    arguments: dict[str, Any],
    max_bytes: int,
    parser: Parser,
) -> Generator[Answer, None, None]:
    """`run` in a given process. Raises: likewise."""
    seconds = worker.cpu_seconds(path, arguments["limits"])
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.process.kill()

    timer = threading.Timer(WALL_FACTOR * seconds, stop)
    timer.daemon = True
    timer.start()
    keep = False
    try:
        for fields in process.ask(operation, arguments):
            if fields["kind"] == "part":
                if len(fields["arrays"]) > MAX_ARRAYS:
                    raise TypeError
                arrays = tuple(process.read(max_bytes, *form) for form in fields["arrays"])
                yield fields, arrays
        keep = not fields["retire"] and fields["kind"] != "MemoryError"
        if fields["kind"] == "OSError":
            if fields["errno"] not in errno.errorcode or fields["errno"] in FILE_ERRORS:
                raise TypeError
            raise OSError(fields["errno"], str(fields["message"]), str(path))
        if fields["kind"] != "end":
            raise ERRORS.get(fields["kind"], ValueError)(fields["message"])
    except (EOFError, BrokenPipeError):
        raise _lost(path, process, late.is_set(), seconds, parser) from None
    except (KeyError, TypeError):
        raise _damaged_answer(path) from None
    finally:
        timer.cancel()
        if keep:
            _idle.append(process)
        else:
            process.kill()


@contextmanager
def damaged_answers(path: MediaPath) -> Iterator[None]:
    """Turn errors from a malformed answer into one line that names the file. Raises: ValueError.

    Wrap the code that reads an answer, not `run`, whose own errors say more.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        raise _damaged_answer(path) from None


def last_answer(path: MediaPath, answers: Iterator[Answer]) -> Answer:
    """The last of the answers, after reading all of them, for their errors. Raises: ValueError if there is none."""
    found = deque(answers, 1)
    if not found:
        raise _damaged_answer(path)
    return found[0]


def _damaged_answer(path: MediaPath) -> ValueError:
    return ValueError(f"{path} cannot be read: the process that parses it gave a damaged answer")


def _lost(
    path: MediaPath, process: _Worker, late: bool, seconds: int, parser: Parser
) -> ValueError | ChildProcessError:
    """The error for a process that ended before its last answer: of the file, or of the machine."""
    with suppress(subprocess.TimeoutExpired):
        process.process.wait(END_SECONDS)
    code = process.process.poll()
    name = None if code is None or code >= 0 else signal.Signals(-code).name
    if late:
        problem = f"it takes more than {seconds} seconds"
    elif code == -signal.SIGXCPU:
        problem = "it takes more processor time than an undamaged file of its size should need"
    elif code is not None and -code in CRASHES:
        problem = f"{parser.name} ended with {name}; {parser.advice}"
    elif not code:  # only what has taken the process over lets it close its output
        problem = "the process that parses it ended its answer early"
    elif code == -signal.SIGKILL:
        problem = "which the system does when memory is full; free some or use fewer workers, and run the command again"
        return ChildProcessError(errno.ECHILD, f"{parser.name} was ended with {name}, {problem}", str(path))
    else:
        problem = f"was ended with {name}" if name else f"exited with code {code}; check the installation"
        return ChildProcessError(errno.ECHILD, f"{parser.name} {problem}; run the command again", str(path))
    return ValueError(f"{path} cannot be read: {problem}")


def _of_type(value: Any, *types: type[Any]) -> Any:
    if type(value) not in types:
        raise TypeError
    return value


def _numbers(array: NDArray[Any], dtype: type[Any], least: int, most: int) -> NDArray[Any]:
    if array.dtype != dtype or array.ndim != 1 or not least <= len(array) <= most:
        raise TypeError
    return array


def _picture(arrays: tuple[NDArray[Any], ...]) -> NDArray[np.uint8]:
    if arrays[0].dtype != np.uint8 or arrays[0].shape[2:] != (3,):
        raise TypeError
    return arrays[0]
