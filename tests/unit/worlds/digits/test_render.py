"""Moving digits: the split, the motion, the pixels and the captions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.worlds.digits import render as digits


def centroid(frames):
    """Centre of what differs from the background, weighted by how much: (N, 2) as x, y."""
    weight = np.abs(frames.astype(float) - np.array(digits.BACKGROUND)).sum(-1)
    ys, xs = np.mgrid[: digits.CANVAS, : digits.CANVAS] + 0.5
    total = weight.sum((1, 2))
    return np.stack([(weight * xs).sum((1, 2)) / total, (weight * ys).sum((1, 2)) / total], axis=1)


def test_splits_share_no_image_and_cover_all():
    train, test = digits.split_images("train"), digits.split_images("test")
    assert len(test) == 360 and len(train) == 1437
    assert sorted([*train, *test]) == list(range(1797))
    assert set(digits.load_images()[1][test]) == set(range(10))


def test_unknown_split_names_the_choices():
    with pytest.raises(ValueError, match="choose train or test"):
        digits.split_images("valid")


@given(
    start=st.floats(0, 1),
    velocity=st.floats(-20, 20),
    time=st.floats(0, 60),
    low=st.floats(-5, 5),
    span=st.floats(1, 50),
)
def test_bounce_stays_inside_and_keeps_its_speed(start, velocity, time, low, span):
    begin = low + start * span
    here = digits.bounce(begin, velocity, time, low, low + span)
    later = digits.bounce(begin, velocity, time + 0.01, low, low + span)
    assert low - 1e-6 <= here <= low + span + 1e-6
    assert abs(later - here) <= abs(velocity) * 0.01 + 1e-6
    if 0 <= start * span + velocity * time <= span:
        assert here == pytest.approx(begin + velocity * time, abs=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_no_digit_meets_an_edge_in_the_first_seven_eighths(seed):
    clip = digits.draw_clip(np.random.default_rng(seed), "train")
    times = np.linspace(0, digits.SECONDS * digits.FREE_FRACTION, 50)
    straight = np.array(clip.start) + times[:, None] * np.array(clip.velocity)
    assert np.allclose(clip.positions(times), straight, atol=1e-6)
    inside = np.array([digits.CANVAS - clip.size[0], digits.CANVAS - clip.size[1]])
    everywhere = clip.positions(digits.frame_times())
    assert (everywhere >= 0).all() and (everywhere <= inside + 1e-9).all()


def test_the_rendered_centroid_follows_positions_to_a_tenth_of_a_pixel():
    clip = digits.DigitClip(0, 0, "white", "right", "slowly", (5.0, 10.0))
    times = digits.frame_times()
    moved = centroid(digits.render(clip, times)) - centroid(digits.render(clip, times[:1]))
    expected = clip.positions(times) - clip.positions(times[:1])
    assert np.abs(moved - expected).max() < 0.1


def test_render_shape_background_and_colour():
    clip = digits.DigitClip(3, int(digits.load_images()[1][3]), "red", "up", "quickly", (12.0, 25.0))
    frames = digits.render(clip, [0.0, 1.5])
    assert frames.shape == (2, 40, 40, 3) and frames.dtype == np.uint8
    assert tuple(frames[0, 0, 0]) == digits.BACKGROUND
    assert frames[..., 0].max() > 200 and frames[..., 1].max() < 70


def test_captions_in_both_languages():
    clip = digits.DigitClip(3, 3, "red", "left", "quickly", (1.0, 1.0))
    assert clip.caption("zh") == "红色的数字3向左快速移动"
    assert clip.caption("en") == "the red digit 3 moves left quickly"
    slow = digits.DigitClip(3, 3, "blue", "down", "slowly", (1.0, 1.0))
    assert slow.caption("zh") == "蓝色的数字3向下缓慢移动"


def test_every_word_has_a_translation():
    assert set(digits.CHINESE) == {*digits.ALL_COLOURS, *digits.DIRECTIONS, *digits.SPEEDS}


def test_the_same_seed_gives_the_same_frames():
    first = digits.sample_frames(np.random.default_rng(5), 12, "test")
    again = digits.sample_frames(np.random.default_rng(5), 12, "test")
    assert first.shape == (12, 40, 40, 3) and (first == again).all()
    assert len(np.unique(first.reshape(12, -1), axis=0)) == 12


def test_a_palette_changes_colours_alone():
    """So that a basic clip is what it was before there were palettes, and new colours are named in both languages."""
    for seed in range(20):
        basic, new = (digits.draw_clip(np.random.default_rng(seed), "train", palette) for palette in ("basic", "new"))
        assert basic.colour in digits.COLOURS and new.colour in digits.NEW_COLOURS
        assert (basic.image, basic.label) == (new.image, new.label)
        assert new.colour in new.caption("en") and digits.CHINESE[new.colour] in new.caption("zh")
    assert not digits.COLOURS.keys() & digits.NEW_COLOURS.keys()
