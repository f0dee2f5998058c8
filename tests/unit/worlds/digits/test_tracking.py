"""The ink's place against rendered digits of known place, and frames that show no single digit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideo.worlds.digits.render import CANVAS, GROUND, DigitClip, render, split_images
from cogvideo.worlds.digits.tracking import foreground, track


def still(image: int, x: float, y: float, colour: str = "red") -> np.ndarray:
    return render(DigitClip(image, 0, colour, "left", "slowly", (x, y)), 0.0)[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.floats(2, 20), st.floats(2, 20), st.sampled_from(["red", "blue", "white"]))
def test_the_centroid_follows_a_digit_to_a_tenth_of_a_pixel(index, x, y, colour):
    image = int(split_images("test")[index])
    found = track(np.stack([still(image, 2, 2, colour), still(image, x, y, colour)])[None])
    assert found.complete.all()
    moved = found.centroid[0, 1] - found.centroid[0, 0]
    np.testing.assert_allclose(moved, [x - 2, y - 2], atol=0.12)


def test_the_ink_box_is_the_digits_box():
    errors = []
    for image in split_images("test")[:50]:
        clip = DigitClip(int(image), 0, "green", "left", "slowly", (10.3, 11.6))
        left, top, right, bottom = track(render(clip, 0.0)[None]).box[0, 0]
        width, height = clip.size
        errors.append([left - 10.3, top - 11.6, right - 10.3 - width, bottom - 11.6 - height])
    assert np.abs(errors).mean() < 0.6


def test_frames_without_one_digit_are_told_apart():
    ground = np.full((CANVAS, CANVAS, 3), GROUND, np.uint8)
    digit = still(0, 3, 3)
    noise = np.random.default_rng(0).integers(0, 256, digit.shape).astype(np.uint8)
    faint = (ground + 0.15 * (digit.astype(float) - ground)).round().astype(np.uint8)
    two = np.maximum(digit, still(1, 24, 22))
    speck = ground.copy()
    speck[5:8, 5:8] = 255
    frames = np.stack([digit, ground, noise, faint, two, speck, np.full_like(ground, 255)])
    assert track(frames[None]).present[0].tolist() == [True] + 6 * [False]


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="expected uint8"):
        foreground(np.zeros((2, 40, 40, 3), np.float32))
