"""Clips and cuts between shots, with PySceneDetect if it is installed, and the error if it is not."""

import json
import sys

import numpy as np
import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.clips import ClipConfig, plan_clips
from cogvideo.data.extract import Extractor, VideoJob
from cogvideo.data.prepare import Preparation, PrepareConfig
from cogvideo.media.cuts import find_cuts
from cogvideo.media.video import write_video


@pytest.fixture
def video(tmp_path):
    """Eight frames per second: 2.5 s on red, then 1.5 s on blue, with a small moving square."""
    frames = np.zeros((32, 64, 64, 3), np.uint8)
    frames[:20, :, :, 0] = frames[20:, :, :, 2] = 200
    for index in range(32):
        frames[index, 10:20, index : index + 10] = 255
    write_video(tmp_path / "v.mp4", frames, 8)
    return tmp_path / "v.mp4"


def plan(video, cuts, monkeypatch, end=None):
    if cuts is not None:
        monkeypatch.setattr("cogvideo.data.extract.find_cuts", lambda path, threshold, info: np.array(cuts))
    config = ClipConfig(clip_seconds=(4.0, 2.0, 1.0), max_clips_per_length=1)
    extractor = Extractor(
        video.parent,
        32,
        lambda times, caption: plan_clips(times, config, caption.start, caption.end),
        True,
        1 << 30,
        None if cuts is None else 27.0,
    )
    found = extractor.plan(VideoJob(video.name, ((0, Caption(video.name, "x", 0.0, end)),)))
    return [(clip.seconds, *found.times[list(clip.frames)][[0, -1]]) for _, clip in found.rows]


def test_no_clip_crosses_a_cut(video, monkeypatch):
    assert plan(video, None, monkeypatch) == [(4.0, 0.0, 3.875)]
    assert plan(video, [2.5], monkeypatch) == [(2.0, 0.0, 2.0), (1.0, 2.5, 3.5)]
    assert plan(video, [2.5], monkeypatch, end=2.75) == [(2.0, 0.0, 2.0)]
    assert plan(video, [], monkeypatch) == [(4.0, 0.0, 3.875)]


def test_cuts_are_detected(video):
    pytest.importorskip("scenedetect", reason="needs the extra [data]")
    assert find_cuts(video, 27.0).tolist() == [2.5]
    assert find_cuts(video, 250.0).tolist() == []


def test_a_missing_extra_is_named(video, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    (tmp_path / "c.jsonl").write_text(json.dumps({"video": "v.mp4", "caption": "x"}) + "\n")
    config = PrepareConfig(clips=ClipConfig(cut_threshold=27.0))
    with pytest.raises(ValueError, match=r"pip install -e '\.\[data\]'"):
        Preparation(tmp_path / "c.jsonl", tmp_path / "out", "tokens", config)
    Preparation(tmp_path / "c.jsonl", tmp_path / "out", "frames", config)
