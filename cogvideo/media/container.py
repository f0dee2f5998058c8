"""Opens media files within limits: a file's video stream, its packets decoded one by one, and pictures.

No other module reads media with FFmpeg.
"""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image

from cogvideo.media.byte_range import (
    FILE_ERRORS,
    ByteRange,
    MediaPath,
    check_readable,
    is_file,
    media_size,
    media_start,
    media_url,
)
from cogvideo.media.confinement import LIMIT_ERRORS, allow_memory, within_seconds

SMALL = 256 * 256  # pixels; below this, starting codec threads costs more than they save
MAX_THREADS = 8  # per file; many files are read at the same time
OPENING_BYTES, BYTES_PER_BYTE = 224 << 20, 32  # memory for opening: index entries are larger than in the file
OPENING_SECONDS, OPENING_SECONDS_PER_MB = 10, 2  # of processor time; sound files take 0.1 s, more on a busy host
FEW_FRAMES, FRAME_BYTES = 1000, 4  # frames that an edit list may repeat; minimum bytes of any other frame
BYTES_PER_PIXEL = 256  # memory for decoding: a codec's reference and working frames
DEFAULT_BONUS = 5_000_000  # pixels by which FFmpeg prefers the stream marked as default
EXIF_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
PICTURE_FORMATS = (*EXIF_FORMATS, "BMP")
EXIF_ORIENTATION = 0x112
FFMPEG_ERRORS = (
    *(errno.EIO, errno.ENOSYS, errno.ERANGE, errno.EDOM, errno.EOVERFLOW, errno.EOPNOTSUPP, errno.ENODATA),
    *(errno.EEXIST, errno.EBUSY, errno.ENOSPC, errno.ESPIPE, errno.EPIPE, errno.EBADF),
)
"""System errors that FFmpeg also reports for what it finds in a damaged file."""


class DamagedVideoError(ValueError):
    """A video, or a frame of it, cannot be shown because the file is cut short or damaged."""


class TooLargeError(ValueError):
    """A file's frames are larger or more numerous than the limits allow."""


@dataclass(frozen=True)
class Limits:
    """What may be opened and decoded."""

    max_pixels: int = 2**27
    """Pixels per decoded frame; a frame may be larger than the file's header says."""
    containers: str | None = None
    """FFmpeg's names of the containers that may be opened, with commas between them; None: all."""
    max_frames: int = 2**24
    memory: int = 4 << 30
    """Bytes that reading the file may take, whatever its size."""
    cpu_seconds: int | None = None
    """Processor time that reading the file may take; None: depends on its size."""


@contextmanager
def open_video(
    path: MediaPath, limits: Limits | None, *, times_only: bool = False
) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Open a file's video stream. PyAV's errors, including those in the `with` body, become one-line ValueErrors.

    `times_only`: frames may be decoded inexactly, since their pixels are not used.
    Raises: ValueError for what is not a readable video; OSError where that is not the file's fault.
    """
    if not is_file(path):
        raise ValueError(f"{path} is not a file; expected a video or picture")
    limits = limits or Limits()
    size = media_size(path)
    allow_memory(min(limits.memory, OPENING_BYTES + BYTES_PER_BYTE * size))
    options = {
        "pattern_type": "none",  # "a%03d.png" is the name of one file
        "protocol_whitelist": "file,subfile",  # a playlist must not reach other machines
        **{"max_reload": "0", "m3u8_hold_counters": "0"},  # nor wait for more segments
        "max_pixels": str(limits.max_pixels),  # opening a file already decodes some frames
    }
    if limits.containers is not None:
        options["format_whitelist"] = limits.containers
    try:
        with within_seconds(OPENING_SECONDS + OPENING_SECONDS_PER_MB * size // 10**6):
            opened = av.open(media_url(path), options=options)
        with opened as container:
            stream = _choose_stream(path, container)
            if not stream.width * stream.height:  # FFmpeg decodes a picture to find its size
                raise TooLargeError(
                    f"{path} has no frame that FFmpeg can read, or its frames exceed {limits.max_pixels} pixels; "
                    "expected a smaller picture or video"
                )
            if stream.width * stream.height > limits.max_pixels:
                pixels = f"{stream.width}x{stream.height}"
                raise TooLargeError(f"{path} has {pixels} pixels; expected at most {limits.max_pixels} in all")
            if len(stream.index_entries) > (max_frames := most_frames(path, limits)):
                raise too_many(path, max_frames)
            frame_bytes = BYTES_PER_PIXEL * stream.width * stream.height
            allow_memory(min(limits.memory, OPENING_BYTES + BYTES_PER_BYTE * size + frame_bytes))
            codec = stream.codec_context
            codec.options = {"max_pixels": str(limits.max_pixels)} | ({"skip_loop_filter": "all"} if times_only else {})
            if stream.width * stream.height <= SMALL:
                codec.thread_count = 1
            else:
                codec.thread_count, codec.thread_type = min(MAX_THREADS, os.cpu_count() or 1), "AUTO"
            yield container, stream
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        _raise_system_error(path, error.errno)
        problem = _instead_of_video(path) or f"is not a readable video ({error.strerror}); it may be cut short"
        raise ValueError(f"{path} {problem}") from error


def _raise_system_error(path: MediaPath, number: int | None) -> None:
    """Raise the OSError behind an error of FFmpeg, if it is not the file's fault: the disk fails, for example."""
    if number is not None and number in errno.errorcode and number not in (*FILE_ERRORS, *LIMIT_ERRORS, *FFMPEG_ERRORS):
        raise OSError(number, os.strerror(number), str(path))
    try:
        check_readable(path)
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise


