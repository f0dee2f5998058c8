"""Measures of motion and likeness."""

import numpy as np
import pytest

from cogvideo.media.similarity import clip_distances, motion, thumbnails


def test_motion_is_the_mean_change_between_consecutive_frames():
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    frames[1], frames[2, :2] = 10, 10  # changes by 10, then by 10 in one half
    assert motion(frames) == pytest.approx(7.5)
    assert motion(frames[:1]) == 0


def test_distance_is_small_for_another_size_and_large_for_another_picture():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    enlarged = frames.repeat(3, axis=1).repeat(3, axis=2)
    other = 255 - frames
    distances = clip_distances(thumbnails(frames), np.stack([thumbnails(enlarged), thumbnails(other)]))
    assert distances[0] < 1 < 10 < distances[1]
