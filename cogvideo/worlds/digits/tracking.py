"""Track a moving digit: where its ink is in each frame, and how far its path is from the one its caption implies.

Positions are (x, y) in pixels in the continuous frame [0, width] x [0, height]; the centre of the top left pixel is
(0.5, 0.5), so a box that touches the left edge has left = 0. The expected path starts where the clip's first frame
shows the digit: a clip is scored by how it moves, not by where it begins. Pure functions on arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.worlds.digits.render import BACKGROUND, bounce

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

# Colour distance (0 .. 441) up to which a pixel counts as background: above a tokenizer's noise, far below any ink.
BACKGROUND_NOISE = 24.0
# Fraction of the ink's full strength at which its box begins: below a digit's faint edges, above a tokenizer's blur.
BOX_LEVEL = 0.25
# Limits for what counts as one digit. Rendered digits have a strength of at least 119 and 44 to 79 pixels of ink,
# and are 14 pixels high.
MIN_STRENGTH = 60.0
MIN_INK, MAX_INK = 22.0, 158.0
MAX_EXTENT = 24.0


@dataclass(frozen=True)
class Track:
    """The ink of clips, frame by frame. Where `present` is False, positions are set to the frame's centre."""

    centroid: Floats
    """(clips, frames, 2): x, y of the ink's centre of mass, in pixels."""
    box: Floats
    """(clips, frames, 4): left, top, right, bottom of the ink at BOX_LEVEL of its strength, in pixels."""
    present: Bools
    """(clips, frames): whether the frame shows one digit."""

    @property
    def complete(self) -> Bools:
        """(clips,): whether every frame shows a digit. An incomplete clip fails every probe except `digit_frames`."""
        return np.all(self.present, axis=1)


