"""FFmpeg in processes of their own (worker.py), which have limits on memory, time, files and output.

    info = index_frames(path, spans=None, exact=False, limits=Limits())
    for pixels, time in read_frames(path, info, info.seconds, None, Limits()): ...

A file that crashes such a process, hangs it or takes too much memory is a ValueError of that file. Processes are kept
for further files; as many run as there are calls at the same time.
"""

import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.media.byte_range import MediaPath
from cogvideo.media.decoder import DamagedVideoError, Limits, Spans, TooLargeError, VideoInfo
from cogvideo.media.pixels import MAX_PIXELS, Framing
from cogvideo.media.worker import cpu_seconds

START = "import sys; sys.path[:] = sys.argv[1:]; from cogvideo.media.worker import main; main()"
WALL_FACTOR = 10
"""Time that a file may take, as a multiple of its processor time: the machine may be busy, the disk slow."""
MAX_LINE = 1 << 16
PIPE_BYTES = 1 << 20  # several small frames, so that the processes seldom wait for each other
ERRORS: dict[str, type[ValueError]] = {"TooLargeError": TooLargeError, "DamagedVideoError": DamagedVideoError}

Part = tuple[dict[str, Any], "_Worker"]


def index_frames(path: MediaPath, *, spans: Spans | None, exact: bool, limits: Limits) -> VideoInfo:
    """`decoder.index_frames`, in another process. Raises: ValueError likewise, and for a file beyond its limits."""
    request = {"path": path, "spans": spans, "exact": exact, "limits": limits}
    found: VideoInfo | None = None
    for fields, worker in _run(path, "index", request, limits):
        count = _within(fields["count"], limits.max_frames)
        seconds = worker.read((count,), np.float64)
        key_seconds = worker.read((_within(fields["key_count"], count, least=0),), np.float64)
        outputs = worker.read((count,), np.int64) if fields["numbered"] else None
        found = VideoInfo(
            fields["width"],
            fields["height"],
            seconds,
            key_seconds,
            Fraction(*fields["pixel_aspect"]),
            fields["exif_orientation"],
            fields["origin"],
            outputs,
            fields["damage"],
        )
    assert found is not None  # an index without an answer ends in an error
    return found


def read_frames(
    path: MediaPath, info: VideoInfo, wanted: NDArray[np.float64], framing: Framing | None, limits: Limits
) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """The frames of `decoder.decode_frames` as RGB pixels (H, W, 3), from another process.

    Raises: as `index_frames`.
    """
    request = {"path": path, "info": info, "wanted": wanted, "framing": framing, "limits": limits}
    for fields, worker in _run(path, "decode", request, limits):
        height, width = fields["height"], fields["width"]
        _within(height * width, MAX_PIXELS)
        yield worker.read((height, width, 3), np.uint8), float(fields["time"])


def read_picture(path: Path, limits: Limits) -> NDArray[np.uint8]:
    """`decoder.read_picture`, in another process. Raises: as `index_frames`."""
    found: NDArray[np.uint8] | None = None
    for fields, worker in _run(path, "picture", {"path": path, "limits": limits}, limits):
        height, width = fields["height"], fields["width"]
        _within(height * width, limits.max_pixels)
        found = worker.read((height, width, 3), np.uint8)
    assert found is not None  # a picture without an answer ends in an error
    return found


class _Worker:
    """One process."""

    def __init__(self) -> None:
        folders = [os.path.abspath(folder) for folder in sys.path]
        # One thread for NumPy: others would only take memory.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        with suppress(OSError, AttributeError):  # beyond a limit for all of a user's pipes; not Linux
            fcntl.fcntl(self._answers, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def ask(self, operation: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the answers' fields; arrays that belong to one must be read before the next. The last is the end."""
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
            fields = json.loads(line)
            yield fields
            if fields["kind"] != "part":
                return

    def read(self, shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
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
    os.register_at_fork(after_in_child=_idle.clear)  # a forked process has no share in its parent's workers


def _run(path: MediaPath, operation: str, arguments: dict[str, Any], limits: Limits) -> Iterator[Part]:
    """Yield the parts of an answer. Raises: ValueError in place of whatever went wrong."""
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
    seconds = cpu_seconds(path, limits)
    late = threading.Event()

    def stop() -> None:
        late.set()
        worker.process.kill()

    timer = threading.Timer(WALL_FACTOR * seconds, stop)
    timer.daemon = True
    timer.start()
    keep = False
    try:
        for fields in worker.ask(operation, arguments):
            if fields["kind"] == "part":
                yield fields, worker
        keep = not fields["retire"] and fields["kind"] != "MemoryError"
        if fields["kind"] != "end":
            raise ERRORS.get(fields["kind"], ValueError)(fields["message"])
    except (EOFError, BrokenPipeError):
        raise ValueError(f"{path} cannot be read: {_reason(worker, late.is_set(), seconds)}") from None
    except (KeyError, TypeError, json.JSONDecodeError, ZeroDivisionError):
        raise ValueError(f"{path} cannot be read: the process that reads media gave a damaged answer") from None
    finally:
        timer.cancel()
        if keep:
            _idle.append(worker)
        else:
            worker.kill()


def _reason(worker: _Worker, late: bool, seconds: int) -> str:
    with suppress(subprocess.TimeoutExpired):
        worker.process.wait(1)
    code = worker.process.poll()
    if late:
        return f"it takes more than {seconds} seconds"
    if code == -signal.SIGXCPU:
        return "it takes more processor time than a sound file of its size would"
    if code is not None and code < 0:
        return f"FFmpeg ended with {signal.Signals(-code).name}; convert it to mp4 first"
    return "the process that reads media ended; is its installation sound?"


def _within(count: Any, most: int, *, least: int = 1) -> int:
    if not isinstance(count, int) or not least <= count <= most:
        raise TypeError
    return count
