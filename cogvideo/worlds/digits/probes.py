"""Probes of generated moving digits: do they show the digit, the colour and the motion that the caption asks for?

Probes are independent of the model: their inputs are pixels, times and the caption's facts. Run on real test clips, and
on those clips encoded and decoded by the tokenizer, they show how far the probes and the tokenizer can be trusted.

Which digit: a support vector machine on the ink, trained here, in seconds, on the training split's handwritten digits,
never on generated frames, test digits or a tokenizer's output. Which colour: the nearest named one. Motion: see
`tracking.py`. A clip in which a frame lacks a digit is never left out: it is wrong in every probe except
`digit_frames`, which counts single frames, and has the error FAILED_PX where the measure is a distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.evaluation.statistics import Mean, Proportion
from cogvideo.worlds.digits.render import (
    ALL_COLOURS,
    BACKGROUND,
    CANVAS,
    COLOURS,
    DIRECTIONS,
    SPEEDS,
    DigitClip,
    load_images,
    render,
    split_images,
)
from cogvideo.worlds.digits.tracking import (
    Bools,
    Floats,
    direction_matches,
    expected_path,
    full_strength,
    ink_strength,
    mean_step_along,
    midpoint_distances,
    net_displacement,
    step_errors,
    track,
)

FAILED_PX = CANVAS / 2
"""Error of a clip in which a frame lacks a digit."""
PATCH = 16
"""Side in pixels of the classifier's input, centred on the ink; a digit is 14 pixels high."""
BLURS = (0.0, 0.4, 0.8, 1.2)
"""Standard deviations in pixels; the classifier is trained at each blur, because lossy coding softens frames."""


@dataclass(frozen=True)
class ProbeScores:
    """Results per clip."""

    complete: Bools
    """(clips,) one digit is visible in every frame."""
    digit: Bools
    """(clips,) the frames' summed scores name the right digit."""
    digit_frames: Floats
    """(clips,) fraction of single frames that name the right digit."""
    colour: Bools
    """(clips,) the colour is right."""
    direction: Bools
    """(clips,) axis and sign of the displacement before the first expected bounce are right."""
    step_error: Floats
    """(clips,) mean over steps of |measured - expected displacement|, pixels per frame."""
    step: Floats
    """(clips,) mean measured step in the requested direction before the first expected bounce, pixels per frame."""
    speed: NDArray[np.str_]
    """(clips,) the caption's speed."""
    midpoint: Floats | None
    """(clips, rounds) mean distance of interpolated frames from the midpoint path, pixels; None without such frames."""


