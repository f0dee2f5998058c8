"""Read and write video files with PyAV: exact timestamps, bounded memory, H.264 out.

Times are seconds after the stream's start, taken from each frame's own timestamp, so variable frame rates are read as
they are. Nothing here knows of clips or tokens, and nothing resamples in time.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from cogvideo.files import atomic_write

MAX_BYTES = 2**30  # of decoded frames held at once
MAX_PIXELS = 2**27  # of one frame, for the decoder: frames may be larger than the file says
SEEK_MARGIN = 1.0  # seconds; containers index decoding times, which run ahead of presentation times
SMALL = 256 * 256  # pixels; below this, starting codec threads costs more than they save
SAME_TIME = 1e-4  # seconds; well under a frame, well over the rounding of a time base
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its first video stream."""

    width: int
    height: int
    seconds: NDArray[np.float64]
    """(N,) the frames' times, ascending."""

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the last."""
        return float(self.seconds[-1] - self.seconds[0])


def probe_video(path: str | Path) -> VideoInfo:
    """Read the frames' times without decoding them. Raises ValueError for a missing, damaged or non-video file."""
    with _open_stream(path) as (container, stream):
        origin, tick = stream.start_time or 0, _tick(stream)
        count, whole, times = 0, True, []
        for packet in container.demux(stream):  # one at a time: together they are as large as the file
            if packet.size:
                count, whole = count + 1, whole and not packet.is_corrupt
                if packet.pts is not None and not packet.is_discard:
                    times.append(packet.pts)
        if not whole or count < stream.frames:
            raise _damaged(path, f"it holds {count} of {stream.frames} frames")
        if not times or len(times) < count // 2:
            raise ValueError(f"{path} has no frames with timestamps; convert it to mp4 with ffmpeg first")
        if not stream.width * stream.height:
            raise ValueError(f"{path} does not say how large its frames are; convert it to mp4 or png first")
        seconds = np.array(sorted({float((pts - origin) * tick) for pts in times}))
        return VideoInfo(stream.width, stream.height, seconds)


def read_video(
    path: str | Path,
    *,
    side: int | None = None,
    start: float = 0.0,
    end: float = float("inf"),
    only: NDArray[np.float64] | None = None,
    max_bytes: int = MAX_BYTES,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Decode frames of `start` <= time <= `end` -> frames (N, H, W, 3) uint8 RGB and their times (N,) in seconds.

    With `side`, each frame is scaled so that its shorter edge is `side` and cut to the centre square, while decoding:
    a large video never sits in memory. With `only`, ascending times as `probe_video` gives them, just those are kept.
    Raises ValueError for a missing, damaged or non-video file, an empty span, a missing wanted frame, or more frames
    than `max_bytes` holds.
    """
    if only is not None:
        start, end = max(start, float(only[0])), min(end, float(only[-1]))
    reformatter = VideoReformatter()  # one a file: it caches the scaler
    frames: list[NDArray[np.uint8]] = []
    seconds: list[float] = []
    held = 0
    with _open_stream(path) as (container, stream):
        origin, tick = stream.start_time or 0, _tick(stream)
        if start > SEEK_MARGIN:
            container.seek(origin + int((start - SEEK_MARGIN) / tick), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None or frame.is_corrupt:
                raise _damaged(path, f"frame {len(frames)} cannot be decoded")
            time = float((frame.pts - origin) * tick)
            if time > end + SAME_TIME:
                break
            if time < start - SAME_TIME or (only is not None and np.abs(only - time).min() > SAME_TIME):
                continue
            frames.append(_pixels(frame, reformatter, side))
            seconds.append(time)
            held += frames[-1].nbytes
            if held > max_bytes:
                raise ValueError(
                    f"{path}: more than {max_bytes >> 20} MiB of decoded frames; ask for a smaller size or shorter span"
                )
        else:
            if start <= 0 and only is None and len(frames) < stream.frames and end == float("inf"):
                raise _damaged(path, f"it holds {len(frames)} of {stream.frames} frames")
    if not frames:
        raise ValueError(f"{path} has no frame between {start:g} s and {end:g} s")
    if only is not None and len(frames) != len(only):
        raise _damaged(path, f"only {len(frames)} of {len(only)} wanted frames could be decoded")
    return np.stack(frames), np.array(seconds)


def iterate_frames(path: str | Path, *, side: int) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """All frames one at a time, scaled and cropped as by `read_video`, with their times. Raises ValueError likewise."""
    reformatter = VideoReformatter()
    with _open_stream(path) as (container, stream):
        origin, tick = stream.start_time or 0, _tick(stream)
        for number, frame in enumerate(container.decode(stream)):
            if frame.pts is None or frame.is_corrupt:
                raise _damaged(path, f"frame {number} cannot be decoded")
            yield _pixels(frame, reformatter, side), float((frame.pts - origin) * tick)


def write_video(
    path: str | Path,
    frames: NDArray[np.uint8] | Iterable[NDArray[np.uint8]],
    fps: float | Fraction,
    *,
    pixel_format: str = "yuv420p",
    crf: int = 14,
    preset: str = "veryfast",
) -> None:
    """Write frames (N, H, W, 3) uint8 as an H.264 .mp4, frame k at k / fps seconds; the file appears when it is whole.

    "yuv420p" plays everywhere and needs even sizes: an odd edge is padded by repeating its last row or column.
    "yuv444p" keeps the colour of every pixel. Lower `crf` is better quality (0..51).
    """
    rate = Fraction(fps).limit_denominator(1001) if 0 < fps < float("inf") else Fraction(0)
    if not rate:
        raise ValueError(f"fps={fps} is not a frame rate; give a number above 0")
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"no frames to write to {path}")
    even = pixel_format == "yuv420p"
    height, width = (size + size % 2 if even else size for size in first.shape[:2])
    reformatter = VideoReformatter()
    with (
        atomic_write(path) as part,
        av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": preset})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if width * height <= SMALL:
            stream.codec_context.thread_count = 1
        for index, pixels in enumerate(_chain(first, iterator)):
            padded = np.pad(pixels, ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
            frame = reformatter.reformat(frame, format=pixel_format, interpolation=SCALING, threads=1)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _chain(first: NDArray[np.uint8], rest: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    yield first
    yield from rest


@contextmanager
def _open_stream(path: str | Path) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """Open a file's first video stream, turning PyAV's errors, also those of the body, into one-line ValueErrors."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; expected a video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            if stream.width * stream.height <= SMALL:
                stream.codec_context.thread_count = 1
            else:
                stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is not a readable video ({error.strerror}); it may be cut short") from error


def _tick(stream: "av.VideoStream") -> Fraction:
    assert stream.time_base is not None  # an opened input has one
    return stream.time_base


def _damaged(path: str | Path, what: str) -> ValueError:
    return ValueError(f"{path} is cut short or damaged: {what}; copy or convert it again")


def _pixels(frame: "av.VideoFrame", reformatter: VideoReformatter, side: int | None) -> NDArray[np.uint8]:
    """One decoded frame -> (H, W, 3) RGB, scaled and centre-cropped to `side` if given, turned upright."""
    width, height = frame.width, frame.height
    if side is not None:
        scale = side / min(width, height)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
    image = reformatter.reformat(frame, width, height, "rgb24", interpolation=SCALING, threads=1).to_ndarray()
    if side is not None:
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90) if frame.rotation % 360 else image)
