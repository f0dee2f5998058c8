"""Where the ink is in each frame: sub-pixel centroid, ink box, and whether there is a digit at all.

Positions are (x, y) in pixels in the continuous frame [0, width] x [0, height]: the centre of the top left pixel is
(0.5, 0.5), so that a box which touches the left edge has left = 0. Nothing here knows what the clip should show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cogvideo.worlds.digits.render import GROUND

# Colour distance (0 .. 441) up to which a pixel is ground: above what a tokenizer leaves there, far below any ink.
GROUND_NOISE = 24.0
# Share of the full strength at which the ink box begins: below a digit's faint edges, above a tokenizer's blur.
BOX_LEVEL = 0.25
# What one digit looks like, with room on either side: the real ones in the six colours have strength 119 and more, ink
# of 44 to 79 pixels, and are 14 pixels high.
MIN_STRENGTH = 60.0
MIN_INK, MAX_INK = 22.0, 158.0
MAX_EXTENT = 24.0


@dataclass(frozen=True)
class Track:
    """The ink of clips, frame by frame. Where `present` is False the rest is the frame's centre, not a measurement."""

    centroid: np.ndarray
    """(clips, frames, 2) float64: x, y of the ink's centre of mass, in pixels."""
    box: np.ndarray
    """(clips, frames, 4) float64: left, top, right, bottom of the ink at BOX_LEVEL of its strength, in pixels."""
    present: np.ndarray
    """(clips, frames) bool: there is ink, neither too little nor too much, and in one place, to be one digit."""

    @property
    def complete(self) -> np.ndarray:
        """(clips,) bool: a digit in every frame. A clip that is not complete counts as wrong in every probe."""
        return np.all(self.present, axis=1)


def foreground(frames: np.ndarray) -> np.ndarray:
    """Ink strength: colour distance from the plain ground, less the noise allowed there.

    Shapes: frames (..., height, width, 3) uint8; returns (..., height, width) float32, 0 on ground.
    Raises: ValueError if frames are not uint8 RGB.
    """
    if frames.dtype != np.uint8 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}; expected uint8 (..., height, width, 3): convert them first"
        )
    distance = np.linalg.norm(frames.astype(np.float32) - np.array(GROUND, np.float32), axis=-1)
    return np.maximum(distance - np.float32(GROUND_NOISE), 0)


def track(frames: np.ndarray) -> Track:
    """Find the ink in every frame: (clips, frames, height, width, 3) uint8.

    A frame shows a digit if its ink is strong enough, amounts to one digit and lies in one place; two digits, a smear
    across the canvas and an empty frame do not.
    """
    ink = foreground(frames)
    height, width = ink.shape[-2:]
    strongest = strength(ink)
    amount = ink.sum(axis=(-2, -1)) / np.maximum(strongest, 1e-9)
    box = _ink_box(ink, strongest)
    extent = np.maximum(box[..., 2] - box[..., 0], box[..., 3] - box[..., 1])
    present = (strongest >= MIN_STRENGTH) & (amount >= MIN_INK) & (amount <= MAX_INK) & (extent <= MAX_EXTENT)

    total = np.maximum(ink.sum(axis=(-2, -1)), 1e-9)
    x = ink.sum(axis=-2) @ (np.arange(width) + 0.5) / total
    y = ink.sum(axis=-1) @ (np.arange(height) + 0.5) / total
    centre = np.array([width / 2, height / 2])
    centroid = np.where(present[..., None], np.stack([x, y], axis=-1), centre)
    box = np.where(present[..., None], box, np.concatenate([centre, centre]))
    return Track(centroid, box, present)


def strength(ink: np.ndarray) -> np.ndarray:
    """The strength of solid ink in a frame: the mean of its ten strongest pixels (steadier than the one strongest).

    Shapes: ink (..., height, width); returns (...).
    """
    flat = ink.reshape(*ink.shape[:-2], -1)
    return np.partition(flat, -10, axis=-1)[..., -10:].mean(axis=-1)


def _ink_box(ink: np.ndarray, strongest: np.ndarray) -> np.ndarray:
    """Ink box at BOX_LEVEL of the strength, sub-pixel.

    Shapes: ink (..., height, width); strongest (...); returns (..., 4): left, top, right, bottom in pixels.
    """
    left, right = _crossings(ink.max(axis=-2), BOX_LEVEL * strongest)
    top, bottom = _crossings(ink.max(axis=-1), BOX_LEVEL * strongest)
    return np.stack([left, top, right, bottom], axis=-1)


def _crossings(profile: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last place where a profile passes a level, linear between the centres of pixels.

    Shapes: profile (..., n); level (...); returns two (...), in pixels; (0, n) where it never does.
    """
    above = profile >= np.maximum(level, 1e-9)[..., None]
    found, n = above.any(axis=-1), profile.shape[-1]

    def first(values: np.ndarray, above: np.ndarray) -> np.ndarray:
        index = above.argmax(axis=-1)[..., None]
        inside = np.take_along_axis(values, index, axis=-1)
        outside = np.where(index > 0, np.take_along_axis(values, np.maximum(index - 1, 0), axis=-1), 0.0)
        back = (inside - level[..., None]) / np.maximum(inside - outside, 1e-9)
        return np.clip(index + 0.5 - back, 0, n)[..., 0]

    low = first(profile, above)
    high = n - first(profile[..., ::-1], above[..., ::-1])
    return np.where(found, low, 0.0), np.where(found, high, float(n))
