"""Which frames a player shows, and when.

Times are seconds after the first frame that is shown, from each frame's own timestamp, so variable frame rates are kept
as they are. There are two ways to find them:

- From the packets, without decoding, if their timestamps can be trusted. The first frames are decoded to check this.
  If only some spans of a long mp4 are wanted, only the packets around them are read.
- From all decoded frames, if timestamps are missing, repeated, out of order or restart, or a packet may be damaged.

What is not shown has no time: frames that an edit list hides, and those that cannot be decoded because the stream
begins between key frames. Counts and durations in headers are not used.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, dropwhile

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import PictureType
from numpy.typing import NDArray

from cogvideo.media.byte_range import MediaPath
from cogvideo.media.container import (
    Limits,
    damaged,
    decode_packets,
    exif_orientation_of,
    frame_ticks_of,
    most_frames,
    open_video,
    tick_of,
    too_many,
)
from cogvideo.media.truncation import is_cut_short

CHECKED_FRAMES = 12  # decoded to check packet timestamps; longer than the usual patterns of B-frames
INDEXED_FORMATS = ("mov", "matroska")  # containers with an index; seeks, and timestamps after them, are exact
TIMESTAMPS_RESTART = 0x200  # FFmpeg's AVFMT_TS_DISCONT: containers such as MPEG-TS, which can be joined by appending
REORDERED = 32  # frames before a span at which to start reading packets; a codec shifts frames by at most 16
JUMP_BACK, JUMP_AHEAD = 0.1, 10.0  # seconds between packets beyond which FFmpeg takes timestamps to restart

Spans = tuple[tuple[float, float | None], ...]
"""Parts of a video: (start, end) in seconds after the first frame; None: to the end of the video."""


@dataclass(frozen=True)
class VideoInfo:
    """The frames that a file's video stream shows."""

    width: int
    height: int
    """Stored size in pixels, before rotation; individual frames may have other sizes."""
    seconds: NDArray[np.float64]
    """(N,) frame times, ascending, the first 0. If only spans were requested, frames outside them may be missing."""
    key_seconds: NDArray[np.float64]
    """(K,) times of the key frames, ascending; empty if they are unknown or cannot be seeked to exactly."""
    pixel_aspect: Fraction
    """Width of a pixel relative to its height."""
    exif_orientation: int | None
    """1 to 8 for a picture in a format with EXIF data; None: each frame's display matrix says how to turn it."""
    origin: int
    """Timestamp of the first frame, in the stream's ticks."""
    outputs: NDArray[np.int64] | None
    """(N,) index of the decoder output shown at each time, from 0; None: frames are found by their timestamps."""
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

    `spans`: the wanted parts; the times of all frames in them are found, and those of others may be. None: everything.
    `exact`: decode everything, whatever the packets say.
    Raises: ValueError for a missing or non-video file, or one without a frame that can be shown.
    """
    info = None
    if not exact and spans is not None:
        info = _index_by_packets(path, spans, limits)
    if not exact and info is None:
        info = _index_by_packets(path, None, limits)
    return info or _index_by_decoding(path, limits)


def _index_by_packets(path: MediaPath, spans: Spans | None, limits: Limits | None) -> VideoInfo | None:
    """Take the times from the packets, of all frames or those of the spans; None if they cannot be trusted."""
    stamps, keys, count = array("q"), array("q"), 0
    checked: list[int | None] = []
    with open_video(path, limits, times_only=True) as (container, stream):
        codec, timeline, max_frames = stream.codec_context, _Timeline(container, stream), most_frames(path, limits)
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
                            raise too_many(path, max_frames)
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
        # an mp4 is complete if no packet that its index lists is missing
        may_lack = not container.format.name.startswith("mov") or count < len(stream.index_entries)
        if checked != ordered[: len(checked)].tolist() or (may_lack and is_cut_short(path, container, stream)):
            return None
        return _video_info(path, container, stream, ordered, np.unique(np.array(keys, np.int64)), None, None)


class _SeekError(Exception):
    """Seeking in a file does not lead where its index says."""


def _packets_of_spans(
    container: InputContainer, stream: av.VideoStream, spans: Spans, checked: list[int | None]
) -> "Iterator[av.Packet[av.VideoStream]]":
    """Demux the packets of the first frames, until `checked` has CHECKED_FRAMES, and those of the spans, each once.

    Raises: _SeekError unless the file's index is complete and seeking exact.
    """
    entries = stream.index_entries
    if not container.format.name.startswith("mov") or not len(entries):
        raise _SeekError
    margin, reached = REORDERED * frame_ticks_of(stream), 0
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
        return np.inf if seconds is None else origin + seconds / float(tick_of(stream))

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
    """Whether a packet that follows a seek was already read before the seek."""
    return packet.dts is not None and packet.dts <= reached


def _index_by_decoding(path: MediaPath, limits: Limits | None) -> VideoInfo:
    """Take the times from the frames, up to the first that cannot be decoded."""
    pts: list[int | None] = []
    outputs, stamps = array("q"), array("q")
    output, reordered, damage = -1, False, None
    with open_video(path, limits, times_only=True) as (container, stream):
        timeline, max_frames = _Timeline(container, stream), most_frames(path, limits)

        def packets() -> Iterator["av.Packet[av.VideoStream]"]:
            for packet in container.demux(stream):
                timeline.shift(packet)
                stamp = packet.dts if packet.pts is None else packet.pts
                if packet.size and not packet.is_discard and stamp is not None:
                    stamps.append(stamp)
                yield packet

        for frame in decode_packets(container, stream, packets()):
            output += frame is not None
            if frame is not None and not frame.is_corrupt:
                pts.append(frame.pts)
                outputs.append(output)
                if len(pts) > max_frames:
                    raise too_many(path, max_frames)
                reordered |= frame.pict_type == PictureType.B
            elif pts:  # not damage before the first good frame: the stream may begin between key frames
                damage = f"frame {len(pts)} cannot be decoded"
                break
        if not pts:
            raise damaged(path, "no frame can be decoded")
        if damage is None and is_cut_short(path, container, stream):
            damage = f"it ends after {len(pts)} frames"
        times, shown = _presentation_times(pts, np.array(stamps, np.int64), reordered, frame_ticks_of(stream))
        by_number = pts != times.tolist() or timeline.offset != 0
        numbers = np.array(outputs, np.int64)[shown] if by_number else None
        return _video_info(path, container, stream, times, np.zeros(0, np.int64), numbers, damage)


def _presentation_times(
    pts: list[int | None], stamps: NDArray[np.int64], reordered: bool, frame_ticks: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Timestamps of a decoder's output frames -> ascending times in ticks, and the index of the frame shown at each.

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
    if reordered and (np.diff(times) < 0).any():  # decoding times, the only ones that some containers have
        stamps = np.unique(stamps)
        even = times.min() + frame_ticks * np.arange(count)
        return (stamps if len(stamps) == count else even), np.arange(count)
    times, shown = np.unique(times, return_index=True)  # of frames with equal times, the first
    return times, shown


class _Timeline:
    """Makes timestamps that restart continue from where they left off, as FFmpeg does with joined recordings."""

    def __init__(self, container: InputContainer, stream: av.VideoStream):
        self.offset = 0
        self._may_restart = bool(container.format.flags & TIMESTAMPS_RESTART)
        self._frame_ticks, self._second = frame_ticks_of(stream), 1 / tick_of(stream)
        self._next: int | None = None

    def shift(self, packet: "av.Packet[av.VideoStream]") -> None:
        """Shift a packet's timestamps, in place. Packets come in decoding order."""
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


