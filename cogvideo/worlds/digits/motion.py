"""Is the motion the one that the caption asks for? Paths of the ink against the path a caption implies.

The expected path starts where the clip's own first frame shows the digit, so a clip is judged by how it moves, not by
where it begins. Positions are (x, y) in pixels as in `tracking.py`. Pure functions on arrays.
"""

from __future__ import annotations

import numpy as np

from cogvideo.worlds.digits.render import bounce


def expected_path(
    centroid: np.ndarray, box: np.ndarray, velocity: np.ndarray, times: np.ndarray, side: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where a digit that starts as measured is at each time, and whether it has not yet touched an edge.

    Shapes: centroid (clips, 2) and box (clips, 4) in the first frame; velocity (clips, 2) px a second; times (frames,)
    seconds from the first frame; returns path (clips, frames, 2) of the centroid, free (clips, frames) bool.
    The ink box is reflected at the canvas' edges 0 and `side`; the centroid keeps its place within the box.
    """
    low, high = box[:, None, :2], box[:, None, 2:]
    moved = velocity[:, None, :] * times[None, :, None]
    corner = bounce(low, velocity[:, None, :], times[None, :, None], 0.0, np.maximum(side - (high - low), 0.0))
    free = ((low + moved >= 0) & (high + moved <= side) | (velocity[:, None, :] == 0)).all(axis=-1)
    return centroid[:, None, :] + corner - low, free


def net_displacement(path: np.ndarray, free: np.ndarray) -> np.ndarray:
    """How far the ink came before the first expected bounce: (clips, 2) pixels.

    Shapes: path (clips, frames, 2); free (clips, frames) bool. At least the first step is counted, so a clip that
    starts against the edge it should move to is judged too (by where that step goes).
    """
    last = np.maximum(_last_free(free), 1)
    return path[np.arange(len(path)), last] - path[:, 0]


def direction_is(displacement: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Is the larger component of a displacement along the expected axis and of its sign? (clips,) bool.

    Shapes: displacement (clips, 2), expected (clips, 2) unit steps such as (-1, 0) for left. No motion is wrong.
    """
    along = (displacement * expected).sum(axis=-1)
    across = np.abs(displacement * (expected == 0)).sum(axis=-1)
    return along > np.maximum(across, 0.0)


def step_errors(path: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance between each measured and each expected step: (clips, frames - 1) pixels a frame.

    Shapes: path, expected (clips, frames, 2). A clip that stands still has the full expected step as its error.
    """
    return np.linalg.norm(np.diff(path, axis=1) - np.diff(expected, axis=1), axis=-1)


def mean_step_along(path: np.ndarray, free: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Mean measured step in the expected direction before any expected bounce: (clips,) pixels a frame.

    Shapes: path (clips, frames, 2); free (clips, frames) bool; direction (clips, 2) unit steps.
    """
    return (net_displacement(path, free) * direction).sum(axis=-1) / np.maximum(_last_free(free), 1)


def midpoint_distances(path: np.ndarray, num_key_frames: int) -> list[np.ndarray]:
    """Distance of each interpolated frame from the path of the frames it was interpolated from, one array a round.

    Definition: clips of `num_key_frames` frames are doubled, K -> 2 K - 1 -> ..., until all frames are there. The round
    which makes frame k is given frames k - s and k + s (s halves each round); the path of the given frames is piecewise
    linear, so frame k, at the middle in time, belongs at the midpoint of their centroids. The distance of its centroid
    from that midpoint is what counts. A real clip has 0 but where it bounces between k - s and k + s.

    Shapes: path (clips, frames, 2); returns arrays (clips, new frames of the round) in pixels, first round first.
    Raises: ValueError if the frames are not num_key_frames doubled some times.
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


def _last_free(free: np.ndarray) -> np.ndarray:
    """Index of the last frame before the first expected bounce: (clips,) from (clips, frames) bool."""
    touched = ~free
    return np.where(touched.any(axis=1), touched.argmax(axis=1) - 1, free.shape[1] - 1)
