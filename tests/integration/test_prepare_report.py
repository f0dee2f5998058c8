"""`cogvideo prepare --report`: the page, and a folder that is otherwise untouched."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from cogvideo.cli.main import main
from cogvideo.data.dataset import ClipDataset, FrameDataset
from cogvideo.data.prepare import Preparation, PrepareConfig
from cogvideo.evaluation import data_report
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.locks import InUseError
from cogvideo.media.video import write_video

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'
SETTINGS = ["frame_pixels=40", "clips.clip_seconds=[1]", "clips.max_clips_per_length=1", "videos_per_shard=2"]
HOLD_LOCK = """
import sys
from cogvideo.locks import lock_folder
with lock_folder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def captions(tmp_path):
    moving = np.random.default_rng(0).integers(0, 256, (12, 40, 60, 3), np.uint8)
    write_video(tmp_path / "a.mp4", moving, 10)
    write_video(tmp_path / "b.mp4", moving[:1].repeat(12, axis=0), 10)
    write_video(tmp_path / "short.mp4", moving[:3], 10)
    lines = [{"video": "a.mp4", "caption": HOSTILE}, {"video": "b.mp4", "caption": "一只狗"}]
    lines.append({"video": "short.mp4", "caption": "a dog"})
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prepare(captions, out, *words):
    start = ["prepare", "--captions", str(captions), "--out", str(out), "--device", "cpu", *SETTINGS]
    return main([*start, *map(str, words)])


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "report.html")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_report_of_a_finished_folder_escapes_captions_and_changes_no_other_file(captions, tmp_path):
    tokens = ("--tokenizer", BUNDLED_WEIGHTS / "image_tokenizer")
    assert prepare(captions, tmp_path / "out", *tokens) == 0
    before, stamp = contents(tmp_path / "out"), (tmp_path / "out/shards/00000").stat().st_mtime_ns
    assert (
        prepare(captions, tmp_path / "out", *tokens, "--report", "--text-tokenizer", BUNDLED_WEIGHTS / "text.model")
        == 0
    )
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out/shards/00000").stat().st_mtime_ns == stamp
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "onerror=&quot;" in page
    assert "一只狗" in page and "data:image/png;base64," in page and "PSNR" in page
    assert "1 of 2 sampled clips are below 1" in page and "no clip fits between N s" in page
    assert "text tokens per caption" in page


def test_report_of_single_frames(captions, tmp_path):
    assert prepare(captions, tmp_path / "out", "--frames", "--report") == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "single frame" in page and "Near-static" not in page


def test_min_motion_leaves_out_the_static_video_and_says_so(captions, tmp_path):
    tokens = ("--tokenizer", BUNDLED_WEIGHTS / "image_tokenizer")
    assert prepare(captions, tmp_path / "out", *tokens, "clips.min_motion=1") == 0
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [entry["caption"] for entry in skipped] == [1, 2] and "clips.min_motion=1" in skipped[0]["reason"]
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["config"]["clips"]["min_motion"] == 1 and "min_distance" not in plan["config"]["clips"]


def test_options_without_effect_are_refused(captions, tmp_path, capsys):
    assert prepare(captions, tmp_path / "out", "--frames", "--report", "--dry-run") == 2
    assert "--report shows what was made" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_text_tokenizer_that_is_missing_is_named_before_anything_is_made(captions, tmp_path, capsys):
    assert prepare(captions, tmp_path / "out", "--frames", "--text-tokenizer", tmp_path / "a.model") == 2
    assert "a.model" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def shown(monkeypatch):
    """The clips that a report is made of."""
    clips, measured = [], data_report._measured

    def keep(*args):
        clips.append((args[0], args[3]))
        return measured(*args)

    monkeypatch.setattr(data_report, "_measured", keep)
    return clips


def test_the_report_shows_the_clips_that_were_kept_in_their_shards(captions, tmp_path, shown):
    names = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    for name in names[1:]:
        shutil.copy(tmp_path / "a.mp4", tmp_path / name)
    captions.write_text("".join(json.dumps({"video": name, "caption": "x"}) + "\n" for name in names))
    tokens = ("--tokenizer", BUNDLED_WEIGHTS / "image_tokenizer", "clips.min_distance=1", "--report")
    assert prepare(captions, tmp_path / "out", *tokens) == 0
    assert [video for video, _ in shown] == ["a.mp4", "c.mp4"], "the first of each shard of two videos"
    assert len(ClipDataset(tmp_path / "out")) == 2


@pytest.mark.parametrize("crop", [[], ["crop_pixels=24"]])
def test_the_report_shows_frames_as_they_are_stored(captions, tmp_path, shown, crop):
    words = ("--frames", "--report", "frames_per_video=3", *crop)
    assert prepare(captions, tmp_path / "out", *words) == 0
    stored = FrameDataset(tmp_path / "out").frames(range(9))
    assert stored.shape[1] == (24 if crop else 40)
    np.testing.assert_array_equal(np.concatenate([frames for _, frames in shown]), stored)


def test_no_report_is_written_while_another_process_fills_the_folder(captions, tmp_path):
    assert prepare(captions, tmp_path / "out", "--frames") == 0
    part = Preparation(captions, tmp_path / "out", "frames", PrepareConfig(frame_pixels=40))
    lock = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with lock:
        assert lock.stdout.readline() == b"locked\n"
        with pytest.raises(InUseError):
            data_report.write_report(part)
        lock.stdin.close()
    assert not (tmp_path / "out/report.html").exists()
    assert data_report.write_report(part).is_file()
