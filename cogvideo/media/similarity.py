"""How much a clip moves, and how alike two clips look: the measures of near-static clips and near-duplicates."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_SIDE = 8


def motion(frames: NDArray[np.uint8]) -> float:
    """Mean absolute difference of consecutive frames (N, H, W, 3), out of 255; 0 for a single frame."""
    steps = [np.abs(after.astype(np.int16) - before).mean() for before, after in pairwise(frames)]
    return float(np.mean(steps)) if steps else 0.0


def thumbnails(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames (N, H, W, 3) averaged to (N, 8, 8, 3), so that size and compression hardly matter."""
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def clip_distances(clip: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean absolute difference, out of 255, of a clip's thumbnails (frames, 8, 8, 3) from each of (N, frames, 8, 8, 3).

    Frames are compared in order.
    """
    distances: NDArray[np.float64] = np.abs(others.astype(np.int16) - clip).mean(axis=(1, 2, 3, 4))
    return distances