def _is_hidden(packet: "av.Packet[av.VideoStream]", codec: av.VideoCodecContext) -> bool:
    """Whether a VP8 packet holds a frame that is never shown, only referred to."""
    return codec.codec.canonical_name == "vp8" and not memoryview(packet)[0] >> 4 & 1


def _video_info(
    path: MediaPath,
    container: InputContainer,
    stream: av.VideoStream,
    ticks: NDArray[np.int64],
    key_ticks: NDArray[np.int64],
    outputs: NDArray[np.int64] | None,
    damage: str | None,
) -> VideoInfo:
    tick, is_picture = tick_of(stream), container.format.name.endswith(("_pipe", "image2"))

    def seconds(ticks_: NDArray[np.int64]) -> NDArray[np.float64]:
        return (ticks_ - ticks[0]) * tick.numerator / tick.denominator

    return VideoInfo(
        width=stream.width,
        height=stream.height,
        seconds=seconds(ticks),
        key_seconds=seconds(key_ticks[key_ticks >= ticks[0]]),
        # In a picture, the pixel aspect only matters for printing.
        pixel_aspect=Fraction(1) if is_picture else stream.sample_aspect_ratio or Fraction(1),
        exif_orientation=exif_orientation_of(path) if is_picture else None,
        origin=int(ticks[0]),
        outputs=outputs,
        damage=damage,
    )