def ink_strength(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Colour distance of each pixel from the background, minus the tolerated noise.

    Shapes: frames (..., height, width, 3) uint8; returns (..., height, width), 0 on background.
    Raises: ValueError if frames are not uint8 RGB.
    """
    if frames.dtype != np.uint8 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}; expected uint8 (..., height, width, 3): convert them first"
        )
    distance = np.linalg.norm(frames.astype(np.float32) - np.array(BACKGROUND, np.float32), axis=-1)
    return np.maximum(distance - np.float32(BACKGROUND_NOISE), 0)


def full_strength(ink: Floats) -> Floats:
    """Strength of solid ink in a frame: the mean of its ten strongest pixels, which is steadier than the maximum.

    Shapes: ink (..., height, width); returns (...).
    """
    flat = ink.reshape(*ink.shape[:-2], -1)
    return np.partition(flat, -10, axis=-1)[..., -10:].mean(axis=-1)


def track(frames: NDArray[np.uint8]) -> Track:
    """Locate the ink in every frame: (clips, frames, height, width, 3) uint8.

    A frame shows a digit if its ink is strong enough, amounts to one digit and lies in one place. An empty frame, two
    digits or a smear across the canvas do not count.
    """
    ink = ink_strength(frames)
    height, width = ink.shape[-2:]
    strength = full_strength(ink)
    amount = ink.sum(axis=(-2, -1)) / np.maximum(strength, 1e-9)  # in pixels of solid ink
    box = _ink_box(ink, strength)
    extent = np.maximum(box[..., 2] - box[..., 0], box[..., 3] - box[..., 1])
    present = (strength >= MIN_STRENGTH) & (amount >= MIN_INK) & (amount <= MAX_INK) & (extent <= MAX_EXTENT)

    # Centre of mass: the ink's column and row sums against the pixels' centres.
    total = np.maximum(ink.sum(axis=(-2, -1)), 1e-9)
    x = ink.sum(axis=-2) @ (np.arange(width) + 0.5) / total
    y = ink.sum(axis=-1) @ (np.arange(height) + 0.5) / total
    centre = np.array([width / 2, height / 2])
    centroid = np.where(present[..., None], np.stack([x, y], axis=-1), centre)
    box = np.where(present[..., None], box, np.concatenate([centre, centre]))
    return Track(centroid, box, present)


def _ink_box(ink: Floats, strength: Floats) -> Floats:
    """Ink box at BOX_LEVEL of the full strength, to a fraction of a pixel.

    Shapes: ink (..., height, width); strength (...); returns (..., 4): left, top, right, bottom in pixels.
    """
    left, right = _crossings(ink.max(axis=-2), BOX_LEVEL * strength)
    top, bottom = _crossings(ink.max(axis=-1), BOX_LEVEL * strength)
    return np.stack([left, top, right, bottom], axis=-1)


def _crossings(profile: Floats, level: Floats) -> tuple[Floats, Floats]:
    """First and last position at which a profile crosses a level, interpolated between pixel centres.

    Shapes: profile (..., n); level (...); returns two (...), in pixels; (0, n) where it stays below.
    """
    above = profile >= np.maximum(level, 1e-9)[..., None]
    found, n = above.any(axis=-1), profile.shape[-1]

    def first(values: Floats, above: Bools) -> Floats:
        # The first pixel above the level and its neighbour before it: the crossing lies between their centres.
        index = above.argmax(axis=-1)[..., None]
        inside = np.take_along_axis(values, index, axis=-1)
        outside = np.where(index > 0, np.take_along_axis(values, np.maximum(index - 1, 0), axis=-1), 0.0)
        back = (inside - level[..., None]) / np.maximum(inside - outside, 1e-9)
        return np.clip(index + 0.5 - back, 0, n)[..., 0]

    low = first(profile, above)
    high = n - first(profile[..., ::-1], above[..., ::-1])  # the same from the other end
    return np.where(found, low, 0.0), np.where(found, high, float(n))


def expected_path(centroid: Floats, box: Floats, velocity: Floats, times: Floats, side: float) -> tuple[Floats, Bools]:
    """Where a digit that starts as measured should be at each time, and whether it has yet to touch an edge.

    Shapes: centroid (clips, 2) and box (clips, 4) in the first frame; velocity (clips, 2) in pixels per second; times
    (frames,) in seconds from the first frame; returns the centroid's path (clips, frames, 2) and (clips, frames) bool.
    The ink box is reflected at the canvas edges 0 and `side`; the centroid keeps its place within the box.
    """
    low, high = box[:, None, :2], box[:, None, 2:]
    moved = velocity[:, None, :] * times[None, :, None]
    corner = bounce(low, velocity[:, None, :], times[None, :, None], 0.0, np.maximum(side - (high - low), 0.0))
    free = ((low + moved >= 0) & (high + moved <= side) | (velocity[:, None, :] == 0)).all(axis=-1)
    return centroid[:, None, :] + corner - low, free


def net_displacement(path: Floats, free: Bools) -> Floats:
    """Displacement before the first expected bounce: (clips, 2) pixels.

    Shapes: path (clips, frames, 2); free (clips, frames). At least one step is counted, so a clip that starts at the
    edge it should move towards is still scored, by its first step.
    """
    last = np.maximum(_last_free(free), 1)
    return path[np.arange(len(path)), last] - path[:, 0]


def direction_matches(displacement: Floats, expected: Floats) -> Bools:
    """Whether a displacement's larger component has the expected axis and sign: (clips,).

    Shapes: displacement (clips, 2); expected (clips, 2), unit steps such as (-1, 0) for left. A clip without
    motion never matches.
    """
    along = (displacement * expected).sum(axis=-1)
    across = np.abs(displacement * (expected == 0)).sum(axis=-1)
    return along > np.maximum(across, 0.0)


def step_errors(path: Floats, expected: Floats) -> Floats:
    """Distance between each measured and each expected step: (clips, frames - 1), in pixels per frame.

    Shapes: path, expected (clips, frames, 2). A clip that stands still has the full expected step as its error.
    """
    return np.linalg.norm(np.diff(path, axis=1) - np.diff(expected, axis=1), axis=-1)


def mean_step_along(path: Floats, free: Bools, direction: Floats) -> Floats:
    """Mean measured step in the expected direction before any expected bounce: (clips,), in pixels per frame.

    Shapes: path (clips, frames, 2); free (clips, frames); direction (clips, 2), unit steps.
    """
    return (net_displacement(path, free) * direction).sum(axis=-1) / np.maximum(_last_free(free), 1)


def midpoint_distances(path: Floats, num_key_frames: int) -> list[Floats]:
    """Distance of each interpolated frame from the midpoint of the frames it was interpolated from, per round.

    Interpolation starts with `num_key_frames` frames; each round turns K frames into 2 K - 1. The round that makes
    frame k is given frames k - s and k + s, where s halves each round. Frame k is halfway in time, so its centroid
    belongs at the midpoint of theirs. In a real clip the distance is 0, except where the digit bounces in between.

    Shapes: path (clips, frames, 2); returns arrays (clips, new frames of the round) in pixels, first round first.
    Raises: ValueError if the number of frames is not num_key_frames doubled some number of times.
    """
    num_frames = path.shape[1]
    stride, rest = divmod(num_frames - 1, num_key_frames - 1)
    if rest or stride < 2 or stride & (stride - 1):
        raise ValueError(
            f"{num_frames} frames are not {num_key_frames} key frames doubled by interpolation; "
            f"expected {2 * num_key_frames - 1}, {4 * num_key_frames - 3}, ...: give whole clips"
        )
    rounds = []
    while stride > 1:
        given = path[:, ::stride]
        midpoint = (given[:, :-1] + given[:, 1:]) / 2
        rounds.append(np.linalg.norm(path[:, stride // 2 :: stride] - midpoint, axis=-1))
        stride //= 2
    return rounds


def _last_free(free: Bools) -> NDArray[np.int64]:
    """Index of the last frame before the first expected bounce: (clips,) from (clips, frames)."""
    touched = ~free
    return np.where(touched.any(axis=1), touched.argmax(axis=1) - 1, free.shape[1] - 1)
