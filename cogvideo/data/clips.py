"""Which frames make which clips: CogVideo's multi-frame-rate sampling, as values. It sees times, never pixels.

A clip of `seconds` is `num_frames` frames evenly spread over that span, both ends included: the clip length, written
before the caption, is the paper's frame-rate token. Source: CogVideo (2205.15868) section 3.1, "the lowest frame rate
at which five frames can be sampled", so that a clip spans the whole action that its text describes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClipConfig:
    """How clips are cut from a captioned span of video."""

    clip_seconds: tuple[float, ...] = (16.0, 8.0, 4.0, 2.0, 1.0)
    """Preset clip lengths in seconds: the frame rates that the model learns."""
    policy: Literal["lowest", "all"] = "lowest"
    """lowest: the longest length that fits (the lowest frame rate), as in the paper; all: every length that fits."""
    num_frames: int = 5
    """Frames a clip."""
    max_clips_per_length: int = 4
    """Clips of one length from one captioned span, their starts evenly spread; 4 as published."""
    tolerance: float = 0.25
    """How far a frame may lie from its wanted time, as a part of the time between two frames of the clip."""
    cut_threshold: float | None = None
    """Cuts between shots are looked for, and no clip spans one: the mean change of a pixel, of 255, that counts as one
    (PySceneDetect's own is 27; needs the extra `[data]`). Each shot is a span of its own. null: not looked for."""

    def __post_init__(self) -> None:
        if not self.clip_seconds or min(self.clip_seconds) <= 0:
            raise ValueError(f"clip_seconds={list(self.clip_seconds)}; expected lengths above 0 seconds")
        if self.num_frames < 2:
            raise ValueError(f"num_frames={self.num_frames}; a clip needs at least 2 frames")
        if self.max_clips_per_length < 1:
            raise ValueError(f"max_clips_per_length={self.max_clips_per_length}; expected at least 1")
        if self.cut_threshold is not None and self.cut_threshold <= 0:
            raise ValueError(f"cut_threshold={self.cut_threshold}; expected above 0, or null to look for no cuts")
        if not 0 < self.tolerance < 0.5:
            raise ValueError(f"tolerance={self.tolerance}; expected above 0 and below 0.5, else frames could repeat")


@dataclass(frozen=True)
class Clip:
    """One clip of a video."""

    seconds: float
    """Its preset length."""
    frames: tuple[int, ...]
    """Indices into the video's frame times, ascending, all different."""


def plan_clips(
    times: NDArray[np.float64], config: ClipConfig, start: float = 0.0, end: float | None = None
) -> list[Clip]:
    """Choose the clips of one captioned span of a video; longest first, then by start.

    `times` (N,) are the video's frame times in seconds, ascending, at any rate. A length fits to the end of the last
    frame's display, so 100 frames at 25 a second hold a clip of 4 s. An empty list: no length fits.
    """
    inside = _inside(times, start, end)
    if len(inside) < config.num_frames:
        return []
    span = times[inside]
    shown = float(np.median(np.diff(span)))  # how long the last frame stays on screen
    clips: list[Clip] = []
    for seconds in sorted(set(config.clip_seconds), reverse=True):
        slack = float(span[-1] - span[0]) - seconds
        if slack < -shown - 1e-6:
            continue
        found: dict[tuple[int, ...], Clip] = {}
        for wanted in np.linspace(span[0], span[0] + max(slack, 0.0), config.max_clips_per_length):
            first = _nearest(span, np.array([wanted]))[0]
            picked = pick_frames(span, float(span[first]), seconds, config)
            if picked is not None:
                frames = tuple(int(inside[index]) for index in picked)
                found[frames] = Clip(seconds, frames)
        clips += found.values()
        if found and config.policy == "lowest":
            break
    return clips


def plan_frames(times: NDArray[np.float64], count: int, start: float = 0.0, end: float | None = None) -> list[Clip]:
    """Up to `count` single frames of a captioned span, evenly spread by number: clips of one frame and 0 seconds."""
    inside = _inside(times, start, end)
    spread = np.rint(np.linspace(0, len(inside) - 1, min(count, len(inside)))).astype(int)
    return [Clip(0.0, (int(frame),)) for frame in inside[spread]]


def pick_frames(
    times: NDArray[np.float64], start: float, seconds: float, config: ClipConfig
) -> NDArray[np.int64] | None:
    """The frame nearest to each of the clip's evenly spread times -> indices, or None if one is too far off."""
    wanted = start + np.linspace(0.0, seconds, config.num_frames)
    indices = _nearest(times, wanted)
    spacing = seconds / (config.num_frames - 1)
    close = np.abs(times[indices] - wanted) <= config.tolerance * spacing + 1e-6
    return indices if close.all() and (np.diff(indices) > 0).all() else None


def _nearest(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the nearest time, the earlier one on a tie."""
    right = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    return np.where(wanted - times[right - 1] <= times[right] - wanted, right - 1, right)


def _inside(times: NDArray[np.float64], start: float, end: float | None) -> NDArray[np.int64]:
    """Indices of the frames in a span."""
    return np.flatnonzero((times >= start - 1e-6) & (times <= (np.inf if end is None else end) + 1e-6))
