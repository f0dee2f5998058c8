"""Probes of generated clips of bodies: do they show the bodies and the motions that the caption asks for?

Probes are independent of the model: their inputs are pixels, times and the caption's facts. Run on real clips, they
show how far they can be trusted. A probe that does not apply to an event, or for which a clip is too short or its
frames are too far apart, is None and does not count; if a body is missing, every probe of it fails.
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
    """One clip's results; None where a probe does not apply or cannot judge the clip."""

    colours: bool
    """The bodies' colours appear, and no others."""
    shapes: bool | None
    """Every body has the shape that the caption names."""
    mover: bool | None
    """The bodies that should move do, and no others."""
    direction: bool | None
    """The ball, the toppling tower or the camera moves to the side that the caption says."""
    speed_ratio: float | None
    """Measured speed divided by the caption's, in pixels per second for a ball, radians per second for a camera."""
    speed: bool | None
    """The ratio is within SPEED_TOLERANCE of 1."""
    depth: bool | None
    """The body in front hides the one behind."""
    contact: bool | None
    """The body that is hit moves in the ball's direction, and not before the ball reaches it."""
    toppled: bool | None
    """The tower has fallen over by the end."""
    landed: bool | None
    """A falling body comes to rest on the floor, or on its partner."""
    bounced: bool | None
    """A bouncing ball comes down and rises again."""
    gravity_ratio: float | None
    """Acceleration of a falling body divided by the world's gravity."""
    gravity: bool | None
    """The ratio is within SPEED_TOLERANCE of 1; False if no fall is seen in a clip that could show one."""
    permanence: bool | None
    """A ball that goes behind a body vanishes and reappears on the other side, in its colour and on time."""
    stray: float | None
    """Largest distance in pixels of a standing body from its place."""
    still: bool | None
    """`stray` is within STILL_PX."""


BOOLEAN_PROBES = tuple(
    field.name for field in fields(ClipScore) if field.name not in ("speed_ratio", "gravity_ratio", "stray")
)


def score_clip(frames: np.ndarray, facts: Facts, times: np.ndarray) -> ClipScore:
    """Judge one clip: frames (frames, N, N, 3) uint8, N a multiple of 64; times (frames,) seconds.

    Raises: ValueError if the shapes do not match, or for fewer than 2 frames.
    """
    if len(frames) != len(times) or len(frames) < 2:
        raise ValueError(
            f"{len(frames)} frames and {len(times)} times; expected one time per frame and at least 2 frames"
        )
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
    """Scores of a set of clips, each with its uncertainty and the number of clips that could be judged."""

    proportions: dict[str, Proportion]
    """By probe: BOOLEAN_PROBES, and for continued clips late_colours and late_shapes."""
    means: dict[str, Mean]
    """speed_ratio, gravity_ratio and stray; speed_error and gravity_error, the distances of the ratios from 1.

    A clip that should show a fall and shows none has no ratio, and an error of 1.
    """
    failed: tuple[str, ...]
    """For each clip, the probes that it fails, separated by commas."""

    @property
    def figures(self) -> dict[str, Proportion | Mean]:
        return {**self.proportions, **self.means}

    def to_json(self) -> dict[str, object]:
        return {name: figure.to_json() for name, figure in self.figures.items()}


def summarise(scores: Sequence[ClipScore]) -> Summary:
    """Proportions and means, each over the clips that its probe could judge."""

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
