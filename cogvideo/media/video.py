"""Reads and writes video files: exact timestamps, bounded memory, H.264 and GIF output, checks on untrusted files.

Times are seconds after the first frame that is shown; see `frame_index.py`. Nothing here depends on clips or tokens,
and nothing resamples in time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain, pairwise
from os.path import abspath
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from cogvideo.files import atomic_write
from cogvideo.media.byte_range import MediaPath
from cogvideo.media.container import SMALL, Limits, TooLargeError, damaged
from cogvideo.media.frame_index import Spans, VideoInfo
from cogvideo.media.pixels import SCALING, Fit, Framing, Place
from cogvideo.media.sandbox import index_frames, read_frames

MAX_BYTES = 2**30  # of decoded frames in memory at once
SAME_TIME = 1e-4  # seconds; far less than a frame's duration, far more than the rounding of a time base
LIMITS = Limits()
GIF_TICK = Fraction(1, 100)  # seconds; the unit of time in a GIF
UNTRUSTED_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"  # FFmpeg's names
UNTRUSTED_MAX_PIXELS = 16_000_000
UNTRUSTED_MAX_SECONDS = 60.0
UNTRUSTED = Limits(UNTRUSTED_MAX_PIXELS, UNTRUSTED_CONTAINERS, max_frames=10_000, memory=1 << 30, cpu_seconds=30)
"""For files that visitors upload to a web page; pass it wherever such a file is read."""


def probe_video(
    path: MediaPath,
    *,
    spans: Spans | None = None,
    partial: bool = False,
    exact: bool = False,
    limits: Limits = LIMITS,
) -> VideoInfo:
    """Find the frames that a video shows, and their times.

    `spans`: find at least the frames of these parts, which is quicker in a long mp4. `partial`: accept a damaged video,
    up to the damage. `exact`: decode everything to find damage.
    Raises: ValueError for a missing or non-video file, one without a frame that can be shown, or a damaged one.
    """
    info = index_frames(path, spans=spans, exact=exact, limits=limits)
    if info.damage is not None and not partial:
        raise damaged(path, info.damage)
    return info


class DecodedTooLargeError(ValueError):
    """The frames of a video take more memory than `read_video` may use."""


def read_video(
    path: MediaPath,
    *,
    side: int | None = None,
    fit: Fit = "crop",
    place: Place = "center",
    start: float = 0.0,
    end: float = float("inf"),
    only: NDArray[np.float64] | None = None,
    info: VideoInfo | None = None,
    max_bytes: int = MAX_BYTES,
    limits: Limits = LIMITS,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Decode the frames with `start` <= time <= `end` -> frames (N, H, W, 3) uint8 RGB, and times (N,) in seconds.

    `side` makes frames square as they are decoded, so a large video is never held at full size; `fit` and `place`: see
    `Framing`. `only` restricts to the given frame times, ascending, from `probe_video`; `info` avoids probing again.
    Raises: ValueError for a missing, damaged or non-video file, an empty span, or a frame of `only` that is not found;
    DecodedTooLargeError for more than `max_bytes` of frames.
    """
    info = info or probe_video(path, limits=limits)
    times = info.seconds[(info.seconds >= start - SAME_TIME) & (info.seconds <= end + SAME_TIME)]
    times = times if only is None else _all_of(path, times, only)
    if not len(times):
        raise ValueError(f"{path} has no frame between {start:g} s and {end:g} s")
    frames: list[NDArray[np.uint8]] = []
    seconds: list[float] = []
    decoded_bytes = 0
    framing = None if side is None else Framing(side, fit, place)
    for pixels, time in read_frames(path, info, times, framing, limits):
        frames.append(pixels)
        seconds.append(time)
        decoded_bytes += pixels.nbytes
        if decoded_bytes > max_bytes:
            raise DecodedTooLargeError(
                f"{path}: more than {max_bytes >> 20} MiB of decoded frames; ask for a smaller size or shorter span"
            )
    order = np.argsort(seconds)
    return np.stack([frames[index] for index in order]), np.array(seconds)[order]


def iterate_frames(
    path: MediaPath, *, side: int, info: VideoInfo | None = None
) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Yield all frames with their times, scaled and cropped as in `read_video`. Raises: ValueError likewise."""
    info = info or probe_video(path)
    yield from read_frames(path, info, info.seconds, Framing(side), LIMITS)


def stream_video(
    path: MediaPath, *, only: NDArray[np.float64] | None = None, info: VideoInfo | None = None
) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Yield the frames at their own size with their times, in order of time, one in memory at a time.

    A video that stores its frames in another order is decoded whole first. `only` and `info`: see `read_video`.
    Raises: as `read_video`; ValueError for frames of different sizes.
    """
    info = info or probe_video(path)
    times = info.seconds if only is None else _all_of(path, info.seconds, only)
    frames = read_frames(path, info, times, None, LIMITS)
    if info.outputs is not None and (np.diff(info.outputs) < 0).any():
        frames = zip(*read_video(path, only=times, info=info), strict=True)
    size: tuple[int, int] | None = None
    for pixels, time in frames:
        height, width = pixels.shape[:2]
        size = size or (height, width)
        if (height, width) != size:
            raise ValueError(
                f"{path}: the frame at {time:.3g} s has {width}x{height} pixels, the first {size[1]}x{size[0]}; "
                "expected one size per video"
            )
        yield pixels, time


