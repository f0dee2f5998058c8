"""Probes of generated moving digits: is it the digit, the colour and the motion that the caption asks for?

They know nothing of the model: pixels, times and the caption's facts go in. The same probes on the real test clips and
on those clips encoded and decoded by the tokenizer say how far the probes and the tokenizer can be trusted.

A clip without a digit in each of its frames is wrong in every probe, and counts with an error of FAILED_PX where the
measure is a distance; it is never left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogvideo.evaluation.statistics import Mean, Proportion, proportion
from cogvideo.worlds.digits.appearance import colour_indices, digit_scores
from cogvideo.worlds.digits.motion import (
    direction_is,
    expected_path,
    mean_step_along,
    midpoint_distances,
    net_displacement,
    step_errors,
)
from cogvideo.worlds.digits.render import CANVAS, COLOURS, DIRECTIONS, SPEEDS, DigitClip
from cogvideo.worlds.digits.tracking import track

FAILED_PX = CANVAS / 2  # the error of a clip without a digit to measure


@dataclass(frozen=True)
class ClipScores:
    """Each clip's results; arrays over clips."""

    complete: np.ndarray
    """(clips,) bool: one digit to be seen in every frame."""
    digit: np.ndarray
    """(clips,) bool: the frames' summed scores name the right digit."""
    digit_frames: np.ndarray
    """(clips,) float: share of single frames that name the right digit."""
    colour: np.ndarray
    """(clips,) bool."""
    direction: np.ndarray
    """(clips,) bool: axis and sign of the displacement before the first expected bounce."""
    step_error: np.ndarray
    """(clips,) mean over steps of |measured - expected displacement|, pixels a frame."""
    step: np.ndarray
    """(clips,) mean measured step in the asked direction before the first expected bounce, pixels a frame."""
    speed: np.ndarray
    """(clips,) str: the caption's speed."""
    midpoint: np.ndarray | None
    """(clips, rounds) mean distance of interpolated frames from the midpoint path, pixels; None without such frames."""


def score_clips(
    frames: np.ndarray, clips: Sequence[DigitClip], times: np.ndarray, num_key_frames: int | None = None
) -> ClipScores:
    """Judge clips against their captions' facts (label, colour, direction, speed; nothing else of `clips` is read).

    Shapes: frames (clips, frames, CANVAS, CANVAS, 3) uint8; times (frames,) seconds; num_key_frames: how many of the
    frames stage 1 made where the others were interpolated, None where there are none.
    Raises: ValueError if the shapes do not fit each other.
    """
    expected_shape = (len(clips), len(times), CANVAS, CANVAS, 3)
    if frames.shape != expected_shape or not len(clips):
        raise ValueError(f"frames have shape {frames.shape}; expected {expected_shape}, at least one clip")
    found = track(frames)
    complete = found.complete
    labels = np.array([clip.label for clip in clips])
    directions = np.array([DIRECTIONS[clip.direction] for clip in clips], float)
    speeds = np.array([clip.speed for clip in clips])
    velocity = directions * np.array([SPEEDS[speed] for speed in speeds])[:, None]

    scores = digit_scores(frames, found.centroid)
    colours = np.array(list(COLOURS))[colour_indices(frames)]
    path, free = expected_path(found.centroid[:, 0], found.box[:, 0], velocity, times - times[0], CANVAS)
    moved = net_displacement(found.centroid, free)
    midpoint = None
    if num_key_frames is not None:
        rounds = midpoint_distances(found.centroid, num_key_frames)
        midpoint = np.stack([distances.mean(axis=1) for distances in rounds], axis=1)
        midpoint[~complete] = FAILED_PX
    return ClipScores(
        complete=complete,
        digit=complete & (scores.sum(axis=1).argmax(axis=-1) == labels),
        digit_frames=((scores.argmax(axis=-1) == labels[:, None]) & found.present).mean(axis=1),
        colour=complete & (colours == np.array([clip.colour for clip in clips])),
        direction=complete & direction_is(moved, directions),
        step_error=np.where(complete, step_errors(found.centroid, path).mean(axis=1), FAILED_PX),
        step=np.where(complete, mean_step_along(found.centroid, free, directions), 0.0),
        speed=speeds,
        midpoint=midpoint,
    )


@dataclass(frozen=True)
class Summary:
    """What a set of clips scores; every figure with its uncertainty."""

    complete: Proportion
    digit: Proportion
    digit_frames: Mean
    colour: Proportion
    direction: Proportion
    all_right: Proportion  # digit, colour and direction at once
    step_error: Mean  # pixels a frame
    step_by_speed: dict[str, Mean]  # pixels a frame
    midpoint: Mean | None  # pixels, over all interpolated frames
    midpoint_by_round: tuple[Mean, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "complete": self.complete.to_json(),
            "digit": self.digit.to_json(),
            "digit_frames": self.digit_frames.to_json(),
            "colour": self.colour.to_json(),
            "direction": self.direction.to_json(),
            "all_right": self.all_right.to_json(),
            "step_error_px": self.step_error.to_json(),
            "step_px_by_speed": {speed: mean.to_json() for speed, mean in self.step_by_speed.items()},
            "midpoint_px": self.midpoint.to_json() if self.midpoint else None,
            "midpoint_px_by_round": [mean.to_json() for mean in self.midpoint_by_round],
        }


def summarise(scores: ClipScores) -> Summary:
    """Means and proportions over the clips of `score_clips`. Rounds weigh by the frames they add (1, 2, 4, ...)."""
    rounds = scores.midpoint
    midpoint = None
    if rounds is not None:
        midpoint = Mean.of(np.average(rounds, axis=1, weights=2.0 ** np.arange(rounds.shape[1])))
    return Summary(
        complete=proportion(scores.complete),
        digit=proportion(scores.digit),
        digit_frames=Mean.of(scores.digit_frames),
        colour=proportion(scores.colour),
        direction=proportion(scores.direction),
        all_right=proportion(scores.digit & scores.colour & scores.direction),
        step_error=Mean.of(scores.step_error),
        step_by_speed={speed: Mean.of(scores.step[scores.speed == speed]) for speed in SPEEDS},
        midpoint=midpoint,
        midpoint_by_round=() if rounds is None else tuple(Mean.of(column) for column in rounds.T),
    )
