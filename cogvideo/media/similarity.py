"""How much a clip moves, and how alike two clips look: the measures of near-static clips and near-duplicates."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_BITS = 64


def motion(frames: NDArray[np.uint8]) -> float:
    """Mean absolute difference of consecutive frames (N, H, W, 3), of 255; 0 for a single frame."""
    steps = [np.abs(after.astype(np.int16) - before).mean() for before, after in pairwise(frames)]
    return float(np.mean(steps)) if steps else 0.0


def difference_hashes(frames: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Difference hashes of frames (N, H, W, 3) -> (N, HASH_BITS).

    A frame is averaged to 8 rows of 9 gray values; a bit says whether a value is below the one on its right. So frames
    that differ in size, compression or brightness only have nearly the same bits.
    """
    small = [Image.fromarray(frame).convert("L").resize((9, 8), Image.Resampling.BOX) for frame in frames]
    gray = np.stack([np.asarray(picture, np.uint8) for picture in small])
    return (gray[:, :, :-1] < gray[:, :, 1:]).reshape(len(frames), HASH_BITS)


def hash_distances(hashes: NDArray[np.bool_], others: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Bits in which hashes of clips (A, frames, HASH_BITS), (B, frames, HASH_BITS) differ, mean per frame: (A, B).

    Frames are compared in order.
    """
    a, b = ((2.0 * bits - 1).reshape(len(bits), -1).astype(np.float32) for bits in (hashes, others))
    differing: NDArray[np.float64] = (a.shape[1] - (a @ b.T).astype(np.float64)) / 2
    return differing / hashes.shape[1]
