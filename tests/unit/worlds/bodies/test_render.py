"""The ray caster of the bodies world against geometry that can be worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from cogvideo.worlds.bodies.physics import States
from cogvideo.worlds.bodies.render import area_average, render, rotation_matrix
from cogvideo.worlds.bodies.scene import Body
from tests.helpers.bodies import find_scene


def draw(*bodies, pixels=64, rays=2, **changes):
    """One frame of bodies at rest, in a plain room."""
    scene = find_scene("roll")[1]
    room = replace(scene.surroundings, pattern="plain")
    scene = replace(scene, bodies=bodies, surroundings=room, **changes)
    count = len(bodies)
    states = States(
        position=np.array([[body.position for body in bodies]]),
        orientation=np.array([[body.orientation for body in bodies]]),
        velocity=np.zeros((1, count, 3)),
        spin=np.zeros((1, count, 3)),
        contact=np.zeros((1, count, count + 1), bool),
    )
    return scene, render(scene, states, pixels, rays)


def make_body(shape, colour="red", x=0.0, y=0.0, half=0.5):
    return Body(shape, colour, (half, half, half), (x, y, half))


@pytest.mark.parametrize("shape", ["ball", "box", "cylinder"])
def test_a_body_is_drawn_where_the_camera_projects_it(shape):
    scene, rendering = draw(make_body(shape, x=0.7))
    red = rendering.frames[0].astype(int)
    rows, columns = np.nonzero(red[..., 0] - red[..., 2] > 60)
    x, y, _ = scene.camera.project(np.array([0.7, 0, 0.5]), 0.0)
    assert abs(columns.mean() + 0.5 - x) < 1 and abs(rows.mean() + 0.5 - y) < 1.5


def test_a_balls_outline_has_the_area_of_its_disc():
    scene, rendering = draw(make_body("ball"))
    scale = scene.camera.metres_per_pixel((0.0, 0.0, 0.5))
    assert rendering.area[0, 0] * 64**2 == pytest.approx(np.pi * (0.5 / scale) ** 2, rel=0.03)


def test_the_nearer_body_hides_the_farther_whatever_their_order():
    near, far = make_body("box", "blue", y=-0.5), make_body("ball", "red", y=0.8, half=0.4)
    _, one = draw(near, far)
    _, two = draw(far, near)
    assert np.array_equal(one.frames, two.frames)
    assert one.visible[0, 0] == 1 and one.visible[0, 1] < 0.3
    assert one.visible[0].tolist() == two.visible[0, ::-1].tolist()


def test_a_body_out_of_view_is_not_visible():
    _, rendering = draw(make_body("ball", x=30.0))
    assert rendering.visible[0, 0] == 0 and rendering.area[0, 0] == 0


def test_bodies_darken_the_floor_by_their_shadow_only_near_them():
    _, empty = draw(make_body("ball", x=30.0))
    _, rendering = draw(make_body("ball"))
    darker = empty.frames[0].astype(int).sum(-1) - rendering.frames[0].astype(int).sum(-1)
    assert (darker > 60).any() and (darker[-8:] == 0).all() and (darker[:8] == 0).all()


def test_frames_rendered_at_64_are_close_to_those_averaged_from_192():
    bodies = make_body("box"), make_body("cylinder", "green", x=1.3)
    large, small = draw(*bodies, pixels=192)[1].frames, draw(*bodies, rays=3)[1].frames
    assert np.abs(area_average(large, 3).astype(int) - small).mean() < 1


def test_area_average_rounds_the_mean():
    frames = np.array([[0, 1, 2, 2], [0, 1, 2, 3]], np.uint8)[None, :, :, None].repeat(3, axis=3)
    assert area_average(frames, 2)[0, 0, :, 0].tolist() == [1, 2]


def test_rotation_matrix_turns_by_the_quaternion():
    half = np.sqrt(0.5)
    assert np.allclose(rotation_matrix(np.array([0, 0, half, half])) @ [1, 0, 0], [0, 1, 0])
