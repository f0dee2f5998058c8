"""Scenes of the bodies world by event, and their clips, each made once per test run."""

from functools import cache
from itertools import count

import pytest

pytest.importorskip("pybullet", reason="the bodies world needs the extra [worlds]")

from cogvideo.worlds.bodies.files import Settings, Truth, make_clip
from cogvideo.worlds.bodies.random_scenes import draw_scene
from cogvideo.worlds.bodies.scene import Event, Scene

SEED = 3


@cache
def find_scene(event: Event, number: int = 0) -> tuple[int, Scene]:
    """The index and scene of the `number`th training scene of an event."""
    for index in count():
        scene = draw_scene(SEED, "train", index)
        if scene.event == event:
            if not number:
                return index, scene
            number -= 1
    raise AssertionError


@cache
def find_clip(event: Event, number: int = 0):
    """Its frames (33, 64, 64, 3), read-only, and truth."""
    frames, truth = make_clip(Settings("train", SEED, 64), find_scene(event, number)[0])
    frames.setflags(write=False)
    assert isinstance(truth, Truth)
    return frames, truth
