"""Probes of generated clips of bodies: are they the bodies and the motions that the caption asks for?

They know nothing of the model: pixels, times and the caption's facts go in, what is measured comes out. The same probes
on real clips say how far they can be trusted. A probe that does not apply to an event, or that a clip is too short or
too coarse for, is None and does not count; a body that should be there and is not makes every probe of it fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from cogvideo.evaluation.statistics import Mean, Proportion
from cogvideo.worlds.bodies.measure import SPEED_TOLERANCE, STILL_PX, ClipMeasurements, Facts
from cogvideo.worlds.bodies.tracking import to_reference, track


@dataclass(frozen=True)
class ClipScore:
    """One clip's results; None where a probe does not apply or cannot see."""

    colours: bool
    """The bodies' colours are there, and no other."""
    shapes: bool | None
    """Every body has its shape."""
    mover: bool | None
    """Those bodies move that should, and no other."""
    direction: bool | None
    """The ball, the toppling tower or the camera moves to the side that the caption says."""
    speed_ratio: float | None
    """Measured speed over the caption's: pixels per second of a ball, radians per second of a camera."""
    speed: bool | None
    """Within SPEED_TOLERANCE."""
    depth: bool | None
    """The body in front hides the one behind."""
    contact: bool | None
    """The body that is hit moves on, in the ball's direction, and not before the ball is there."""
    toppled: bool | None
    """The tower lies at the end."""
    landed: bool | None
    """A falling body comes to rest on the floor, or on its partner."""
    bounced: bool | None
    """A bouncing ball comes down and rises again."""
    gravity_ratio: float | None
    """Acceleration of a falling body over the world's."""
    gravity: bool | None
    """Within SPEED_TOLERANCE; a clip long and fine enough that shows no fall is wrong."""
    permanence: bool | None
    """A ball that goes behind a body vanishes and comes out on the other side, in its colour and on time."""
    stray: float | None
    """Pixels that standing bodies stray from their place, the largest."""
    still: bool | None
    """Within STILL_PX."""


BOOLEAN_PROBES = tuple(
    field.name for field in fields(ClipScore) if field.name not in ("speed_ratio", "gravity_ratio", "stray")
)


def score_clip(frames: np.ndarray, facts: Facts, times: np.ndarray) -> ClipScore:
    """Judge one clip: frames (frames, N, N, 3) uint8, N = 64 or a multiple; times (frames,) seconds.

    Raises: ValueError if the shapes do not fit each other.
    """
    if len(frames) != len(times) or len(frames) < 2:
        raise ValueError(f"{len(frames)} frames and {len(times)} times; expected as many, at least 2")
    frames = to_reference(frames)
    clip = ClipMeasurements(track(frames), facts, np.asarray(times, float) - float(times[0]))
    moving_camera = facts.event == "circle"
    speed, gravity = clip.speed_ratio(), clip.gravity_ratio()
    stray = None if moving_camera else clip.stray()
    return ClipScore(
        colours=clip.colours_right(),
        shapes=clip.shapes_right(frames),
        mover=None if moving_camera else clip.movers_right(),
        direction=clip.direction_right(),
        speed_ratio=speed,
        speed=None if speed is None else abs(speed - 1) <= SPEED_TOLERANCE,
        depth=clip.depth_right(),
        contact=clip.contact_right(),
        toppled=clip.toppled(),
        landed=clip.landed(),
        bounced=clip.bounced(),
        gravity_ratio=gravity,
        gravity=clip.gravity_right(gravity),
        permanence=clip.permanence_right(),
        stray=stray,
        still=None if stray is None else stray <= STILL_PX,
    )


@dataclass(frozen=True)
class Summary:
    """What a set of clips scores; every figure with its uncertainty and the number of clips it could be judged on."""

    proportions: dict[str, Proportion]
    """By probe: those of BOOLEAN_PROBES."""
    means: dict[str, Mean]
    """speed_ratio, gravity_ratio, stray; speed_error and gravity_error: how far the ratios are from 1.

    A clip that should show a fall and shows none has no ratio, and an error of 1.
    """
    failed: tuple[str, ...]
    """By clip: the probes that it fails."""

    @property
    def figures(self) -> dict[str, Proportion | Mean]:
        return {**self.proportions, **self.means}

    def to_json(self) -> dict[str, object]:
        return {name: figure.to_json() for name, figure in self.figures.items()}


def summarise(scores: Sequence[ClipScore]) -> Summary:
    """Proportions and means over clips, each over those that the probe could judge."""

    def judged(name: str) -> np.ndarray:
        return np.array([getattr(score, name) for score in scores if getattr(score, name) is not None])

    means = {name: Mean.from_values(judged(name)) for name in ("speed_ratio", "gravity_ratio", "stray")}
    for name in ("speed", "gravity"):
        ratios = [getattr(score, f"{name}_ratio") for score in scores if getattr(score, name) is not None]
        means[f"{name}_error"] = Mean.from_values([1.0 if ratio is None else abs(ratio - 1) for ratio in ratios])
    return Summary(
        {name: Proportion.from_trials(judged(name).astype(bool)) for name in BOOLEAN_PROBES},
        means,
        tuple(", ".join(name for name in BOOLEAN_PROBES if getattr(score, name) is False) for score in scores),
    )
