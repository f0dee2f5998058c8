"""Open and decode media files: which frames a player shows, and when. No other module reads media with FFmpeg.

Times are seconds after the first frame that is shown, from each frame's own timestamp, so variable rates are read as
they are. There are two ways to find them:

- From the packets, without decoding, if their timestamps can be trusted. The first frames are decoded to check this.
  If only some spans of a long mp4 are wanted, only the packets around them are read.
- From all decoded frames, if timestamps are missing, repeated, out of order or restart, or a packet may be damaged.

What is not shown has no time: frames that an edit list hides, and those that cannot be decoded because the stream
begins between key frames. Counts and durations in headers are not used.
"""

import os
import warnings
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, dropwhile
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import PictureType
from numpy.typing import NDArray
from PIL import Image

from cogvideo.media.byte_range import ByteRange, MediaPath, is_file, media_size, media_start, media_url
from cogvideo.media.confinement import allow_memory, within_seconds
from cogvideo.media.pixels import deinterlace

SMALL = 256 * 256  # pixels; below this, starting codec threads costs more than they save
CHECKED_FRAMES = 12  # decoded to check packet timestamps; longer than the usual patterns of B-frames
OPENING_BYTES, BYTES_PER_BYTE = 224 << 20, 32  # memory for opening: an index entry is larger than what it stands for
OPENING_SECONDS, OPENING_SECONDS_PER_MB = 10, 2  # of processor time; sound files take 0.1 s, more on a busy host
FEW_FRAMES, FRAME_BYTES = 1000, 4  # frames that an edit list may repeat; the least bytes of any other
BYTES_PER_PIXEL = 256  # memory for decoding: the frames that a codec refers to and works on
MAX_THREADS = 8  # per file; many files are read at the same time
SEEK_MARGINS = (0.0, 1.0, 10.0, None)  # seconds before a wanted frame, tried in turn; None: from the start of the file
INDEXED_FORMATS = ("mov", "matroska")  # containers with an index, in which seeking and times after it are exact
WORTHWHILE_SKIP = 8  # frames; decoding fewer is cheaper than a seek
DEFAULT_BONUS = 5_000_000  # pixels by which FFmpeg prefers the stream that is marked as the default one
TIMESTAMPS_RESTART = 0x200  # FFmpeg's AVFMT_TS_DISCONT: containers such as MPEG-TS, which can be joined by appending
REORDERED = 32  # frames before a span where reading its packets begins; a codec shifts frames by at most 16
JUMP_BACK, JUMP_AHEAD = 0.1, 10.0  # seconds between packets beyond which FFmpeg takes timestamps to restart
EXIF_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
PICTURE_FORMATS = (*EXIF_FORMATS, "BMP")
EXIF_ORIENTATION = 0x112


class DamagedVideoError(ValueError):
    """A video, or a frame of it, cannot be shown because the file is cut short or damaged."""


class TooLargeError(ValueError):
    """A file's frames are larger or more than the limits allow."""


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
    """Processor time that reading the file may take; None: by its size."""


Spans = tuple[tuple[float, float | None], ...]
"""Parts of a video: (start, end) in seconds after the first frame; None: to the end of the video."""


