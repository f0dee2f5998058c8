"""Decode the frames at given times, seeking where that saves decoding."""

from collections.abc import Iterator
from itertools import dropwhile

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from cogvideo.media.byte_range import MediaPath
from cogvideo.media.container import Limits, damaged, decode_packets, frame_ticks_of, open_video, tick_of
from cogvideo.media.frame_index import VideoInfo
from cogvideo.media.pixels import deinterlace

SEEK_MARGINS = (0.0, 1.0, 10.0, None)  # seconds before a wanted frame, tried in turn; None: from the start of the file
WORTHWHILE_SKIP = 8  # frames; decoding fewer is cheaper than a seek


def decode_frames(
    path: MediaPath, info: VideoInfo, wanted: NDArray[np.float64], *, limits: Limits | None = None
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield the frames at the `wanted` times, which are ascending and taken from `info`: (time, deinterlaced frame).

    Frames come in the decoder's order, which is chronological unless timestamps are out of order.
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


def _decode_by_number(
    path: MediaPath, info: VideoInfo, wanted: NDArray[np.float64], limits: Limits | None
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decode from the start, counting frames. Ends early if a wanted frame cannot be decoded."""
    assert info.outputs is not None
    places = np.searchsorted(info.seconds, wanted)
    times = {int(info.outputs[place]): float(info.seconds[place]) for place in places}
    with open_video(path, limits) as (container, stream):
        frames = (frame for frame in decode_packets(container, stream, container.demux(stream)) if frame is not None)
        yield from _select(((times.get(number), frame) for number, frame in enumerate(frames)), len(times))


def _decode_by_time(
    path: MediaPath, info: VideoInfo, wanted: NDArray[np.float64], margin: float | None, limits: Limits | None
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decode from the last key frame at least `margin` seconds before the first wanted frame, or from the start.

    Seeks again where wanted frames are far apart. Ends early if a frame is damaged or missing.
    """
    with open_video(path, limits) as (container, stream):
        targets = {info.origin + round(time / tick_of(stream)): time for time in wanted.tolist()}
        yield from _select(_timed_frames(container, stream, info, targets, margin), len(targets))


def _timed_frames(
    container: InputContainer, stream: av.VideoStream, info: VideoInfo, targets: dict[int, float], margin: float | None
) -> Iterator[tuple[float | None, av.VideoFrame]]:
    """What `_decode_by_time` decodes: each frame, and its time if its timestamp is one of `targets`."""
    tick = tick_of(stream)
    keys = (info.origin + np.rint(info.key_seconds / float(tick))).astype(np.int64)
    back = 0 if margin is None else round(margin / tick)
    worthwhile = WORTHWHILE_SKIP * frame_ticks_of(stream)
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
        for frame in decode_packets(container, stream, packets):
            if not started and seek is not None and frame is not None and not frame.key_frame:
                continue  # after a seek, frames shown before the key frame may refer to missing ones
            if frame is None or frame.is_corrupt or frame.pts is None:
                if started:
                    return
                continue
            if frame.interlaced_frame and frame.pts in targets and (lean or (seek is not None and not started)):
                return  # deinterlacing needs the frames before and after
            if not started:
                can_skip &= frame.pts >= reached  # where seeking lands early, frames would be decoded repeatedly
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
