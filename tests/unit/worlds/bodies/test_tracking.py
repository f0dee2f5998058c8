"""Tracking of coloured bodies against the simulator's places."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cogvideo.worlds.bodies.scene import FPS
from cogvideo.worlds.bodies.tracking import COLOUR_NAMES, track
from tests.helpers.bodies import find_clip


@pytest.mark.parametrize("blur", [0.0, 0.8])
@pytest.mark.parametrize("event", ["roll", "fall", "circle"])
def test_centroids_follow_the_bodies(event, blur):
    frames, truth = find_clip(event)
    frames = np.rint(gaussian_filter(frames.astype(np.float32), (0, blur, blur, 0))).astype(np.uint8)
    found = track(frames)
    for number, body in enumerate(truth.scene.bodies):
        column = COLOUR_NAMES.index(body.colour)
        whole = truth.visible[:, number] == 1
        places = np.stack(
            [truth.scene.camera.project(truth.states.position[k, number], k / FPS)[:2] for k in range(len(frames))]
        )
        offset = (found.centroid[:, column] - places)[whole]
        assert np.abs(offset).max() < 2 and offset.std(axis=0).max() < 0.4
        area = truth.area[whole, number] * 64**2
        assert np.allclose(found.area[whole, column], area, rtol=0.35)


def test_colours_that_are_not_there_are_not_found():
    frames, truth = find_clip("roll")
    others = [COLOUR_NAMES.index(name) for name in COLOUR_NAMES if name != truth.scene.bodies[0].colour]
    assert not track(frames).present[:, others].any()


def test_larger_frames_are_averaged_down():
    frames, _ = find_clip("roll")
    large = frames[:3].repeat(3, axis=1).repeat(3, axis=2)
    assert np.array_equal(track(large).centroid, track(frames[:3]).centroid, equal_nan=True)
