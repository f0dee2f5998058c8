"""Random scenes of the bodies world: splits, held-out combinations, reproducible draws."""

import pytest

from cogvideo.worlds.bodies.random_scenes import draw_scene
from cogvideo.worlds.bodies.scene import COLOURS, EVENTS, SHAPES, held_out_bodies, is_held_out


def test_a_scene_depends_on_seed_split_and_index_alone():
    assert draw_scene(0, "train", 5) == draw_scene(0, "train", 5)
    others = [draw_scene(1, "train", 5), draw_scene(0, "test", 5), draw_scene(0, "train", 6)]
    assert all(draw_scene(0, "train", 5) != other for other in others)


def test_training_and_test_scenes_have_no_held_out_body_and_unseen_scenes_have_one():
    for index in range(150):
        assert not held_out_bodies(draw_scene(0, "train", index))
        assert not held_out_bodies(draw_scene(0, "test", index))
        assert held_out_bodies(draw_scene(0, "unseen", index))


def test_one_colour_in_six_is_held_out_for_each_event_role_and_shape():
    for event in EVENTS:
        for shape in SHAPES:
            for role in (0, 1):
                assert sum(is_held_out(event, role, colour, shape) for colour in COLOURS) == 1


def test_every_event_occurs_with_distinct_colours():
    scenes = [draw_scene(0, "train", index) for index in range(200)]
    assert {scene.event for scene in scenes} == set(EVENTS)
    assert {len(scene.bodies) for scene in scenes} == {1, 2, 3}
    assert all(len({body.colour for body in scene.bodies}) == len(scene.bodies) for scene in scenes)


@pytest.mark.parametrize(("seed", "split", "index"), [(0, "valid", 0), (-1, "train", 0), (0, "train", -1)])
def test_bad_requests(seed, split, index):
    with pytest.raises(ValueError, match=r"choose|expected"):
        draw_scene(seed, split, index)