def _instead_of_video(path: MediaPath) -> str:
    """What a failed download left in place of a video; empty if the file may be one."""
    try:
        start = media_start(path, 64).lstrip().lower()
    except OSError:
        return ""
    if not start:
        return "is empty; download or copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer to a file in Git LFS; fetch the videos with git lfs pull"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a video; download it again"
    return ""


def most_frames(path: MediaPath, limits: Limits | None) -> int:
    """How many frames a file may have: no more than fit into it, whatever its index claims."""
    return min((limits or Limits()).max_frames, FEW_FRAMES + media_size(path) // FRAME_BYTES)


def too_many(path: MediaPath, max_frames: int) -> TooLargeError:
    return TooLargeError(f"{path} has too many frames; expected at most {max_frames}")


def damaged(path: MediaPath, problem: str) -> DamagedVideoError:
    return DamagedVideoError(f"{path} is cut short or damaged: {problem}; copy or convert it again")


def _choose_stream(path: MediaPath, container: InputContainer) -> av.VideoStream:
    """The video stream that FFmpeg would choose: the largest, with a bonus for the default; no attached pictures."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError(f"{path} has no video stream" + (", only a cover picture" if container.streams.video else ""))
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise ValueError(f"{path} has a video codec that FFmpeg does not know; convert it to mp4 first")

    def score(stream: av.VideoStream) -> int:
        return stream.width * stream.height + DEFAULT_BONUS * bool(stream.disposition & Disposition.default)

    return max(known, key=score)  # the first of equals


def tick_of(stream: av.VideoStream) -> Fraction:
    """Seconds per tick of a stream's timestamps."""
    assert stream.time_base is not None  # opened inputs have one
    return stream.time_base


def frame_ticks_of(stream: av.VideoStream) -> int:
    """The usual duration of a frame, in ticks."""
    return max(1, round(1 / ((stream.guessed_rate or stream.average_rate or 25) * tick_of(stream))))


def decode_packets(
    container: InputContainer, stream: av.VideoStream, packets: Iterator["av.Packet[av.VideoStream]"]
) -> Iterator[av.VideoFrame | None]:
    """Decode packets; yields None in place of one that cannot be read or decoded."""
    codec = stream.codec_context
    truncates = container.format.name != "mpegts"  # there the mark only means that an earlier packet was lost
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:  # the file breaks off
            yield from codec.decode(None)
            yield None
            return
        if packet is None:
            return
        try:
            if packet.is_corrupt and truncates:
                yield None
            else:
                yield from codec.decode(packet)
        except av.error.FFmpegError:
            yield None


def read_picture(path: Path, limits: Limits) -> NDArray[np.uint8]:
    """A picture's pixels (H, W, 3) in RGB as Pillow decodes them: as stored, ignoring orientation and transparency.

    Raises: ValueError; OSError where that is not the file's fault.
    """
    try:
        memory = OPENING_BYTES + BYTES_PER_BYTE * media_size(path)
        allow_memory(min(limits.memory, memory))
        with warnings.catch_warnings(), Image.open(path, formats=PICTURE_FORMATS) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `limits` applies instead
            pixels = picture.width * picture.height
            if pixels > limits.max_pixels:
                raise ValueError(f"{picture.width}x{picture.height} pixels; expected at most {limits.max_pixels}")
            allow_memory(min(limits.memory, memory + BYTES_PER_PIXEL * pixels))
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno not in (*FILE_ERRORS, *LIMIT_ERRORS):
            raise
        raise ValueError(f"{path} is not a readable picture ({str(error)[:200]})") from None


def exif_orientation_of(path: MediaPath) -> int | None:
    """1 to 8 for a picture, 1 if it specifies none; None for what Pillow cannot read.

    Raises: OSError where that is not the file's fault.
    """
    if isinstance(path, ByteRange):
        return None  # a picture under the name of a video
    try:
        with Image.open(path, formats=EXIF_FORMATS) as picture:
            orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno not in (*FILE_ERRORS, *LIMIT_ERRORS):
            raise
        return None
    return orientation if orientation in range(1, 9) else 1
