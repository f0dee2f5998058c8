"""What `cogvideo inspect` prints about a model's layout, masks and costs."""

import pytest

from cogvideo.model.config import ModelConfig
from cogvideo.planning.budgets import TrainingSettings
from cogvideo.planning.machines import MACHINES
from cogvideo.planning.report import (
    describe_layout,
    describe_sampling,
    describe_suggestions,
    describe_training,
    draw_masks,
    format_bytes,
    format_duration,
)
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
    with pytest.raises(ValueError, match="choose a side from 1 to"):
        draw_masks(ModelConfig(), side)


def test_costs_show_what_fits() -> None:
    settings = TrainingSettings(count=8, batch_size=416)
    small, large = (describe_training(ModelConfig(), MACHINES[name], settings) for name in ("t4-16", "h200-141"))
    assert "DOES NOT FIT" in small
    assert "DOES NOT FIT" not in large
    assert "8 x h200-141" in large and "13 x micro-batch 4" in large
    assert "* ZeRO 2" in large and "per step of 416" in large
    assert "estimates" in large and "not measured" in large


def test_an_offloaded_optimiser_is_in_cpu_memory() -> None:
    settings = TrainingSettings(micro_batch=1, offload_optimizer=True)
    (row,) = [
        line
        for line in describe_training(ModelConfig(), MACHINES["rtx4090-24"], settings).splitlines()
        if "*" in line[:4]
    ]
    assert "of CPU memory, fits" in row and "optimiser" not in row and "gradients" not in row


def test_suggestions_are_the_words_of_a_run() -> None:
    text = describe_suggestions(ModelConfig(attention_dropout=0.0), MACHINES["h100-80"], TrainingSettings(count=8))
    assert "a batch of 416" in text and "train.micro_batch_size=" in text and "deepspeed.stage=1" in text
    small = TrainingSettings(frozen_trunk=False, batch_size=1)
    assert "nothing fits" in describe_suggestions(ModelConfig(attention_dropout=0.0), MACHINES["t4-16"], small)


def test_sampling_costs_are_shown() -> None:
    assert "1,600 tokens in sequence" in describe_sampling(ModelConfig(), MACHINES["a100-80"])


def test_sizes_and_durations_are_formatted() -> None:
    assert [format_bytes(n) for n in (512, 3 << 20, 5 << 30)] == ["0.5 KiB", "3.0 MiB", "5.0 GiB"]
    seconds = (0.0042, 0.12, 2.5, 600, 4 * 3600, 3 * 86400)
    assert [format_duration(s) for s in seconds] == ["4.2 ms", "120.0 ms", "2.5 s", "10 min", "4.0 h", "3.0 days"]
