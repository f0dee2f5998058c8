"""Captions of the tutorial's clips: true to what the engine reports, and none where that is unclear."""

from dataclasses import replace
from types import ModuleType

import pytest

from tests.helpers.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("tutorial/render_doom")


def test_captions_say_what_the_engine_reports(script: ModuleType) -> None:
    near, far = script.Box(50, 20, 20, 70, 0.6), script.Box(55, 40, 10, 35, 0.6)
    left, right = script.Box(5, 30, 20, 50, 0.6), script.Box(90, 30, 20, 50, 0.6)
    middle = script.Box(50, 30, 20, 50, 0.6)
    assert script.caption_of("RedTorch", [far, near]) == "the camera moves towards a red torch"
    assert script.caption_of("BlueTorch", [near, far]) == "the camera moves away from a blue torch"
    across = "a dead tree slides across the picture to the"
    assert script.caption_of("TorchTree", [left, middle, right]) == f"{across} right"
    assert script.caption_of("TorchTree", [right, middle, left]) == f"{across} left"


def test_unclear_clips_have_no_caption(script: ModuleType) -> None:
    left, right = script.Box(5, 30, 20, 50, 0.6), script.Box(90, 30, 20, 50, 0.6)
    middle = script.Box(50, 30, 20, 50, 0.6)
    assert script.caption_of("RedTorch", [left, None, right]) is None, "not seen"
    assert script.caption_of("RedTorch", [left, replace(middle, visible=0.3), right]) is None, "half hidden"
    assert script.caption_of("RedTorch", [left, replace(right, left=105)]) is None, "cut off"
    assert script.caption_of("RedTorch", [middle, replace(middle, left=52)]) is None, "still"
    assert script.caption_of("RedTorch", [left, right, middle, right]) is None, "turns back"
    assert script.caption_of("RedTorch", [left, replace(right, height=100)]) is None, "across and closer"


def test_walls_between_two_points(script: ModuleType) -> None:
    cross = script._cross
    assert cross((0, 0), (10, 0), (5, -5), (5, 5))
    assert not cross((0, 0), (10, 0), (5, 1), (5, 5)) and not cross((0, 0), (4, 0), (5, -5), (5, 5))