@dataclass(frozen=True)
class VideoInfo:
    """The frames that a file's video stream shows."""

    width: int
    height: int
    """Stored size in pixels, before rotation; other frames may have other sizes."""
    seconds: NDArray[np.float64]
    """(N,) frame times, ascending, the first 0. If only spans were asked for, others may be missing."""
    key_seconds: NDArray[np.float64]
    """(K,) times of the key frames, ascending; empty if they are unknown or cannot be seeked to exactly."""
    pixel_aspect: Fraction
    """Width of a pixel relative to its height."""
    exif_orientation: int | None
    """1 to 8 for a picture with EXIF data; None: each frame's display matrix says how to turn it."""
    origin: int
    """Timestamp of the first frame, in the stream's ticks."""
    outputs: NDArray[np.int64] | None
    """(N,) the decoder's output that is shown at each time, from 0; None: frames are found by their timestamps."""
    damage: str | None
    """What ends the video early; None: nothing."""

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the last."""
        return float(self.seconds[-1] - self.seconds[0])


def index_frames(
    path: MediaPath, *, spans: Spans | None = None, exact: bool = False, limits: Limits | None = None
) -> VideoInfo:
    """Find a video's frames and their times.

    `spans`: what is wanted; the times of all frames in them are found, and it is not said which others are. None: all.
    `exact`: by decoding everything, whatever the packets say.
    Raises: ValueError for a missing or non-video file, or one of which no frame can be shown.
    """
    info = None
    if not exact and spans is not None:
        info = _index_by_packets(path, spans, limits)
    if not exact and info is None:
        info = _index_by_packets(path, None, limits)
    return info or _index_by_decoding(path, limits)


def decode_frames(
    path: MediaPath, info: VideoInfo, wanted: NDArray[np.float64], *, limits: Limits | None = None
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield the frames at the `wanted` times, which are ascending and of `info`: (time, deinterlaced frame).

    Frames come in the decoder's order, which is that of time unless timestamps are out of order.
    Raises: ValueError if a wanted frame cannot be decoded.
    """
    found = 0
    if info.outputs is not None:
        for time, frame in _decode_by_number(path, info, wanted, limits):
            found += 1
            yield time, frame
    else:
        for margin in SEEK_MARGINS:  # seeking can land late
            if (margin and wanted[found] <= margin) or (margin == 0 and not len(info.key_seconds)):
                continue
            for time, frame in _decode_by_time(path, info, wanted[found:], margin, limits):
                found += 1
                yield time, frame
            if found == len(wanted):
                return
    if found < len(wanted):
        raise damaged(path, f"only {found} of {len(wanted)} wanted frames can be decoded")


def damaged(path: MediaPath, problem: str) -> DamagedVideoError:
    return DamagedVideoError(f"{path} is cut short or damaged: {problem}; copy or convert it again")


@contextmanager
def _open(
    path: MediaPath, limits: Limits | None, *, times_only: bool = False
) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Open a file's video stream. PyAV's errors, also those in the `with` body, become one-line ValueErrors.

    `times_only`: frames may be decoded roughly, since nobody looks at them.
    """
    if not is_file(path):
        raise ValueError(f"{path} is not a file; expected a video")
    limits = limits or Limits()
    size = media_size(path)
    allow_memory(min(limits.memory, OPENING_BYTES + BYTES_PER_BYTE * size))
    options = {
        "pattern_type": "none",  # "a%03d.png" is the name of one file
        "protocol_whitelist": "file,subfile",  # a playlist cannot name other machines
        **{"max_reload": "0", "m3u8_hold_counters": "0"},  # nor wait for more segments
        "max_pixels": str(limits.max_pixels),  # some frames are decoded already while a file is opened
    }
    if limits.containers is not None:
        options["format_whitelist"] = limits.containers
    try:
        with within_seconds(OPENING_SECONDS + OPENING_SECONDS_PER_MB * size // 10**6):
            opened = av.open(media_url(path), options=options)
        with opened as container:
            stream = _choose_stream(path, container)
            if not stream.width * stream.height:  # FFmpeg decodes a picture to find its size
                most = f"frames of more than {limits.max_pixels} pixels"
                raise TooLargeError(f"{path} has no frame that FFmpeg can read, or {most}; expected at most that many")
            if stream.width * stream.height > limits.max_pixels:
                pixels = f"{stream.width}x{stream.height}"
                raise TooLargeError(f"{path} has {pixels} pixels; expected at most {limits.max_pixels} in all")
            if len(stream.index_entries) > (max_frames := _most_frames(path, limits)):
                raise _too_many(path, max_frames)
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
        problem = _instead_of_video(path) or f"is not a readable video ({error.strerror}); it may be cut short"
        raise ValueError(f"{path} {problem}") from error


def _instead_of_video(path: MediaPath) -> str:
    """What a file is that failed to download; empty if it may be a video."""
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


def _most_frames(path: MediaPath, limits: Limits | None) -> int:
    """How many frames a file may have: not more than fit into it, whatever its index claims."""
    return min((limits or Limits()).max_frames, FEW_FRAMES + media_size(path) // FRAME_BYTES)


def _too_many(path: MediaPath, max_frames: int) -> TooLargeError:
    return TooLargeError(f"{path} has too many frames; expected at most {max_frames}")


def _choose_stream(path: MediaPath, container: InputContainer) -> av.VideoStream:
    """The video stream that FFmpeg chooses: no attached picture, and the largest or the default one."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError(f"{path} has no video stream" + (", only a cover picture" if container.streams.video else ""))
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise ValueError(f"{path} has a video codec that FFmpeg does not know; convert it to mp4 first")

    def score(stream: av.VideoStream) -> int:
        return stream.width * stream.height + DEFAULT_BONUS * bool(stream.disposition & Disposition.default)

    return max(known, key=score)  # the first of equals


