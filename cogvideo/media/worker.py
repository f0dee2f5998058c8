"""The process that parses untrusted files: takes requests on stdin, answers on stdout, limits its own resources.

sandbox.py starts it and talks to it. A request is a pickle: a function and its arguments. An answer is JSON lines, each
followed by raw arrays, so that even a file that takes over this process cannot make the other one run code. It imports
little, to start quickly.
"""

import errno
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cogvideo.media.byte_range import FILE_ERRORS, MediaPath, check_readable, media_size
from cogvideo.media.confinement import LIMIT_ERRORS, allow_seconds, confine, data_bytes, lift_memory_limit
from cogvideo.media.container import DamagedVideoError, Limits, TooLargeError, read_picture
from cogvideo.media.decoder import decode_frames
from cogvideo.media.frame_index import Spans, VideoInfo, index_frames
from cogvideo.media.pixels import Framing, PixelReader

RETIRE_BYTES = 256 << 20
"""Memory that a file may leave behind before this process is replaced."""
SECONDS, SECONDS_PER_MB = 60, 100
"""Processor time for a file; far more than the slowest undamaged one needs."""

Answer = tuple[dict[str, Any], tuple[NDArray[Any], ...]]


def cpu_seconds(path: MediaPath, limits: Limits) -> int:
    """Processor time that reading a file may take."""
    if limits.cpu_seconds is not None:
        return limits.cpu_seconds
    try:
        return SECONDS + SECONDS_PER_MB * media_size(path) // 10**6
    except OSError:
        return SECONDS


def index(path: MediaPath, spans: Spans | None, exact: bool, limits: Limits) -> Iterator[Answer]:
    """Answer with the fields of a `VideoInfo`. Raises: ValueError; OSError where it is not the file's fault."""
    info = index_frames(path, spans=spans, exact=exact, limits=limits)
    if info.damage is not None:
        check_readable(path)
    fields = {
        "width": info.width,
        "height": info.height,
        "pixel_aspect": [info.pixel_aspect.numerator, info.pixel_aspect.denominator],
        "exif_orientation": info.exif_orientation,
        "origin": info.origin,
        "damage": info.damage,
    }
    arrays = (info.seconds, info.key_seconds)
    yield fields, arrays if info.outputs is None else (*arrays, info.outputs)


def decode(
    path: MediaPath, info: VideoInfo, wanted: NDArray[Any], framing: Framing | None, limits: Limits
) -> Iterator[Answer]:
    """Answer with the wanted frames as RGB pixels, in the decoder's order."""
    reader = PixelReader(framing, info.pixel_aspect, info.exif_orientation)
    for time, frame in decode_frames(path, info, wanted, limits=limits):
        try:
            pixels = reader.read(frame)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        yield {"time": time}, (pixels,)


def picture(path: Path, limits: Limits) -> Iterator[Answer]:
    """Answer with a picture's RGB pixels."""
    yield {}, (read_picture(path, limits),)


def main() -> None:
    """Serve requests until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that sends requests
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    for name, value in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64)):
        resource.setrlimit(name, (value, value))
    confine()
    start = data_bytes()
    while True:
        try:
            folder, operation, arguments = pickle.load(requests)
        except EOFError:
            return
        path, limits = arguments["path"], arguments["limits"]
        end: dict[str, Any] = {"kind": "end"}
        try:
            try:
                if folder is not None:
                    os.chdir(folder)
                allow_seconds(cpu_seconds(path, limits))
                for fields, arrays in operation(**arguments):
                    _send(answers, {"kind": "part", **fields}, arrays)
            finally:
                lift_memory_limit()  # what follows must not run out of memory
        except BrokenPipeError:
            return
        except Exception as error:
            end = _end(path, error)
        _send(answers, end | {"retire": data_bytes() - start > RETIRE_BYTES}, ())


def _end(path: MediaPath, error: Exception) -> dict[str, Any]:
    """The last answer after an error: of the file, unless the system reports one that is not the file's fault."""
    if isinstance(error, DamagedVideoError):  # or is it the disk?
        try:
            check_readable(path)
        except OSError as failure:
            error = failure
    if isinstance(error, OSError) and error.errno not in (*FILE_ERRORS, *LIMIT_ERRORS):
        number = error.errno or errno.EIO
        return {"kind": "OSError", "errno": number, "message": error.strerror or os.strerror(number)}
    if isinstance(error, MemoryError):
        return {"kind": "MemoryError", "message": f"{path} needs more memory than an undamaged file of its size should"}
    if isinstance(error, ValueError):
        known = next((kind for kind in (TooLargeError, DamagedVideoError) if isinstance(error, kind)), ValueError)
        return {"kind": known.__name__, "message": str(error)}
    # whatever a file provokes is an error of that file
    return {"kind": "ValueError", "message": f"{path} cannot be read ({type(error).__name__}: {error})"}


def _send(answers: BinaryIO, fields: dict[str, Any], arrays: tuple[NDArray[Any], ...]) -> None:
    forms = [(array.dtype.str, array.shape) for array in arrays]
    answers.write(json.dumps(fields | {"arrays": forms}).encode() + b"\n")
    for array in arrays:
        answers.write(np.ascontiguousarray(array).data.cast("B"))
    answers.flush()
