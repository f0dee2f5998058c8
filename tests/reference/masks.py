"""The attention masks as tables, frame by frame: dense, slow, without the package's coordinate predicate."""

import numpy as np


def spatial_mask(task: str, num_frames: int, side: int) -> np.ndarray:
    """(slots, slots) bool: each frame sees itself, causally unless it is a given frame of stage 2."""
    n = side * side
    whole, causal = np.ones((n, n), bool), np.tril(np.ones((n, n), bool))
    mask = np.zeros((num_frames * n, num_frames * n), bool)
    for f in range(num_frames):
        given = task == "interpolation" and f % 2 == 0
        mask[f * n : (f + 1) * n, f * n : (f + 1) * n] = whole if given else causal
    return mask


def temporal_mask(task: str, num_frames: int, side: int, window: int | None = None, shift: int = 0) -> np.ndarray:
    """(slots, slots) bool: which frames a frame sees whole, itself causally, and only within its window."""
    n = side * side
    whole, nothing, causal = np.ones((n, n), bool), np.zeros((n, n), bool), np.tril(np.ones((n, n), bool))

    def block(q: int, k: int) -> np.ndarray:
        if task == "sequential":
            return causal if q == k else whole if k < q else nothing
        if q % 2 == 0:  # given frames see given frames
            return whole if k % 2 == 0 else nothing
        if k % 2 == 0:  # generated frames see every given one
            return whole
        return causal if q == k else whole if k < q else nothing  # and generated ones before them

    mask = np.block([[block(q, k) for k in range(num_frames)] for q in range(num_frames)])
    return mask if window is None else mask & np.tile(_same_window(side, window, shift), (num_frames, num_frames))


def _same_window(side: int, window: int, shift: int) -> np.ndarray:
    """(n, n) bool over one frame's slots: the grid is cut before shift, shift + window, ... on each axis."""
    cuts = [cut for cut in range(shift, side, window) if cut > 0]
    groups = [sum(i >= cut for cut in cuts) for i in range(side)]
    cell = [(groups[y], groups[x]) for y in range(side) for x in range(side)]
    return np.array([[a == b for b in cell] for a in cell])
