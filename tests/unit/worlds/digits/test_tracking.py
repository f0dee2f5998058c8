"""Tracking of rendered digits at known places, and measures of motion on paths with known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideo.worlds.digits.render import BACKGROUND, CANVAS, DigitClip, render, split_images
from cogvideo.worlds.digits.tracking import (
    direction_matches,
    expected_path,
    ink_strength,
    mean_step_along,
    midpoint_distances,
    net_displacement,
    step_errors,
    track,
)

TIMES = np.linspace(0, 4, 5)


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


def test_frames_without_exactly_one_digit_are_not_present():
    background = np.full((CANVAS, CANVAS, 3), BACKGROUND, np.uint8)
    digit = still(0, 3, 3)
    noise = np.random.default_rng(0).integers(0, 256, digit.shape).astype(np.uint8)
    faint = (background + 0.15 * (digit.astype(float) - background)).round().astype(np.uint8)
    two = np.maximum(digit, still(1, 24, 22))
    speck = background.copy()
    speck[5:8, 5:8] = 255
    frames = np.stack([digit, background, noise, faint, two, speck, np.full_like(background, 255)])
    assert track(frames[None]).present[0].tolist() == [True] + 6 * [False]


def test_frames_that_are_not_uint8_rgb_are_refused():
    with pytest.raises(ValueError, match="expected uint8"):
        ink_strength(np.zeros((2, 40, 40, 3), np.float32))


def test_the_expected_path_runs_straight_and_then_bounces():
    centroid, box = np.array([[10.0, 20.0]]), np.array([[5.0, 14.0, 15.0, 28.0]])
    path, free = expected_path(centroid, box, np.array([[6.0, 0.0]]), TIMES, 40.0)
    np.testing.assert_allclose(path[0, :, 0], [10, 16, 22, 28, 34])
    np.testing.assert_allclose(path[0, :, 1], 20)
    assert free.all()
    # Leftwards the box touches at 5 px, 5/6 s: 6 px on it has come back by 1 px.
    path, free = expected_path(centroid, box, np.array([[-6.0, 0.0]]), TIMES, 40.0)
    np.testing.assert_allclose(path[0, :, 0], [10, 6, 12, 18, 24])
    assert free[0].tolist() == [True, False, False, False, False]


def test_direction_matches_judged_before_the_bounce_and_reversed_motion_is_wrong():
    path = np.array([[[10, 5], [16, 5], [22, 5], [16, 5], [10, 5]]], float)
    free = np.array([[True, True, True, False, False]])
    moved = net_displacement(path, free)
    np.testing.assert_allclose(moved, [[12, 0]])
    for expected, right in (((1, 0), True), ((-1, 0), False), ((0, 1), False), ((0, -1), False)):
        assert direction_matches(moved, np.array([expected], float))[0] == right
    assert not direction_matches(np.zeros((1, 2)), np.array([[1.0, 0.0]]))[0]
    np.testing.assert_allclose(mean_step_along(path, free, np.array([[1.0, 0.0]])), 6)


def test_a_digit_at_its_edge_is_judged_by_its_first_step():
    free = np.array([[True, False, False]])
    assert net_displacement(np.array([[[5.0, 5], [8, 5], [11, 5]]]), free).tolist() == [[3, 0]]


def test_a_frozen_clip_has_the_whole_step_as_its_error():
    path = np.stack([np.arange(5) * 6.0, np.zeros(5)], axis=-1)[None]
    np.testing.assert_allclose(step_errors(path, path), 0)
    np.testing.assert_allclose(step_errors(np.zeros_like(path), path), 6)
    np.testing.assert_allclose(step_errors(path[:, ::-1], path), 12)


def test_midpoint_distances_by_round():
    path = np.stack([np.arange(33.0), np.zeros(33)], axis=-1)[None]
    assert [distances.shape for distances in midpoint_distances(path, 5)] == [(1, 4), (1, 8), (1, 16)]
    assert max(distances.max() for distances in midpoint_distances(path, 5)) == 0
    path[0, 4, 1] = 3.0  # a frame of the first round: its own distance, and half of it in its four dependants
    first, second, third = midpoint_distances(path, 5)
    assert first[0].tolist() == [3, 0, 0, 0]
    assert second[0, :3].tolist() == [1.5, 1.5, 0] and third[0, :4].tolist() == [0, 1.5, 1.5, 0]


@pytest.mark.parametrize("num_frames", [5, 8, 13, 25])
def test_frame_counts_that_are_not_doublings_are_refused(num_frames):
    with pytest.raises(ValueError, match="doubled by interpolation"):
        midpoint_distances(np.zeros((1, num_frames, 2)), 5)
