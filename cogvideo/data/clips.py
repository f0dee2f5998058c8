"""Chooses which frames of a video make up which clips: CogVideo's multi-frame-rate sampling. Reads times, not pixels.

A clip of `seconds` has `num_frames` frames spread evenly over that span, both ends included. The clip length, written
before the caption, is the paper's frame-rate token. Source: CogVideo (2205.15868) section 3.1, "the lowest frame rate
at which five frames can be sampled", so that a clip spans the whole action that its text describes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TIME_TOLERANCE = 1e-6
"""Seconds; absorbs rounding of timestamps."""


@dataclass(frozen=True)
class ClipConfig:
    """How clips are cut from a captioned span of video."""

    clip_seconds: tuple[float, ...] = (16.0, 8.0, 4.0, 2.0, 1.0)
    """Clip lengths in seconds, that is, the frame rates that the model learns."""
    policy: Literal["lowest", "all"] = "lowest"
    """lowest: the longest length that fits (the lowest frame rate), as in the paper; all: every length that fits."""
    num_frames: int = 5
    """Frames per clip."""
    max_clips_per_length: int = 4
    """Maximum number of clips of one length from one captioned span, with evenly spread starts; 4 as published."""
    tolerance: float = 0.25
    """How far a frame's time may be off, as a fraction of the time between two frames of the clip."""
    cut_threshold: float | None = None
    """Detect cuts between shots, and treat each shot as a span of its own, so that no clip crosses a cut. The value is
    the mean change per pixel, out of 255, that counts as a cut (PySceneDetect's default is 27; needs the extra
    `[data]`). null: no detection."""
    min_motion: float | None = None
    """Leave out near-static clips: those whose consecutive frames have a mean absolute pixel difference, out of 255,
    below this. `prepare --report` shows the values of your clips. null: keep all."""
    min_distance: float | None = None
    """Leave out near-duplicates: clips whose frames, averaged to 8x8 pixels, differ from those of a clip of an earlier
    video in the same shard (see `videos_per_shard`) by a mean absolute difference, out of 255, below this. null: keep
    all."""

    def __post_init__(self) -> None:
        if not self.clip_seconds or min(self.clip_seconds) <= 0:
            raise ValueError(f"clip_seconds={list(self.clip_seconds)}; expected lengths above 0 seconds")
        if self.num_frames < 2:
            raise ValueError(f"num_frames={self.num_frames}; a clip needs at least 2 frames")
        if self.max_clips_per_length < 1:
            raise ValueError(f"max_clips_per_length={self.max_clips_per_length}; expected at least 1")
        if self.cut_threshold is not None and self.cut_threshold <= 0:
            raise ValueError(f"cut_threshold={self.cut_threshold}; expected above 0, or null for no cut detection")
        if self.min_motion is not None and not 0 < self.min_motion <= 255:
            raise ValueError(f"min_motion={self.min_motion}; expected above 0, at most 255, or null to keep all")
        if self.min_distance is not None and not 0 < self.min_distance <= 64:
            raise ValueError(
                f"min_distance={self.min_distance}; expected above 0, at most 64, or null to keep all clips"
            )
        if not 0 < self.tolerance < 0.5:
            raise ValueError(f"tolerance={self.tolerance}; expected above 0 and below 0.5, else frames could repeat")


@dataclass(frozen=True)
class Clip:
    """One clip of a video."""

    seconds: float
    """Its nominal length; 0 for a single frame."""
    frames: tuple[int, ...]
    """Indices into the video's frame times, strictly ascending."""


def plan_clips(
    times: NDArray[np.float64], config: ClipConfig, start: float = 0.0, end: float | None = None
) -> list[Clip]:
    """Choose the clips of one captioned span: longest first, then by start. Empty if no length fits.

    Shapes: times (N,), the video's frame times in seconds, ascending, at any rate.
    The last frame's display time counts, so 100 frames at 25 per second hold a clip of 4 s.
    """
    in_span = _frames_in_span(times, start, end)
    if len(in_span) < config.num_frames:
        return []
    span = times[in_span]
    last_frame_seconds = float(np.median(np.diff(span)))
    clips: list[Clip] = []
    for seconds in sorted(set(config.clip_seconds), reverse=True):
        slack = float(span[-1] - span[0]) - seconds
        if slack < -last_frame_seconds - TIME_TOLERANCE:
            continue
        found: dict[tuple[int, ...], Clip] = {}  # keyed by frames: different starts may pick the same ones
        for clip_start in np.linspace(span[0], span[0] + max(slack, 0.0), config.max_clips_per_length):
            first = _nearest(span, np.array([clip_start]))[0]
            picked = pick_frames(span, float(span[first]), seconds, config)
            if picked is not None:
                frames = tuple(int(in_span[index]) for index in picked)
                found[frames] = Clip(seconds, frames)
        clips += found.values()
        if found and config.policy == "lowest":
            break
    return clips


def rate_problem(
    times: NDArray[np.float64], config: ClipConfig, start: float = 0.0, end: float | None = None
) -> str | None:
    """Why a captioned span yields no clip although it is long enough for one; None if it is too short.

    Shapes: times (N,), the video's frame times in seconds, ascending.
    """
    span = times[_frames_in_span(times, start, end)]
    if len(span) < 2:
        return None
    frame_seconds, shortest = float(np.median(np.diff(span))), min(config.clip_seconds)
    if float(span[-1] - span[0]) + frame_seconds < shortest - TIME_TOLERANCE:
        return None
    rate, wanted = 1 / frame_seconds, (config.num_frames - 1) / shortest
    advice = "raise clips.tolerance (below 0.5) or clips.clip_seconds" if rate >= wanted else "raise clips.clip_seconds"
    return (
        f"its {rate:.4g} frames per second do not allow {config.num_frames} frames evenly spread over {shortest:g} s "
        f"({wanted:.4g} per second); {advice}"
    )


def plan_frames(times: NDArray[np.float64], count: int, start: float = 0.0, end: float | None = None) -> list[Clip]:
    """Choose up to `count` single frames of a captioned span, evenly spread by index, as one-frame clips of 0 s."""
    in_span = _frames_in_span(times, start, end)
    spread = np.rint(np.linspace(0, len(in_span) - 1, min(count, len(in_span)))).astype(int)
    return [Clip(0.0, (int(frame),)) for frame in in_span[spread]]


def pick_frames(
    times: NDArray[np.float64], start: float, seconds: float, config: ClipConfig
) -> NDArray[np.int64] | None:
    """Indices of the frames nearest to the clip's evenly spread times; None if one is further off than `tolerance`."""
    wanted = start + np.linspace(0.0, seconds, config.num_frames)
    indices = _nearest(times, wanted)
    spacing = seconds / (config.num_frames - 1)
    close = np.abs(times[indices] - wanted) <= config.tolerance * spacing + TIME_TOLERANCE
    return indices if close.all() and (np.diff(indices) > 0).all() else None


def _nearest(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the nearest time, the earlier one on a tie."""
    right = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    return np.where(wanted - times[right - 1] <= times[right] - wanted, right - 1, right)


def _frames_in_span(times: NDArray[np.float64], start: float, end: float | None) -> NDArray[np.int64]:
    """Indices of the frames with start <= time <= end."""
    after = times >= start - TIME_TOLERANCE
    return np.flatnonzero(after & (times <= (np.inf if end is None else end) + TIME_TOLERANCE))