def _tick(stream: av.VideoStream) -> Fraction:
    assert stream.time_base is not None  # opened inputs have one
    return stream.time_base


def _frame_ticks(stream: av.VideoStream) -> int:
    """The usual duration of a frame, in ticks."""
    return max(1, round(1 / ((stream.guessed_rate or stream.average_rate or 25) * _tick(stream))))


def _frames(
    container: InputContainer, stream: av.VideoStream, packets: Iterator["av.Packet[av.VideoStream]"]
) -> Iterator[av.VideoFrame | None]:
    """Decode packets. None in place of one that cannot be read or decoded."""
    codec = stream.codec_context
    truncates = container.format.name != "mpegts"  # there a marked packet only follows one that was lost
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


class _Timeline:
    """Lets timestamps that restart go on from where they were, as FFmpeg does with joined recordings."""

    def __init__(self, container: InputContainer, stream: av.VideoStream):
        self.offset = 0
        self._may_restart = bool(container.format.flags & TIMESTAMPS_RESTART)
        self._frame_ticks, self._second = _frame_ticks(stream), 1 / _tick(stream)
        self._next: int | None = None

    def shift(self, packet: "av.Packet[av.VideoStream]") -> None:
        """Shift a packet's timestamps, in place. Packets come in order of decoding."""
        if not self._may_restart or packet.dts is None:
            return
        dts = packet.dts + self.offset
        if self._next is not None and not -JUMP_BACK <= (dts - self._next) / self._second <= JUMP_AHEAD:
            self.offset += self._next - dts
            dts = self._next
        self._next = dts + self._frame_ticks
        packet.dts = dts
        if packet.pts is not None:
            packet.pts += self.offset


def _index_by_packets(path: MediaPath, spans: Spans | None, limits: Limits | None) -> VideoInfo | None:
    """Take the times from the packets, of all frames or those of the spans; None if they cannot be trusted."""
    stamps, keys, count = array("q"), array("q"), 0
    checked: list[int | None] = []
    with _open(path, limits, times_only=True) as (container, stream):
        codec, timeline, max_frames = stream.codec_context, _Timeline(container, stream), _most_frames(path, limits)
        indexed = container.format.name.startswith(INDEXED_FORMATS)
        packets = container.demux(stream) if spans is None else _packets_of_spans(container, stream, spans, checked)
        try:
            for packet in packets:  # keep none: together packets are as large as the file
                timeline.shift(packet)
                if packet.is_corrupt or timeline.offset:
                    return None
                if packet.size:
                    count += 1
                    if not packet.is_discard and not _is_hidden(packet, codec):
                        if packet.pts is None:
                            return None
                        stamps.append(packet.pts)
                        if packet.is_keyframe and indexed:
                            keys.append(packet.pts)
                        if len(stamps) > max_frames:
                            raise _too_many(path, max_frames)
                if len(checked) < CHECKED_FRAMES:
                    checked += [frame.pts for frame in codec.decode(packet) if checked or not frame.is_corrupt]
        except (av.error.FFmpegError, _SeekError):
            return None
        pts, origin = np.array(stamps, np.int64), checked[0] if checked else None
        ordered = np.unique(pts)
        in_order = bool(codec.has_b_frames) or np.array_equal(ordered, pts)
        if origin is None or len(ordered) < len(pts) or not in_order:
            return None
        ordered = ordered[ordered >= origin]  # what precedes the first frame that can be decoded is not shown
        if checked != ordered[: len(checked)].tolist() or (
            count < len(stream.index_entries) and _is_cut_short(path, container, stream)
        ):
            return None
        return _video_info(path, container, stream, ordered, np.unique(np.array(keys, np.int64)), None, None)


