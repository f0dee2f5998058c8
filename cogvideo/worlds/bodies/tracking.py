"""Finds the bodies in each frame by their colours: area, centroid and box of each of the six colours.

Frames are (frames, 64, 64, 3) uint8; larger ones are averaged down to 64 first. Positions are x, y in pixels of the
continuous frame [0, 64] x [0, 64]: the centre of the top left pixel is (0.5, 0.5). What a clip should show is not used
here. Blur and compression cost a body its outermost pixels but do not move it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, label

from cogvideo.worlds.bodies.render import area_average
from cogvideo.worlds.bodies.scene import COLOURS, REFERENCE_PIXELS

COLOUR_NAMES = tuple(COLOURS)
MIN_CHROMA = 42.0
"""Largest minus smallest channel, of 255, from which a pixel counts as coloured; floors and walls have at most 30."""
MIN_WHITE, MIN_WHITE_STEP = 140.0, 20.0
"""A white body's pixels are at least this light, and this much lighter than the median of their row."""
HUE_ENDS = ((25.0, "red"), (90.0, "yellow"), (178.0, "green"), (253.0, "blue"), (322.0, "purple"), (360.0, "red"))
"""Hue in degrees at which the range of each named colour ends."""
MIN_PART, MIN_PART_SHARE = 4, 0.1
"""Smaller patches of a colour, in pixels or as a share of its largest patch, are discarded as stray pixels at edges."""
MIN_EDGE = 2
"""Pixels of a colour that a row or column needs to belong to its box."""
MIN_AREA = 10
"""Pixels that a colour needs to count as present in a frame; a ball has at least 40."""


@dataclass(frozen=True)
class Track:
    """What is visible of each colour; arrays over (frames, colours), colours in the order of COLOUR_NAMES."""

    area: np.ndarray
    """(frames, colours) pixels."""
    centroid: np.ndarray
    """(frames, colours, 2) x, y in pixels; NaN where the colour is not present."""
    box: np.ndarray
    """(frames, colours, 4) left, top, right, bottom in pixels; NaN where the colour is not present."""

    @property
    def present(self) -> np.ndarray:
        """(frames, colours) bool."""
        return self.area >= MIN_AREA


def track(frames: np.ndarray) -> Track:
    """Find the colours in every frame of a clip (frames, H, W, 3) uint8, H = W = 64 or a multiple.

    Raises: ValueError for other shapes.
    """
    frames = to_reference(frames)
    named = name_pixels(frames)
    strength = _strength(frames)
    count, colours = len(named), len(COLOUR_NAMES)
    area = np.zeros((count, colours))
    centroid, box = np.full((count, colours, 2), np.nan), np.full((count, colours, 4), np.nan)
    for frame in range(count):
        for colour in range(colours):
            mask = _without_specks(named[frame] == colour)
            area[frame, colour] = mask.sum()
            if area[frame, colour] < MIN_AREA:
                continue
            white = colour == COLOUR_NAMES.index("white")
            weight = _coverage(mask, (named[frame] >= 0) & ~mask, strength[int(white), frame])
            centroid[frame, colour] = (
                weight.sum(axis=0) @ (np.arange(weight.shape[1]) + 0.5) / weight.sum(),
                weight.sum(axis=1) @ (np.arange(weight.shape[0]) + 0.5) / weight.sum(),
            )
            across, down = (np.flatnonzero(mask.sum(axis=axis) >= MIN_EDGE) for axis in (0, 1))
            if len(across) and len(down):
                box[frame, colour] = across[0], down[0], across[-1] + 1, down[-1] + 1
    return Track(area, centroid, box)


def _strength(frames: np.ndarray) -> np.ndarray:
    """How far each pixel stands out from floor and wall, by chroma and by lightness: (2, frames, H, W), 0 or more."""
    pixels = frames.astype(np.float32)
    chroma, light = pixels.max(axis=-1) - pixels.min(axis=-1), pixels.mean(axis=-1)
    both = np.stack([chroma, light])
    return np.maximum(both - np.median(both, axis=3, keepdims=True), 0)


def _coverage(mask: np.ndarray, others: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """How much of each pixel a body covers: 1 inside its mask, a fraction along its outline, 0 beyond and on others.

    A centroid of whole pixels jumps as outlines cross them; with fractions it is accurate to a twentieth of a pixel.
    """
    inside, around = binary_erosion(mask), binary_dilation(mask) & ~others
    full = float(strength[inside if inside.any() else mask].mean())
    return np.where(inside, 1, np.where(around, np.clip(strength / max(full, 1), 0, 1), 0))


def to_reference(frames: np.ndarray) -> np.ndarray:
    """Average frames down to 64 pixels per side."""
    side = frames.shape[1] if frames.ndim == 4 else 0
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (side, side, 3) or side % REFERENCE_PIXELS:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}; expected uint8 (frames, N, N, 3), N a multiple of "
            f"{REFERENCE_PIXELS}"
        )
    return frames if side == REFERENCE_PIXELS else area_average(frames, side // REFERENCE_PIXELS)


def name_pixels(frames: np.ndarray) -> np.ndarray:
    """The colour that each pixel has: an index into COLOUR_NAMES, or -1 for floor, wall and shadow.

    Shapes: frames (frames, H, W, 3) uint8; returns (frames, H, W) int8.
    """
    red, green, blue = np.moveaxis(frames.astype(np.float32), -1, 0)
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = high - low
    divisor = np.maximum(chroma, 1e-6)
    hue = np.where(
        high == red,
        (green - blue) / divisor,
        np.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = np.mod(hue * 60, 360)
    ends = np.array([end for end, _ in HUE_ENDS])
    names = np.array([COLOUR_NAMES.index(name) for _, name in HUE_ENDS], np.int8)
    named = names[np.minimum(np.searchsorted(ends, hue, side="right"), len(names) - 1)]
    light = (red + green + blue) / 3
    middle = np.median(light, axis=2, keepdims=True)
    white = (chroma < MIN_CHROMA) & (light >= np.maximum(MIN_WHITE, middle + MIN_WHITE_STEP))
    return np.where(white, COLOUR_NAMES.index("white"), np.where(chroma >= MIN_CHROMA, named, -1)).astype(np.int8)


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) without patches too small to be part of a body."""
    if not mask.any():
        return mask
    patches, _ = label(mask)
    sizes = np.bincount(patches.ravel())
    sizes[0] = 0
    return (sizes >= max(MIN_PART, MIN_PART_SHARE * sizes.max()))[patches]
