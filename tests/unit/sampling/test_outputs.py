"""Results on disk: files of a clip, and files about all clips."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from cogvideo.config import load_config
from cogvideo.media.video import read_video
from cogvideo.rng import sample_keys
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.outputs import describe_samples, write_clip, write_summary


def coloured(count: int) -> np.ndarray:
    colours = np.random.default_rng(0).integers(0, 255, size=(count, 1, 1, 3), dtype=np.uint8)
    return np.broadcast_to(colours, (count, 40, 40, 3))


def test_summary(tmp_path: Path) -> None:
    tokens, config = torch.arange(2 * 9 * 25).view(2, 9, 25), SampleConfig(seed=7, rounds=1)
    keys = sample_keys(7, ["a/b", "c"])
    about = describe_samples(["000-a-b", "001-c"], keys)
    write_summary(tmp_path, config, about, tokens, seconds=2.0, extra={"weights": "tiny"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "samples.json", "tokens.safetensors"]
    assert load_config(SampleConfig, [tmp_path / "config.yaml"]) == config
    found = json.loads((tmp_path / "samples.json").read_text())
    assert [(s["name"], s["prompt"]) for s in found["samples"]] == [("000-a-b", "a/b"), ("001-c", "c")]
    assert (found["weights"], found["fps"]) == ("tiny", 4.0)
    with safe_open(tmp_path / "tokens.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("tokens"), tokens) and file.get_tensor("seconds").item() == 2.0
        assert json.loads(file.metadata()["samples"])[0]["prompt"] == "a/b"


def test_clip_files_and_their_contents(tmp_path: Path) -> None:
    frames = coloured(9)
    written = list(write_clip(tmp_path / "x.y", frames, 2.0, "a caption"))
    assert {path.name for path in written} == {"x.y.mp4", "x.y.gif", "x.y.png"} == set(os.listdir(tmp_path))
    video, seconds = read_video(tmp_path / "x.y.mp4")
    assert video.shape == (9, 240, 240, 3)
    np.testing.assert_allclose(seconds, np.arange(9) / 2, atol=1e-6)
    assert np.abs(video.astype(int) - frames[:, :1, :1]).max() <= 8, "the video shows the frames"
    with Image.open(tmp_path / "x.y.png") as sheet:
        assert sheet.width > 9 * 40


def test_a_growing_clip(tmp_path: Path) -> None:
    """A single frame gets a sheet only; more frames a video too; the .gif comes last."""
    assert [path.suffix for path in write_clip(tmp_path / "a", coloured(1), 1.0, "a", final=False)] == [".png"]
    grown = [path.suffix for path in write_clip(tmp_path / "a", coloured(5), 1.0, "a", final=False)]
    assert grown == [".png", ".mp4"] and read_video(tmp_path / "a.mp4")[0].shape[0] == 5


def test_a_gif_of_a_fast_clip_is_thinned(tmp_path: Path) -> None:
    list(write_clip(tmp_path / "a", coloured(65), 64.0, "a"))
    assert len(read_video(tmp_path / "a.mp4")[0]) == 65
    with Image.open(tmp_path / "a.gif") as gif:
        assert 20 < gif.n_frames <= 33


def test_a_gif_of_a_long_clip_is_sped_up(tmp_path: Path) -> None:
    still = np.broadcast_to(coloured(1), (5, 40, 40, 3))
    for frames in (coloured(5), still):
        list(write_clip(tmp_path / "a", frames, 1 / 900, "a"))
        np.testing.assert_allclose(read_video(tmp_path / "a.mp4")[1], 900 * np.arange(5), rtol=1e-6)


def test_large_frames_are_not_enlarged(tmp_path: Path) -> None:
    list(write_clip(tmp_path / "a", np.zeros((2, 248, 256, 3), dtype=np.uint8), 8.0, "a"))
    assert read_video(tmp_path / "a.mp4")[0].shape == (2, 248, 256, 3)
