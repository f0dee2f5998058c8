"""Motion probes on paths with known answers, right and wrong."""

import numpy as np
import pytest

from cogvideo.worlds.digits.motion import (
    direction_is,
    expected_path,
    mean_step_along,
    midpoint_distances,
    net_displacement,
    step_errors,
)

TIMES = np.linspace(0, 4, 5)


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


def test_direction_is_judged_before_the_bounce_and_reversed_motion_is_wrong():
    path = np.array([[[10, 5], [16, 5], [22, 5], [16, 5], [10, 5]]], float)
    free = np.array([[True, True, True, False, False]])
    moved = net_displacement(path, free)
    np.testing.assert_allclose(moved, [[12, 0]])
    for expected, right in (((1, 0), True), ((-1, 0), False), ((0, 1), False), ((0, -1), False)):
        assert direction_is(moved, np.array([expected], float))[0] == right
    assert not direction_is(np.zeros((1, 2)), np.array([[1.0, 0.0]]))[0]
    np.testing.assert_allclose(mean_step_along(path, free, np.array([[1.0, 0.0]])), 6)


def test_a_digit_against_its_edge_is_still_judged_by_its_first_step():
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
def test_frames_that_no_doubling_makes_are_refused(num_frames):
    with pytest.raises(ValueError, match="doubled by interpolation"):
        midpoint_distances(np.zeros((1, num_frames, 2)), 5)
