"""Physics of the bodies world: every event happens as its caption says, in view, and the same way again."""

import numpy as np
import pytest

from cogvideo.worlds.bodies.physics import simulate
from cogvideo.worlds.bodies.render import rotation_matrix
from cogvideo.worlds.bodies.scene import FPS, GRAVITY, ROLL_PX_PER_SECOND, ROLLING
from tests.helpers.bodies import find_clip, find_scene

SEVERAL = range(3)


def states_of(event, number):
    scene = find_scene(event, number)[1]
    return scene, find_clip(event, number)[1].states


def places_px(scene, states):
    return np.stack([scene.camera.project(states.position[k], k / FPS) for k in range(len(states.position))])


def test_states_do_not_depend_on_what_was_simulated_before():
    scene = find_scene("into")[1]
    first = simulate(scene, num_frames=17).arrays()
    simulate(find_scene("knock")[1], num_frames=9)
    again = simulate(scene, num_frames=17).arrays()
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("event", ROLLING)
@pytest.mark.parametrize("number", SEVERAL)
def test_balls_roll_at_the_captions_pixels_per_second_until_contact(event, number):
    scene, states = states_of(event, number)
    contact = states.first_contact(0, 1) if event in ("into", "knock") else len(states.position)
    speed = np.diff(places_px(scene, states)[:contact, 0, 0]) * FPS
    sign = 1 if scene.direction == "right" else -1
    assert np.allclose(speed * sign, ROLL_PX_PER_SECOND[scene.speed], rtol=0.01)


@pytest.mark.parametrize("number", SEVERAL)
def test_a_fall_is_a_parabola_and_lands_within_a_second(number):
    scene, states = states_of("fall", number)
    landing = states.first_contact(0, len(scene.bodies))
    assert landing is not None and landing <= FPS
    times = np.arange(landing) / FPS
    expected = states.position[0, 0, 2] - GRAVITY / 2 * times**2
    assert np.allclose(states.position[:landing, 0, 2], expected, atol=0.02)


@pytest.mark.parametrize("event", ["behind", "front"])
@pytest.mark.parametrize("number", SEVERAL)
def test_a_passing_ball_touches_nothing_and_comes_out(event, number):
    _, states = states_of(event, number)
    visible = find_clip(event, number)[1].visible
    assert not states.contact[:, 0, 1].any()
    hidden = 0 if event == "behind" else 1
    assert visible[:, hidden].min() < 0.8 and visible[[0, -1], hidden].min() > 0.8
    assert visible[:, 1 - hidden].min() > 0.97
    if event == "behind":
        assert visible[:, 0].min() == 0


@pytest.mark.parametrize("number", SEVERAL)
def test_a_body_that_is_hit_moves_away(number):
    scene, states = states_of("into", number)
    places = places_px(scene, states)
    assert states.first_contact(0, 1) is not None
    assert abs(places[-1, 1, 0] - places[0, 1, 0]) > 6


@pytest.mark.parametrize(("event", "body"), [("topple", 0), ("knock", 1)])
@pytest.mark.parametrize("number", SEVERAL)
def test_towers_fall_over_to_the_captions_side(event, body, number):
    scene, states = states_of(event, number)
    upward = [rotation_matrix(quaternion)[2, 2] for quaternion in states.orientation[:, body]]
    assert upward[0] > 0.8 and abs(upward[-1]) < 0.1
    moved = places_px(scene, states)[-1, body, 0] - places_px(scene, states)[0, body, 0]
    assert (moved > 0) == (scene.direction == "right")


@pytest.mark.parametrize("number", SEVERAL)
def test_a_bouncing_ball_rises_again(number):
    _, states = states_of("bounce", number)
    height = states.position[:, 0, 2]
    lowest = height[:10].argmin()
    assert height[lowest:].max() > height[lowest] + 0.5


@pytest.mark.parametrize("event", ["fall", "onto", "bounce", "topple"])
def test_bystanders_stand_still(event):
    for number in range(4):
        scene, states = states_of(event, number)
        for body in range(2 if scene.partner else 1, len(scene.bodies)):
            assert np.ptp(states.position[:, body], axis=0).max() < 0.02
