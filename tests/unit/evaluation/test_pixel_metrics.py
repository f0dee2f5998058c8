"""Measures without a network: known values, and that neither a frozen nor a noisy clip looks good."""

import math

import numpy as np
import pytest

from cogvideo.evaluation.pixel_metrics import drift, flicker, frame_psnr, frames_at_rate, motion, psnr, seam, ssim


def grey(levels, side: int = 16):
    """A clip of uniform frames."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), side, side, 3)).copy()


def noise(frames: int, side: int = 16, seed: int = 0):
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), np.uint8)


def test_psnr_of_known_errors() -> None:
    assert psnr(grey([0, 0]), grey([255, 255])) == 0
    assert psnr(grey([100]), grey([101])) == pytest.approx(20 * math.log10(255))
    assert psnr(grey([7]), grey([7])) == math.inf
    assert frame_psnr(grey([7, 0]), grey([7, 255])).tolist() == [100, 0]


def test_ssim_of_black_and_white() -> None:
    assert ssim(grey([0]), grey([255])) == pytest.approx(9.9990e-5, rel=1e-4)
    assert ssim(noise(2), noise(2)) == pytest.approx(1)


def test_ssim_equals_the_definition_at_one_window() -> None:
    x, y = noise(1, 11).astype(float), noise(1, 11, 1).astype(float)
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        a, b = x[0, :, :, channel], y[0, :, :, channel]
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        cov = (window * (a - mean_a) * (b - mean_b)).sum()
        values.append(
            (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
    assert ssim(noise(1, 11), noise(1, 11, 1)) == pytest.approx(np.mean(values), rel=1e-12)


def test_ssim_equals_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not a dependency")
    x, y = noise(1, 40), noise(1, 40, 1)
    y[0, :20] = x[0, :20]
    value = metrics.structural_similarity(
        x[0], y[0], gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2, data_range=255
    )
    assert ssim(x, y) == pytest.approx(value, abs=1e-9)


def test_motion_at_a_fixed_rate_does_not_depend_on_that_of_the_clip() -> None:
    fast, slow = grey(range(0, 160, 2)), grey(range(0, 160, 8))  # the same second, at 80 and 20 frames per second
    assert motion(fast) == 2 and motion(slow) == 8
    assert motion(fast, np.arange(80) / 80, 20) == motion(slow, np.arange(20) / 20, 20) == 8


def test_frames_at_a_rate_are_those_shown_at_the_time() -> None:
    uneven = np.array([5.0, 5.1, 5.45, 5.5, 6.0])
    assert frames_at_rate(uneven, 2).tolist() == [0, 3, 4]
    with pytest.raises(ValueError, match="lower frame rate"):
        frames_at_rate(uneven, 4)
    with pytest.raises(ValueError, match="two such frames"):
        motion(grey([1, 2]), np.array([0, 0.1]), 4)


def test_flicker_orders_clips_and_is_undefined_for_frozen_ones() -> None:
    even = flicker(grey(range(0, 100, 5)))
    nervous = flicker(grey([100, 110] * 10))
    random = flicker(noise(10))
    assert even == pytest.approx(0) and nervous == pytest.approx(1)
    assert random is not None and 0.7 < random < 1.2
    assert flicker(grey([100] * 10)) is None
    assert flicker(grey([1, 2])) is None


def test_drift_grows_with_distance() -> None:
    clip = grey(range(0, 90, 3))
    assert [drift(clip, distance) for distance in (2, 5, 10)] == [6, 15, 30]
    assert drift(clip, 30) is None
    assert drift(grey([5] * 9), 2) == 0


def test_a_jump_at_the_seam_stands_out() -> None:
    assert seam(grey([0, 2, 4, 6, 36, 38, 40]), 4) == 15
    assert seam(grey([0, 2, 4, 6, 8]), 2) == 1
    assert seam(grey([3, 3, 3, 9]), 3) is None
    for index in (0, 5):
        with pytest.raises(ValueError, match=f"frame {index}"):
            seam(grey([1, 2, 3, 4, 5]), index)


def test_pairs_must_have_one_shape() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match="cannot be compared"):
            measure(noise(2), noise(3))
    with pytest.raises(ValueError, match="11x11"):
        ssim(noise(1, 8), noise(1, 8))
