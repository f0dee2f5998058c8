"""Read and write video files: exact timestamps, bounded memory, H.264 and GIF out, checks on files from strangers.

Times are seconds after the stream's start, taken from each frame's own timestamp, so variable frame rates are read as
they are. Nothing here knows of clips or tokens, and nothing resamples in time.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from cogvideo.files import atomic_write

MAX_BYTES = 2**30  # of decoded frames in memory at once
MAX_FRAME_PIXELS = 2**27  # limit for the decoder: frames may be larger than the file's header says
SEEK_MARGIN = 1.0  # seconds; containers index decoding times, which run ahead of presentation times
SMALL = 256 * 256  # pixels; below this, starting codec threads costs more than they save
SAME_TIME = 1e-4  # seconds; far less than a frame's duration, far more than the rounding of a time base
GIF_TICK = Fraction(1, 100)  # seconds; the unit of time in a GIF
UNTRUSTED_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"  # FFmpeg's names
UNTRUSTED_MAX_PIXELS = 16_000_000
UNTRUSTED_MAX_SECONDS = 60.0
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a file's first video stream."""

    width: int
    height: int
    seconds: NDArray[np.float64]
    """(N,) frame times, ascending."""

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the last."""
        return float(self.seconds[-1] - self.seconds[0])


def probe_video(path: str | Path) -> VideoInfo:
    """Read frame times without decoding. Raises: ValueError for a missing, damaged or non-video file."""
    with _open_stream(path) as (container, stream):
        origin, tick = stream.start_time or 0, _tick(stream)
        count, intact, times = 0, True, []
        for packet in container.demux(stream):  # keep none: together packets are as large as the file
            if packet.size:
                count, intact = count + 1, intact and not packet.is_corrupt
                if packet.pts is not None and not packet.is_discard:
                    times.append(packet.pts)
        if not intact or count < stream.frames:
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
    """Decode the frames with `start` <= time <= `end` -> frames (N, H, W, 3) uint8 RGB, and times (N,) in seconds.

    `side` scales each frame's shorter edge to `side` and crops to the centre square while decoding, so a large video is
    never in memory. `only` restricts to the given frame times, ascending, from `probe_video`.
    Raises: ValueError for a missing, damaged or non-video file, an empty span, a frame of `only` that is not found, or
    more than `max_bytes` of frames.
    """
    if only is not None:
        start, end = max(start, float(only[0])), min(end, float(only[-1]))
    reformatter = VideoReformatter()  # one per file, because it caches the scaler
    frames: list[NDArray[np.uint8]] = []
    seconds: list[float] = []
    decoded_bytes = 0
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
            decoded_bytes += frames[-1].nbytes
            if decoded_bytes > max_bytes:
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
    """Yield all frames with their times, scaled and cropped as in `read_video`. Raises: ValueError likewise."""
    reformatter = VideoReformatter()
    with _open_stream(path) as (container, stream):
        origin, tick = stream.start_time or 0, _tick(stream)
        for index, frame in enumerate(container.decode(stream)):
            if frame.pts is None or frame.is_corrupt:
                raise _damaged(path, f"frame {index} cannot be decoded")
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
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
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
        raise ValueError(f"fps={fps}: a GIF plays above 0 and at most 50 frames per second")
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
        with av.open(str(path), options={"format_whitelist": UNTRUSTED_CONTAINERS}):
            pass
        info = probe_video(path)
    except (av.error.FFmpegError, ValueError):
        raise ValueError(f"{path.name} is not a readable picture or video; send png, jpeg, gif or mp4") from None
    if info.width * info.height > max_pixels:
        raise ValueError(f"{path.name} has {info.width}x{info.height} pixels; send at most {max_pixels} in all")
    if info.duration > max_seconds:
        raise ValueError(f"{path.name} lasts {info.duration:.0f} seconds; send at most {max_seconds:g}")
    return info


@contextmanager
def _open_stream(path: str | Path) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """Open a file's first video stream. PyAV's errors, also those in the `with` body, become one-line ValueErrors."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; expected a video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            if stream.width * stream.height <= SMALL:
                stream.codec_context.thread_count = 1
            else:
                stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is not a readable video ({error.strerror}); it may be cut short") from error


def _tick(stream: "av.VideoStream") -> Fraction:
    assert stream.time_base is not None  # opened inputs have one
    return stream.time_base


def _damaged(path: str | Path, problem: str) -> ValueError:
    return ValueError(f"{path} is cut short or damaged: {problem}; copy or convert it again")


def _pixels(frame: "av.VideoFrame", reformatter: VideoReformatter, side: int | None) -> NDArray[np.uint8]:
    """One decoded frame -> (H, W, 3) RGB, scaled and cropped to `side` if given, rotated upright."""
    width, height = frame.width, frame.height
    if side is not None:
        scale = side / min(width, height)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
    image = reformatter.reformat(frame, width, height, "rgb24", interpolation=SCALING, threads=1).to_ndarray()
    if side is not None:
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90) if frame.rotation % 360 else image)