class _SeekError(Exception):
    """Seeking in a file does not lead to where its index says."""


def _packets_of_spans(
    container: InputContainer, stream: av.VideoStream, spans: Spans, checked: list[int | None]
) -> "Iterator[av.Packet[av.VideoStream]]":
    """Demux the packets of the first frames, until all are in `checked`, and those of the spans, each once.

    Raises: _SeekError unless the file's index is complete and seeking exact.
    """
    entries = stream.index_entries
    if not container.format.name.startswith("mov") or not len(entries):
        raise _SeekError
    margin, reached = REORDERED * _frame_ticks(stream), 0
    for packet in container.demux(stream):
        yield packet
        if packet.dts is None:
            return  # the end of the file
        reached = packet.dts
        if len(checked) >= CHECKED_FRAMES:
            break
    origin, last = checked[0], entries[len(entries) - 1].timestamp
    if origin is None:
        raise _SeekError

    def tick(seconds: float | None) -> float:
        return np.inf if seconds is None else origin + seconds / float(_tick(stream))

    for start, end in sorted((tick(start), tick(end)) for start, end in spans):
        if end < reached:
            continue
        packets: Iterator[av.Packet[av.VideoStream]] = iter(container.demux(stream))
        if reached < (target := start - margin) <= last:
            container.seek(int(target), stream=stream)
            first = next(packets)
            if not first.is_keyframe or first.pts is None or first.pts > start:
                raise _SeekError
            packets = dropwhile(partial(_is_before, reached), chain([first], packets))
        for packet in packets:
            yield packet
            if packet.dts is None:
                return
            if packet.pts is None or packet.pts < packet.dts:
                raise _SeekError
            reached = packet.dts
            if reached > end:
                break


def _is_before(reached: int, packet: "av.Packet[av.VideoStream]") -> bool:
    """Whether a packet after a seek has been read before it."""
    return packet.dts is not None and packet.dts <= reached


def _index_by_decoding(path: MediaPath, limits: Limits | None) -> VideoInfo:
    """Take the times from the frames, up to the first that cannot be decoded."""
    pts: list[int | None] = []
    outputs, stamps = array("q"), array("q")
    output, reordered, damage = -1, False, None
    with _open(path, limits, times_only=True) as (container, stream):
        timeline, max_frames = _Timeline(container, stream), _most_frames(path, limits)

        def packets() -> Iterator["av.Packet[av.VideoStream]"]:
            for packet in container.demux(stream):
                timeline.shift(packet)
                stamp = packet.dts if packet.pts is None else packet.pts
                if packet.size and not packet.is_discard and stamp is not None:
                    stamps.append(stamp)
                yield packet

        for frame in _frames(container, stream, packets()):
            output += frame is not None
            if frame is not None and not frame.is_corrupt:
                pts.append(frame.pts)
                outputs.append(output)
                if len(pts) > max_frames:
                    raise _too_many(path, max_frames)
                reordered |= frame.pict_type == PictureType.B
            elif pts:  # no damage before the first good frame: the stream may begin between key frames
                damage = f"frame {len(pts)} cannot be decoded"
                break
        if not pts:
            raise damaged(path, "no frame can be decoded")
        if damage is None and _is_cut_short(path, container, stream):
            damage = f"it ends after {len(pts)} frames"
        times, shown = _presentation_times(pts, np.array(stamps, np.int64), reordered, _frame_ticks(stream))
        by_number = pts != times.tolist() or timeline.offset != 0
        numbers = np.array(outputs, np.int64)[shown] if by_number else None
        return _video_info(path, container, stream, times, np.zeros(0, np.int64), numbers, damage)


