"""Which frames, their size and their range, by value on tiny clips."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cogvideo.evaluation.preprocessing import choose_frames, network_input, resize_frames, to_bytes
from cogvideo.evaluation.protocols import LOCAL

FOUR = replace(LOCAL, frames=4)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_generated_clips_begin_at_the_first_frame_and_short_ones_are_left_out() -> None:
    assert choose_frames(FOUR, 9, None, "first", rng()).tolist() == [0, 1, 2, 3]
    assert choose_frames(FOUR, 4, None, "random", rng()).tolist() == [0, 1, 2, 3]
    assert choose_frames(FOUR, 3, None, "first", rng()) is None


def test_random_starts_reach_both_ends_and_repeat_with_the_seed() -> None:
    starts = {int(choose_frames(FOUR, 6, None, "random", rng(seed))[0]) for seed in range(40)}
    assert starts == {0, 1, 2}
    assert (
        choose_frames(FOUR, 99, None, "random", rng(5)).tolist()
        == choose_frames(FOUR, 99, None, "random", rng(5)).tolist()
    )


def test_a_stride_needs_longer_videos() -> None:
    every_third = replace(FOUR, stride=3)
    assert choose_frames(every_third, 10, None, "random", rng()).tolist() == [0, 3, 6, 9]
    assert choose_frames(every_third, 9, None, "random", rng()) is None


def test_a_frame_rate_takes_frames_by_their_times() -> None:
    at_two = replace(FOUR, fps=2.0)
    assert choose_frames(at_two, 20, np.arange(20) / 10, "first", rng()).tolist() == [0, 5, 10, 15]
    assert choose_frames(at_two, 15, np.arange(15) / 10, "first", rng()) is None
    with pytest.raises(ValueError, match="no times"):
        choose_frames(at_two, 20, None, "first", rng())
    with pytest.raises(ValueError, match="lower frame rate"):
        choose_frames(at_two, 20, np.arange(20.0), "first", rng())


def ramp(height: int, width: int):
    """A frame whose red counts rows and whose green counts columns, times 10."""
    frame = np.zeros((1, height, width, 3), np.uint8)
    frame[0, :, :, 0] = 10 * np.arange(height)[:, None]
    frame[0, :, :, 1] = 10 * np.arange(width)
    return frame


def test_the_centre_is_kept_and_the_rest_cut_off() -> None:
    pixels = resize_frames(ramp(4, 8), 4, "center", "bilinear")
    assert pixels.shape == (1, 3, 4, 4)
    assert pixels[0, 1, 0].tolist() == [20, 30, 40, 50] and pixels[0, 0, :, 0].tolist() == [0, 10, 20, 30]


def test_squashing_changes_the_aspect() -> None:
    pixels = resize_frames(ramp(4, 8), 4, "squash", "bilinear")
    assert pixels[0, 1, 0].tolist() == [5, 25, 45, 65]  # means of two neighbours


def test_bilinear_does_not_antialias_and_is_not_rounded() -> None:
    # Four times smaller: pixel centres fall between columns 1 and 2, and 5 and 6; the others are not seen.
    pixels = resize_frames(np.repeat(ramp(8, 8), 1, axis=0), 2, "center", "bilinear")
    assert pixels[0, 1, 0].tolist() == [15, 55]
    spike = np.zeros((1, 8, 8, 3), np.uint8)
    spike[:, :, 0] = 255
    assert resize_frames(spike, 2, "center", "bilinear").max() == 0
    assert resize_frames(spike, 2, "center", "lanczos").max() > 0
    odd = np.array([0, 1], np.uint8)[None, None, :, None].repeat(2, 1).repeat(3, 3)
    assert resize_frames(odd, 3, "center", "bilinear")[0, 0, 0].tolist() == [0, 0.5, 1]


def test_lanczos_is_pillows_in_8_bits() -> None:
    frame = rng().integers(0, 256, (1, 12, 12, 3), np.uint8)
    expected = np.asarray(Image.fromarray(frame[0]).resize((5, 5), Image.Resampling.LANCZOS))
    assert (to_bytes(resize_frames(frame, 5, "center", "lanczos"))[0] == expected).all()


def test_a_network_reads_its_range_size_and_layout() -> None:
    protocol = replace(LOCAL, i3d_side=2)
    frames = torch.stack([torch.full((3, 4, 4), level) for level in (0.0, 127.5, 255.0)])
    frames[:, 1] = 0
    read = network_input(protocol, frames, "i3d")
    assert read.shape == (3, 3, 2, 2)  # colours, frames, rows, columns
    assert read[0, :, 0, 0].tolist() == [-1, 0, 1] and read[1].unique().tolist() == [-1]
    assert network_input(replace(protocol, low=0.0), frames, "i3d")[0, :, 0, 0].tolist() == [0, 0.5, 1]
    assert network_input(protocol, frames, "c3d").shape == (3, 3, 112, 112)
    untouched = network_input(replace(protocol, network_prepares=True), frames, "i3d")
    assert untouched.shape == (3, 3, 4, 4) and untouched.max() == 255
