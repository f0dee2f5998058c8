"""What `cogvideo inspect` prints about a model's layout, masks and costs."""

import pytest

from cogvideo.model.config import ModelConfig
from cogvideo.planning.budgets import TrainingSettings
from cogvideo.planning.machines import MACHINES
from cogvideo.planning.report import describe_costs, describe_layout, draw_masks, format_bytes, format_duration
from tests.helpers.models import tiny_config


def test_layout_lists_what_each_frame_attends_to() -> None:
    text = describe_layout(tiny_config("interpolation", window_size=2))
    assert "clip: 6 text rows, then 5 frames of 4x4 = 16 slots: 86 rows" in text
    assert "frame 2: given      order 0  attends to all of frames 0, 2, 4\n" in text
    assert (
        "frame 3: generated  order 2  attends to all of frames 0, 1, 2, 4 and its own slots up to the current one"
        in text
    )
    assert "in windows of 2x2, shifted by 1 on odd layers" in text


def test_an_image_model_has_no_temporal_line() -> None:
    text = describe_layout(tiny_config("image"))
    assert "frame 0: generated  order 0  attends to its own slots up to the current one" in text
    assert "temporal" not in text


def test_masks_from_one_slot() -> None:
    text = draw_masks(tiny_config("interpolation", window_size=2))
    _, even, odd = text.split("\n\n")
    assert even.splitlines() == [
        "temporal channel, even layers: keys of slot @ in frames 0 1 2 3 4",
        "##..  ##..  ##..  ##..  ##..",
        "##..  ##..  ##..  #@..  ##..",
        "....  ....  ....  ....  ....",
        "....  ....  ....  ....  ....",
    ]
    assert odd.splitlines()[1:] == [
        "....  ....  ....  ....  ....",
        ".##.  .##.  .##.  .@..  .##.",
        ".##.  .##.  .##.  ....  .##.",
        "....  ....  ....  ....  ....",
    ]


def test_whole_masks_of_small_frames() -> None:
    text = draw_masks(ModelConfig(), side=2)
    assert "temporal channel, all layers: queries down, keys across, frames of 2x2" in text
    assert text.endswith("#### #### #### #### ####")
    assert "windows of 2x2" in draw_masks(ModelConfig(task="interpolation", window_size=10), side=4)


@pytest.mark.parametrize("side", [0, 7])
def test_masks_too_wide_to_read_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match="expected a side of 1 to"):
        draw_masks(ModelConfig(), side)


def test_costs_show_what_fits() -> None:
    small, large = (
        describe_costs(ModelConfig(), MACHINES[name], TrainingSettings(count=8), "the vendor's figures")
        for name in ("t4-16", "h200-141")
    )
    assert "DOES NOT FIT" in small
    assert "DOES NOT FIT" not in large
    assert "8 x h200-141" in large
    assert "* ZeRO 2" in large


def test_sizes_and_durations_are_formatted() -> None:
    assert [format_bytes(n) for n in (512, 3 << 20, 5 << 30)] == ["0.5 KiB", "3.0 MiB", "5.0 GiB"]
    seconds = (0.0042, 0.12, 2.5, 600, 4 * 3600, 3 * 86400)
    assert [format_duration(s) for s in seconds] == ["4.2 ms", "120.0 ms", "2.5 s", "10 min", "4.0 h", "3.0 days"]