def probe_clips(
    frames: NDArray[np.uint8], clips: Sequence[DigitClip], times: Floats, num_key_frames: int | None = None
) -> ProbeScores:
    """Score clips against their captions' facts (label, colour, direction, speed; nothing else of `clips` is used).

    The colour shown is the nearest of COLOURS, or of ALL_COLOURS if any caption names a colour outside COLOURS.

    Shapes: frames (clips, frames, CANVAS, CANVAS, 3) uint8; times (frames,) seconds. `num_key_frames`: how many frames
    stage 1 made, if the others were interpolated; otherwise None.
    Raises: ValueError if the shapes do not match.
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
    wanted = {clip.colour for clip in clips}
    palette = COLOURS if wanted <= COLOURS.keys() else ALL_COLOURS
    colours = np.array(list(palette))[colour_indices(frames, palette)]
    path, free = expected_path(found.centroid[:, 0], found.box[:, 0], velocity, times - times[0], CANVAS)
    moved = net_displacement(found.centroid, free)
    midpoint = None
    if num_key_frames is not None:
        rounds = midpoint_distances(found.centroid, num_key_frames)
        midpoint = np.stack([distances.mean(axis=1) for distances in rounds], axis=1)
        midpoint[~complete] = FAILED_PX
    return ProbeScores(
        complete=complete,
        digit=complete & (scores.sum(axis=1).argmax(axis=-1) == labels),
        digit_frames=((scores.argmax(axis=-1) == labels[:, None]) & found.present).mean(axis=1),
        colour=complete & (colours == np.array([clip.colour for clip in clips])),
        direction=complete & direction_matches(moved, directions),
        step_error=np.where(complete, step_errors(found.centroid, path).mean(axis=1), FAILED_PX),
        step=np.where(complete, mean_step_along(found.centroid, free, directions), 0.0),
        speed=speeds,
        midpoint=midpoint,
    )


FIGURES = ("complete", "digit", "digit_frames", "colour", "direction", "all_right", "step_error")
"""Fields of `Summary` that every set of clips has."""


@dataclass(frozen=True)
class Summary:
    """Scores of a set of clips, each with its uncertainty."""

    complete: Proportion
    digit: Proportion
    digit_frames: Mean
    colour: Proportion
    direction: Proportion
    all_right: Proportion
    """Digit, colour and direction at once."""
    step_error: Mean
    """Pixels per frame."""
    step_by_speed: dict[str, Mean]
    """Pixels per frame."""
    midpoint: Mean | None
    """Pixels, over all interpolated frames."""
    midpoint_by_round: tuple[Mean, ...]
    failed: tuple[str, ...]
    """For each clip, the probes that it fails, separated by commas."""

    @property
    def figures(self) -> Mapping[str, Proportion | Mean | None]:
        return {
            **{name: getattr(self, name) for name in (*FIGURES, "midpoint")},
            **{f"step_{speed}": mean for speed, mean in self.step_by_speed.items()},
            **{f"midpoint_{number}": mean for number, mean in enumerate(self.midpoint_by_round, 1)},
        }

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


def summarise(scores: ProbeScores) -> Summary:
    """Means and proportions over clips. Rounds are weighted by the number of frames they add (1, 2, 4, ...)."""
    rounds = scores.midpoint
    midpoint = None
    if rounds is not None:
        midpoint = Mean.from_values(np.average(rounds, axis=1, weights=2.0 ** np.arange(rounds.shape[1])))
    return Summary(
        complete=Proportion.from_trials(scores.complete),
        digit=Proportion.from_trials(scores.digit),
        digit_frames=Mean.from_values(scores.digit_frames),
        colour=Proportion.from_trials(scores.colour),
        direction=Proportion.from_trials(scores.direction),
        all_right=Proportion.from_trials(scores.digit & scores.colour & scores.direction),
        step_error=Mean.from_values(scores.step_error),
        step_by_speed={speed: Mean.from_values(scores.step[scores.speed == speed]) for speed in SPEEDS},
        midpoint=midpoint,
        midpoint_by_round=() if rounds is None else tuple(Mean.from_values(column) for column in rounds.T),
        failed=tuple(
            ", ".join(name for name in ("complete", "digit", "colour", "direction") if not getattr(scores, name)[clip])
            for clip in range(len(scores.complete))
        ),
    )


def digit_scores(frames: NDArray[np.uint8], centroid: Floats) -> Floats:
    """The classifier's score for each of the ten digits; the largest is its answer.

    Shapes: frames (clips, frames, height, width, 3) uint8; centroid (clips, frames, 2); returns (clips, frames, 10).
    """
    clips, num_frames = frames.shape[:2]
    features = _patches(frames.reshape(-1, *frames.shape[2:]), centroid.reshape(-1, 2))
    scores: Floats = _digit_classifier().decision_function(features)
    return scores.reshape(clips, num_frames, 10)


def colour_indices(
    frames: NDArray[np.uint8], palette: Mapping[str, tuple[int, int, int]] = COLOURS
) -> NDArray[np.int64]:
    """Index into `palette` of the named colour nearest to the ink's: (clips,).

    Shapes: frames (clips, frames, height, width, 3) uint8.
    The ink-weighted mean colour of all frames, minus the background, is compared by its direction in RGB (hue and
    saturation), so that soft or thin strokes, which are darker, do not count as another colour.
    """
    ink = ink_strength(frames)[..., None]
    background = np.array(BACKGROUND, np.float32)
    mean = (ink * (frames - background)).sum(axis=(1, 2, 3)) / np.maximum(ink.sum(axis=(1, 2, 3)), 1e-9)
    named = np.array(list(palette.values()), np.float32) - background
    named /= np.linalg.norm(named, axis=-1, keepdims=True)
    return (mean @ named.T).argmax(axis=-1)


@lru_cache(maxsize=1)
def _digit_classifier() -> Any:
    """A scikit-learn SVC over `_patches`, trained once per process on the training split's digits (a few seconds).

    Each digit is drawn once per blur in BLURS, in a random colour at a random place.
    """
    from scipy.ndimage import gaussian_filter
    from sklearn.svm import SVC  # takes a second to import

    rng = np.random.default_rng(0)
    images = split_images("train")
    frames = np.empty((len(BLURS), len(images), CANVAS, CANVAS, 3), np.float32)
    for blur, copies in zip(BLURS, frames, strict=True):
        for frame, image in zip(copies, images, strict=True):
            colour, (x, y) = str(rng.choice(list(COLOURS))), rng.uniform(0, 1, 2)
            width, height = DigitClip(int(image), 0, colour, "left", "slowly", (0.0, 0.0)).size
            corner = (x * (CANVAS - width), y * (CANVAS - height))
            frame[:] = render(DigitClip(int(image), 0, colour, "left", "slowly", corner), 0.0)[0]
        gaussian_filter(copies, (0, blur, blur, 0), output=copies)
    rounded = np.rint(frames).astype(np.uint8)
    features = _patches(rounded.reshape(-1, CANVAS, CANVAS, 3), track(rounded).centroid.reshape(-1, 2))
    return SVC(C=10.0, gamma="scale").fit(features, np.tile(load_images()[1][images], len(BLURS)))


def _patches(frames: NDArray[np.uint8], centroid: Floats) -> Floats:
    """The ink as greyscale images of PATCH x PATCH, centred on the centroid to a fraction of a pixel.

    Shapes: frames (frames, height, width, 3) uint8; centroid (frames, 2) x, y in pixels; returns
    (frames, PATCH * PATCH), 1 at full strength.
    """
    strength = ink_strength(frames)
    ink = strength / np.maximum(full_strength(strength), 1e-9)[:, None, None]
    # Bilinear resampling is separable. `columns` and `rows` (frames, PATCH, length) hold each patch pixel's weights on
    # the frame's pixels: 1 at distance 0, falling to 0 at distance 1.
    offsets = np.arange(PATCH) + 0.5 - PATCH / 2
    columns, rows = (
        np.maximum(0, 1 - np.abs(centroid[:, axis, None, None] + offsets[:, None] - (np.arange(length) + 0.5)))
        for axis, length in ((0, ink.shape[2]), (1, ink.shape[1]))
    )
    return (rows @ ink @ columns.transpose(0, 2, 1)).reshape(len(frames), -1)