def _presentation_times(
    pts: list[int | None], stamps: NDArray[np.int64], reordered: bool, frame_ticks: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Times of the frames that a decoder put out -> ascending times in ticks, and the frame shown at each.

    `stamps`: the packets' timestamps. `reordered`: whether the codec reorders frames, so that they come out in the
    order in which they are shown, whatever their timestamps.
    """
    count = len(pts)
    known = [stamp for stamp in pts if stamp is not None]
    filled: list[int] = []
    for stamp in pts:
        before = filled[-1] if filled else (known[0] if known else 0) - frame_ticks
        filled.append(before + frame_ticks if stamp is None else stamp)
    times = np.array(filled, np.int64)
    if reordered and (np.diff(times) < 0).any():  # times of decoding, as containers without others have them
        stamps = np.unique(stamps)
        even = times.min() + frame_ticks * np.arange(count)
        return (stamps if len(stamps) == count else even), np.arange(count)
    times, shown = np.unique(times, return_index=True)  # of frames with equal times the first
    return times, shown


def _is_hidden(packet: "av.Packet[av.VideoStream]", codec: av.VideoCodecContext) -> bool:
    """Whether a packet of VP8 holds a frame that is only referred to."""
    return codec.codec.canonical_name == "vp8" and not memoryview(packet)[0] >> 4 & 1


def _is_cut_short(path: MediaPath, container: InputContainer, stream: av.VideoStream) -> bool:
    """Whether an mp4's index names frames beyond the end of the file."""
    size = media_size(path)
    return container.format.name.startswith("mov") and any(
        entry.pos + entry.size > size for entry in stream.index_entries
    )


def _video_info(
    path: MediaPath,
    container: InputContainer,
    stream: av.VideoStream,
    ticks: NDArray[np.int64],
    key_ticks: NDArray[np.int64],
    outputs: NDArray[np.int64] | None,
    damage: str | None,
) -> VideoInfo:
    tick, is_picture = _tick(stream), container.format.name.endswith(("_pipe", "image2"))

    def seconds(ticks_: NDArray[np.int64]) -> NDArray[np.float64]:
        return (ticks_ - ticks[0]) * tick.numerator / tick.denominator

    return VideoInfo(
        width=stream.width,
        height=stream.height,
        seconds=seconds(ticks),
        key_seconds=seconds(key_ticks[key_ticks >= ticks[0]]),
        # In a picture this is the printer's business.
        pixel_aspect=Fraction(1) if is_picture else stream.sample_aspect_ratio or Fraction(1),
        exif_orientation=_exif_orientation(path) if is_picture else None,
        origin=int(ticks[0]),
        outputs=outputs,
        damage=damage,
    )


def read_picture(path: Path, limits: Limits) -> NDArray[np.uint8]:
    """A picture's pixels (H, W, 3) in RGB as Pillow decodes them: as stored, without its orientation or transparency.

    Raises: ValueError.
    """
    try:
        memory = OPENING_BYTES + BYTES_PER_BYTE * media_size(path)
        allow_memory(min(limits.memory, memory))
        with warnings.catch_warnings(), Image.open(path, formats=PICTURE_FORMATS) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its limit is not ours
            pixels = picture.width * picture.height
            if pixels > limits.max_pixels:
                raise ValueError(f"{picture.width}x{picture.height} pixels; expected at most {limits.max_pixels}")
            allow_memory(min(limits.memory, memory + BYTES_PER_PIXEL * pixels))
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable picture ({str(error)[:200]})") from None


def _exif_orientation(path: MediaPath) -> int | None:
    if isinstance(path, ByteRange):
        return None  # a picture under the name of a video
    try:
        with Image.open(path, formats=EXIF_FORMATS) as picture:
            orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return orientation if orientation in range(1, 9) else 1


def _decode_by_number(
    path: MediaPath, info: VideoInfo, wanted: NDArray[np.float64], limits: Limits | None
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decode from the start and count. Ends early if a wanted frame cannot be decoded."""
    assert info.outputs is not None
    places = np.searchsorted(info.seconds, wanted)
    times = {int(info.outputs[place]): float(info.seconds[place]) for place in places}
    with _open(path, limits) as (container, stream):
        frames = (frame for frame in _frames(container, stream, container.demux(stream)) if frame is not None)
        yield from _select(((times.get(number), frame) for number, frame in enumerate(frames)), len(times))


def _decode_by_time(
    path: MediaPath, info: VideoInfo, wanted: NDArray[np.float64], margin: float | None, limits: Limits | None
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decode from the key frame that is `margin` seconds before the first wanted frame, or from the start.

    Seeks again where wanted frames are far apart. Ends early if a frame is damaged or missing.
    """
    with _open(path, limits) as (container, stream):
        targets = {info.origin + round(time / _tick(stream)): time for time in wanted.tolist()}
        yield from _select(_timed_frames(container, stream, info, targets, margin), len(targets))


def _timed_frames(
    container: InputContainer, stream: av.VideoStream, info: VideoInfo, targets: dict[int, float], margin: float | None
) -> Iterator[tuple[float | None, av.VideoFrame]]:
    """What `_decode_by_time` decodes: each frame, and its time if its timestamp is one of `targets`."""
    tick = _tick(stream)
    keys = (info.origin + np.rint(info.key_seconds / float(tick))).astype(np.int64)
    back = 0 if margin is None else round(margin / tick)
    worthwhile = WORTHWHILE_SKIP * _frame_ticks(stream)
    awaited = list(targets)[::-1]
    seek = awaited[-1] - back if margin is not None and awaited[-1] - back > info.origin else None
    lean = margin == 0 and stream.codec_context.codec.canonical_name == "h264"
    can_skip, reached, skip_to = margin is not None, info.origin, info.origin
    while True:
        packets = container.demux(stream)
        if seek is not None:
            container.seek(seek, stream=stream)
            packets = dropwhile(lambda packet: packet.size and not packet.is_keyframe, packets)
        if lean:
            packets = _skip_unreferenced(packets, stream.codec_context, targets)
        started = False
        for frame in _frames(container, stream, packets):
            if not started and seek is not None and frame is not None and not frame.key_frame:
                continue  # after a seek, what is shown before the key frame may refer to frames before it
            if frame is None or frame.is_corrupt or frame.pts is None:
                if started:
                    return
                continue
            if frame.interlaced_frame and frame.pts in targets and (lean or (seek is not None and not started)):
                return  # deinterlacing needs the frames before and after
            if not started:
                can_skip &= frame.pts >= reached  # where seeking lands early, the same would be decoded many times
                started = True
            if awaited and frame.pts > awaited[-1]:
                return
            if awaited and frame.pts == awaited[-1]:
                awaited.pop()
                if awaited and can_skip:
                    before = np.searchsorted(keys, awaited[-1] - back, "right")
                    skip_to = int(keys[before - 1]) if before else info.origin
            waits = frame.interlaced_frame and frame.pts in targets  # for the frame after it
            skips = bool(awaited) and can_skip and not waits and frame.pts + worthwhile < skip_to
            reached = frame.pts  # deinterlacing changes it
            yield targets.get(reached), frame
            if skips:
                seek = awaited[-1] - back
                break
        else:
            return


def _skip_unreferenced(
    packets: Iterator["av.Packet[av.VideoStream]"], codec: av.VideoCodecContext, targets: dict[int, float]
) -> Iterator["av.Packet[av.VideoStream]"]:
    """Let the decoder leave out frames that are not wanted and that no other frame refers to."""
    for packet in packets:
        codec.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
        yield packet


def _select(frames: Iterator[tuple[float | None, av.VideoFrame]], count: int) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield the `count` frames that have a time, deinterlaced with the help of the frames around them."""
    before: av.VideoFrame | None = None
    waiting: tuple[float, av.VideoFrame | None, av.VideoFrame] | None = None  # for the frame after it
    for time, frame in frames:
        if waiting is not None:
            yield waiting[0], deinterlace(waiting[1], waiting[2], frame)
            count, waiting = count - 1, None
        if time is not None and frame.interlaced_frame:
            waiting = time, before, frame
        elif time is not None:
            yield time, frame
            count -= 1
        if not count:
            return
        before = frame
    if waiting is not None:
        yield waiting[0], deinterlace(waiting[1], waiting[2], None)