def _all_of(path: MediaPath, times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those of the ascending `times` that match a wanted one. Raises: ValueError if a wanted one is missing."""
    found = _same_times(times, wanted)
    if len(found) != len(wanted):
        raise damaged(path, f"only {len(found)} of {len(wanted)} wanted frames could be decoded")
    return found


def _same_times(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those of the ascending `times` that match a wanted one."""
    if not len(times):
        return times
    after = np.searchsorted(times, wanted - SAME_TIME).clip(0, len(times) - 1)
    found: NDArray[np.float64] = times[after[np.abs(times[after] - wanted) <= SAME_TIME]]
    return found


def write_video(
    path: str | Path,
    frames: NDArray[np.uint8] | Iterable[NDArray[np.uint8]],
    fps: float | Fraction,
    *,
    pixel_format: str = "yuv420p",
    crf: int = 14,
    preset: str = "veryfast",
) -> None:
    """Write frames (N, H, W, 3) uint8 as an H.264 .mp4, frame k at k / fps seconds. The file appears when complete.

    "yuv420p" plays everywhere and needs even sizes; odd ones are padded by repeating the last row or column.
    "yuv444p" keeps the colour of every pixel. Lower `crf` means better quality (0..51).
    Raises: ValueError if there are no frames, or for an invalid `fps`.
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
        atomic_write(path) as temporary,
        av.open(f"file:{abspath(temporary)}", "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": preset})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if width * height <= SMALL:
            stream.codec_context.thread_count = 1
        for index, pixels in enumerate(chain([first], iterator)):
            padded = np.pad(pixels, ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
            frame = reformatter.reformat(frame, format=pixel_format, interpolation=SCALING, threads=1)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_gif(path: str | Path, frames: NDArray[np.uint8], fps: float | Fraction, *, scale: int = 1) -> None:
    """Write frames (N, H, W, 3) uint8 as a looping GIF that lasts N / fps seconds to within 1/100 s.

    A GIF counts time in 1/100 s, so frame durations differ by one unit where 1 / fps is not a multiple of it. `scale`
    repeats pixels. All frames share one palette, so that colours do not flicker. Pillow merges equal neighbours, so the
    file may hold fewer frames.
    Raises: ValueError if there are no frames, or for an `fps` that GIF cannot express.
    """
    if not len(frames):
        raise ValueError(f"no frames to write to {path}")
    if not 0 < fps <= 50:
        raise ValueError(f"fps={fps}: a GIF plays at more than 0 and at most 50 frames per second")
    ends = [round(Fraction(index) / Fraction(fps) / GIF_TICK) for index in range(len(frames) + 1)]
    durations = [10 * (after - before) for before, after in pairwise(ends)]  # milliseconds
    palette = _palette(frames)
    pictures = [
        Image.fromarray(frame.repeat(scale, axis=0).repeat(scale, axis=1)).quantize(
            palette=palette, dither=Image.Dither.NONE
        )
        for frame in frames
    ]
    first, *others = pictures
    with atomic_write(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=False)


def _palette(frames: NDArray[np.uint8], max_frames: int = 16) -> Image.Image:
    """256 colours for frames spread over the whole clip."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, max_frames).astype(int))]
    return Image.fromarray(np.concatenate(list(chosen), axis=0)).quantize(256, dither=Image.Dither.NONE)


def check_untrusted(
    path: Path, *, max_pixels: int = UNTRUSTED_MAX_PIXELS, max_seconds: float = UNTRUSTED_MAX_SECONDS
) -> VideoInfo:
    """Check a picture or video that a stranger uploaded, before anything decodes it.

    Only plain containers are opened. Others (playlists, concatenations, device names) would make FFmpeg read the files
    or network addresses that they name.
    Raises: ValueError for any other container, a damaged file, or one that is too large.
    """
    try:
        info = probe_video(path, limits=replace(UNTRUSTED, max_pixels=max_pixels))
    except TooLargeError as error:
        problem = str(error).removeprefix(f"{path} ").replace("expected", "send")
        raise ValueError(f"{path.name} {problem}") from None
    except ValueError:
        raise ValueError(f"{path.name} is not a readable picture or video; send png, jpeg, gif or mp4") from None
    if info.duration > max_seconds:
        raise ValueError(f"{path.name} lasts {info.duration:.0f} seconds; send at most {max_seconds:g}")
    return info
