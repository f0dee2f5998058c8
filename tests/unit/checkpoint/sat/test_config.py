"""Our config for a published checkpoint, from its tensors, its model_config.json and the user's settings."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cogvideo.checkpoint.sat.config import SatSettings, VocabularyIds
from cogvideo.checkpoint.sat.convert import from_sat
from tests.helpers.sat import WriteSat


def test_model_config_or_settings_tell_the_stage(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    stage2 = write_sat("video", "two", config={"cogvideo_stage": 2, "window_size": 2})
    model = from_sat(stage2, tmp_path / "x", settings).config["model"]
    assert (model["task"], model["window_size"], model["num_frames"], model["frame_side"]) == ("interpolation", 2, 5, 2)
    unknown = write_sat("video", "unknown", config={})
    with pytest.raises(ValueError, match="task=sequential"):
        from_sat(unknown, tmp_path / "x", settings)
    given = dataclasses.replace(settings, task="sequential")
    assert from_sat(unknown, tmp_path / "x", given).config["model"]["task"] == "sequential"


def test_sizes_come_from_model_config(write_sat: WriteSat, tmp_path: Path) -> None:
    sat_config = {
        "cogvideo_stage": 1,
        "layout": [6, 10, 26],
        "num_attention_heads": 4,
        "window_size": -1,
        "num_layers": 2,
    }
    settings = SatSettings(vocab=VocabularyIds(16, 16, 17, 18), frame_position_start=6)
    source = write_sat("video", config=sat_config)
    model = from_sat(source, tmp_path / "x", settings).config["model"]
    assert (model["text_len"], model["frame_side"], model["num_heads"], model["window_size"]) == (6, 2, 4, None)
    unsound = write_sat("video", "unsound", config=sat_config | {"layout": [6, 11, -4]})
    with pytest.raises(ValueError, match=r"give frame_side="):
        from_sat(unsound, tmp_path / "x", settings)
    wrong = write_sat("video", "wrong", config=sat_config | {"num_layers": 3})
    with pytest.raises(ValueError, match="num_layers=3"):
        from_sat(wrong, tmp_path / "x", settings)


def test_too_few_embedding_rows_for_the_vocabulary(write_sat: WriteSat, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"24 embedding rows.*vocab\.num_image_tokens"):
        from_sat(write_sat("video"), tmp_path / "x", SatSettings())


@pytest.mark.parametrize(
    ("kind", "given", "names"),
    [
        ("image", {"window_size": 2}, "window_size"),
        ("image", {"task": "sequential"}, "task"),
        ("direct_superres", {"frame_position_start": 8}, "frame_position_start"),
        ("iterative_superres", {"task": "interpolation", "window_size": 0}, "task, window_size"),
    ],
)
def test_settings_that_a_model_does_not_have_are_refused(
    kind: str, given: dict[str, Any], names: str, write_sat: WriteSat, tmp_path: Path, settings: SatSettings
) -> None:
    fitting = SatSettings(settings.vocab, num_heads=2, frame_side=2, text_len=8)
    with pytest.raises(ValueError, match=f"holds a model of kind {kind}, which has no {names}; leave it out"):
        from_sat(write_sat(kind), tmp_path / "x", dataclasses.replace(fitting, **given))
