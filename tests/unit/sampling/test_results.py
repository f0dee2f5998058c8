"""Output folders: names made of prompts, files of a clip, and folders that are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cogvideo.config import load_config
from cogvideo.media.video import read_video
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.results import claim_folder, sample_names, write_results

NASTY = ["../../etc/passwd", "a; rm -rf ~ `x` $(y)", "\0\n/", "红色的数字3" * 40, "CON", "-out"]


def test_names_cannot_leave_the_folder() -> None:
    names = sample_names(NASTY, 2)
    assert len(set(names)) == 12
    for name in names:
        assert name[:4].rstrip("-").isdigit() and len(name.encode()) < 128
        assert all(c.isalnum() or c == "-" for c in name)


def test_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, size=(2, 9, 1, 1, 3), dtype=np.uint8)
    frames = np.broadcast_to(colours, (2, 9, 40, 40, 3))
    tokens, config = torch.arange(2 * 9 * 25).view(2, 9, 25), SampleConfig(seed=7, rounds=1)
    written = list(write_results(tmp_path, ["a/b", "c"], config, "tiny", tokens, frames, 2.0))
    names = ["000-a-b", "001-c"]
    expected = ["tokens.safetensors", *(n + e for n in names for e in (".mp4", ".gif", ".png"))]
    assert [path.name for path in written] == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*expected, "config.yaml", "samples.json"])

    video, seconds = read_video(tmp_path / "001-c.mp4")
    assert video.shape == (9, 240, 240, 3)
    np.testing.assert_allclose(seconds, np.arange(9) / 2, atol=1e-6)
    assert np.abs(video.astype(int) - colours[1]).max() <= 8, "what is played is what was made"
    with Image.open(tmp_path / "001-c.png") as sheet:
        assert sheet.width > 9 * 40
    assert load_config(SampleConfig, [tmp_path / "config.yaml"]) == config
    about = json.loads((tmp_path / "samples.json").read_text())
    assert [(s["name"], s["prompt"]) for s in about["samples"]] == [("000-a-b", "a/b"), ("001-c", "c")]
    with safe_open(tmp_path / "tokens.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("tokens"), tokens) and file.get_tensor("seconds").item() == 4.0
        assert json.loads(file.metadata()["samples"])[0]["prompt"] == "a/b"


def test_large_pictures_are_not_enlarged(tmp_path: Path) -> None:
    frames = np.zeros((1, 2, 248, 256, 3), dtype=np.uint8)
    list(write_results(tmp_path, ["a"], SampleConfig(), "", torch.zeros(1, 2, 4).long(), frames, 8.0))
    assert read_video(tmp_path / "000-a.mp4")[0].shape == (2, 248, 256, 3)


def test_folders(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new" / "deep", overwrite=False)
    assert (tmp_path / "new" / "deep").is_dir() and not any((tmp_path / "new" / "deep").iterdir())
    (tmp_path / "new" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="is not empty; choose another folder, or --overwrite"):
        claim_folder(tmp_path / "new", overwrite=False)
    claim_folder(tmp_path / "new", overwrite=True)
    assert (tmp_path / "new" / "mine.txt").read_text() == "keep"
    with pytest.raises(FileExistsError, match="is a file"):
        claim_folder(tmp_path / "new" / "mine.txt", overwrite=True)
