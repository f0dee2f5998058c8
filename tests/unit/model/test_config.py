"""Model sizes: derived values and refusals."""

import pytest

from cogvideo.model.config import ModelConfig
from tests.helpers.models import tiny_config


def test_defaults_are_the_published_stage_one() -> None:
    config = ModelConfig()
    assert (config.head_dim, config.frame_len, config.num_extra_positions) == (64, 400, 2000)
    assert config.layout.num_slots == 2000


def test_an_image_model_has_one_frame_and_no_temporal_channel() -> None:
    config = tiny_config("image")
    assert config.layout.num_frames == 1
    assert not config.has_temporal_channel
    assert config.num_extra_positions == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "model.num_heads=5 does not divide model.hidden_size=32"),
        ({"window_size": 3}, "model.window_size=3 does not divide the frame grid 4x4; choose a divisor of 4"),
        ({"num_layers": 0}, "model.num_layers=0; expected at least 1"),
        ({"num_heads": -1}, "model.num_heads=-1; expected at least 1"),
        ({"attention_dropout": 1.0}, "model.attention_dropout=1.0; expected a probability"),
        ({"window_size": 0}, "model.window_size=0 does not divide"),
        ({"text_len": 9}, "model.text_len=9 runs into the frames' positions"),
        ({"frame_side": 5}, "model.num_positions=32 leaves no room for a frame of 25 slots"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_interpolation_of_four_frames_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="num_frames=4"):
        tiny_config("interpolation", num_frames=4)
