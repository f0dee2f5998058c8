"""The vocabulary's ids, and clip layouts: the frames of the three tasks, and coordinates of their slots."""

import numpy as np
import pytest

from cogvideo.sequence.layout import ClipLayout, FrameSpec, Vocabulary


def test_image_is_one_causal_frame() -> None:
    layout = ClipLayout.image(text_len=4, frame_side=3)
    assert layout.frames == (FrameSpec(order=0, causal=True, supervised=True),)
    assert (layout.num_frames, layout.frame_len, layout.num_slots) == (1, 9, 9)


def test_sequential_frames_are_generated_in_order() -> None:
    layout = ClipLayout.sequential(4, 3, 5)
    assert [f.order for f in layout.frames] == [0, 1, 2, 3, 4]
    assert all(f.causal for f in layout.frames)
    assert layout.given_frames == (0,)
    assert layout.supervised_frames == layout.generation_order == (1, 2, 3, 4)
    whole = ClipLayout.sequential(4, 3, 5, learn_first_frame=True)
    assert (whole.given_frames, whole.generation_order) == ((), (0, 1, 2, 3, 4))


def test_interpolation_gives_even_frames_and_learns_odd_ones() -> None:
    layout = ClipLayout.interpolation(4, 3, 5)
    assert [f.order for f in layout.frames] == [0, 1, 0, 2, 0]
    assert [f.causal for f in layout.frames] == [False, True, False, True, False]
    assert layout.given_frames == (0, 2, 4)
    assert layout.generation_order == (1, 3)


@pytest.mark.parametrize("num_frames", [0, 1, 2, 4])
def test_interpolation_needs_frames_on_both_sides(num_frames: int) -> None:
    with pytest.raises(ValueError, match=f"num_frames={num_frames}: .*odd number"):
        ClipLayout.interpolation(4, 3, num_frames)


def test_published_size() -> None:
    layout = ClipLayout.sequential(64, 20, 5)
    assert layout.text_len + layout.num_slots == 2064


def test_locate_numbers_slots_frame_by_frame_in_raster_order() -> None:
    layout = ClipLayout.interpolation(4, 3, 3)
    at = layout.locate(np.array([0, 8, 9, 14, 26]))
    assert at.frame.tolist() == [0, 0, 1, 1, 2]
    assert at.raster.tolist() == [0, 8, 0, 5, 8]
    assert at.row.tolist() == [0, 2, 0, 1, 2]
    assert at.column.tolist() == [0, 2, 0, 2, 2]
    assert at.order.tolist() == [0, 0, 1, 1, 0]
    assert at.causal.tolist() == [False, False, True, True, False]


def test_locate_keeps_the_shape_of_its_slots() -> None:
    layout = ClipLayout.sequential(4, 3, 2)
    assert layout.locate(np.arange(18).reshape(2, 1, 9)).row.shape == (2, 1, 9)


def test_slots_of_frames_in_the_order_given() -> None:
    layout = ClipLayout.sequential(4, 2, 3)
    assert layout.slots_of(2, 0).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def test_defaults_are_the_published_ids() -> None:
    vocabulary = Vocabulary()
    assert (vocabulary.size, vocabulary.num_image_tokens) == (150010, 20000)
    assert (vocabulary.pad, vocabulary.newline, vocabulary.start_of_image) == (20003, 20004, 150000)


@pytest.mark.parametrize("name", ["pad", "newline", "start_of_image"])
@pytest.mark.parametrize("value", [0, 19, 30, -1])
def test_special_ids_are_text_ids(name: str, value: int) -> None:
    ids = {"pad": 20, "newline": 21, "start_of_image": 29} | {name: value}
    with pytest.raises(ValueError, match=rf"vocabulary.{name}={value} is not in the text ids \[20, 30\)"):
        Vocabulary(30, 20, **ids)
