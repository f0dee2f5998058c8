"""Measures of clips that need no network: PSNR and SSIM of pairs; motion, flicker, drift and seams of single clips.

A frozen clip must not score well for having no flicker, so `flicker` is relative to motion, and undefined without it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogvideo.media.similarity import thumbnails

DRIFT_FRAMES = (2, 5, 10, 20)
FROZEN_MOTION = 0.1
"""Of 255. Clips that move less count as frozen: lossy coding alone changes a still picture by about that much."""
MAX_FRAME_PSNR = 100.0
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5
SSIM_K1, SSIM_K2 = 0.01, 0.03

Frames = NDArray[np.uint8]
"""(frames, H, W, 3)"""


def psnr(frames: Frames, others: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of a clip, range 255; infinite if they are equal.

    Raises: ValueError for clips of different shapes.
    """
    _check_same_shape(frames, others)
    return float(_decibels(np.mean((frames.astype(np.float64) - others) ** 2)))


def frame_psnr(frames: Frames, others: NDArray[np.floating] | Frames) -> NDArray[np.float64]:
    """`psnr` of each frame, (frames,), capped at 100 dB, so that equal frames do not make means infinite.

    Raises: ValueError for clips of different shapes.
    """
    _check_same_shape(frames, others)
    return np.minimum(_decibels(((frames.astype(np.float64) - others) ** 2).mean(axis=(1, 2, 3))), MAX_FRAME_PSNR)


def ssim(frames: Frames, others: Frames) -> float:
    """Structural similarity, averaged over frames, channels and the pixels whose window lies inside the frame.

    An 11x11 Gaussian window with sigma 1.5, population covariances, range 255. Source: Wang et al. 2004; equal to
    scikit-image with `gaussian_weights=True, use_sample_covariance=False`.
    Raises: ValueError for clips of different shapes, or frames smaller than the window.
    """
    _check_same_shape(frames, others)
    size = 2 * SSIM_RADIUS + 1
    if min(frames.shape[1:3]) < size:
        raise ValueError(f"SSIM needs frames of at least {size}x{size} pixels, got {frames.shape[2]}x{frames.shape[1]}")
    return float(np.mean([_ssim_of_frame(x, y) for x, y in zip(frames, others, strict=True)]))


def motion(frames: Frames, seconds: NDArray[np.float64] | None = None, fps: float | None = None) -> float:
    """Mean absolute difference, of 255, between frames 1 / `fps` seconds apart, or consecutive ones without `fps`.

    `seconds`: (frames,) times. Raises: ValueError if the clip is too short, or its frame rate is below `fps`.
    """
    chosen = frames if seconds is None or fps is None else frames[frames_at_rate(seconds, fps)]
    if len(chosen) < 2:
        raise ValueError(f"motion at {fps or 0:g} frames per second needs a clip of at least two such frames")
    return float(np.mean([_difference(after, before) for before, after in pairwise(chosen)]))


def frames_at_rate(seconds: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """Indices of the frames that a player shows at 0, 1 / fps, 2 / fps, ... seconds after the first one.

    Raises: ValueError for a rate above that of the clip, which would repeat frames.
    """
    elapsed = seconds - seconds[0]
    count = math.floor(float(elapsed[-1]) * fps + 1e-6) + 1
    if count <= len(seconds):  # otherwise an absurd rate would need absurd memory
        chosen = np.searchsorted(elapsed, np.arange(count) / fps + 1e-6, side="right") - 1
        if len(np.unique(chosen)) == len(chosen):
            return chosen.astype(np.int64)
    raise ValueError(f"a clip has fewer than {fps:g} frames per second; give a lower frame rate")


def flicker(frames: Frames) -> float | None:
    """How far frames deviate from the midpoint of their neighbours, relative to how far they differ from each of them.

    0 for even change, about 0.87 for independent noise, and at most 1, when frames alternate. None for a frozen clip
    or one of fewer than three frames.
    """
    if len(frames) < 3 or motion(frames) < FROZEN_MOTION:
        return None
    jumps, steps = 0.0, 0.0
    for before, frame, after in zip(frames[:-2], frames[1:-1], frames[2:], strict=True):
        middle = (before.astype(np.float64) + after) / 2
        jumps += float(np.abs(frame - middle).mean())
        steps += (_difference(frame, before) + _difference(after, frame)) / 2
    return jumps / steps


def drift(frames: Frames, distance: int) -> float | None:
    """Mean absolute difference, of 255, between 8x8 thumbnails `distance` frames apart; None if the clip is too short.

    Thumbnails hold little detail, so this measures how far the scene as a whole changes.
    """
    if len(frames) <= distance:
        return None
    small = thumbnails(frames).astype(np.float64)
    return float(np.abs(small[distance:] - small[:-distance]).mean())


def seam(frames: Frames, index: int) -> float | None:
    """The step into frame `index` relative to the median of the clip's other steps; 1 if the seam is invisible.

    None if that median is 0. Raises: ValueError for fewer than three frames, or if `index` is 0 or not in the clip.
    """
    if not 0 < index < len(frames) or len(frames) < 3:
        raise ValueError(
            f"a seam at frame {index} needs at least 3 frames, with some before and some after the seam; "
            f"got {len(frames)} frames"
        )
    steps = np.array([_difference(after, before) for before, after in pairwise(frames)])
    usual = float(np.median(np.delete(steps, index - 1)))
    return None if usual == 0 else float(steps[index - 1]) / usual


def _decibels(errors: ArrayLike) -> NDArray[np.float64]:
    """PSNR of mean squared errors."""
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255**2 / np.asarray(errors, np.float64)))


def _difference(x: NDArray[np.uint8], y: NDArray[np.uint8]) -> float:
    return float(np.abs(x.astype(np.int16) - y).mean())


def _ssim_of_frame(x: NDArray[np.uint8], y: NDArray[np.uint8]) -> float:
    left, right = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = _window_mean(left), _window_mean(right)
    variances = _window_mean(left**2) - mean_x**2 + _window_mean(right**2) - mean_y**2
    covariance = _window_mean(left * right) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return float(values.mean())


def _window_mean(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian means (H, W, C) of all windows that lie inside the image."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        image = np.lib.stride_tricks.sliding_window_view(image, len(weights), axis=axis) @ weights
    return image


def _check_same_shape(frames: Frames, others: NDArray[np.floating] | Frames) -> None:
    if frames.shape != others.shape:
        raise ValueError(f"clips of shapes {list(frames.shape)} and {list(others.shape)} cannot be compared")
