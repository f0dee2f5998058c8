"""The bodies world as files: the same bytes again, resumed or in several processes, and captions that prepare reads."""

import json

import numpy as np
import pytest

from cogvideo.cli.main import main
from cogvideo.data.readers import open_captions
from cogvideo.media.video import read_video
from cogvideo.worlds.bodies import physics
from cogvideo.worlds.bodies.files import Settings, make_clip, read_truth, write_dataset

pytest.importorskip("pybullet", reason="the bodies world needs the extra [worlds]")
SMALL = Settings("train", 0, 64)


def read_all(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_resumed_and_parallel_runs_write_the_same_bytes(tmp_path):
    write_dataset(tmp_path / "once", SMALL, 3)
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice/.dataset.abcdefgh.tmp.json").touch()  # of a run that was killed at once
    write_dataset(tmp_path / "twice", SMALL, 1)
    (tmp_path / "twice/clips/.000001.abcdefgh.tmp.mp4").touch()  # of one that was killed later
    write_dataset(tmp_path / "twice", SMALL, 3, processes=2)
    assert read_all(tmp_path / "once") == read_all(tmp_path / "twice")


def test_captions_and_truth_read_back(tmp_path):
    captions = write_dataset(tmp_path / "set", SMALL, 2)
    found = list(open_captions(captions))
    written = []
    for index in range(2):
        truth = read_truth(tmp_path / f"set/truth/{index:06d}.npz")
        frames, expected = make_clip(SMALL, index)
        assert truth.scene == expected.scene and truth.captions == expected.captions
        assert np.array_equal(truth.states.position, expected.states.position)
        decoded, seconds = read_video(tmp_path / f"set/clips/{index:06d}.mp4")
        assert np.abs(decoded.astype(int) - frames).mean() < 2 and seconds[-1] == 4.0
        written += [(f"clips/{index:06d}.mp4", line.text, line.start, line.end) for line in truth.captions]
    assert [(line.video, line.text, line.start, line.end) for line in found] == written


def test_192_pixels_writes_both_sizes(tmp_path):
    write_dataset(tmp_path / "set", Settings("test", 0, 192), 1)
    large, _ = read_video(tmp_path / "set/clips_192/000000.mp4")
    small, _ = read_video(tmp_path / "set/clips/000000.mp4")
    assert large.shape == (33, 192, 192, 3) and small.shape == (33, 64, 64, 3)
    lines = (tmp_path / "set/captions_192.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["video"] == "clips_192/000000.mp4"


def test_a_folder_with_other_settings_or_files_is_refused(tmp_path):
    write_dataset(tmp_path / "set", SMALL, 1)
    with pytest.raises(ValueError, match=r"was written with .*; use another folder or the same settings"):
        write_dataset(tmp_path / "set", Settings("train", 1, 64), 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/keep.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_dataset(tmp_path / "mine", SMALL, 1)


@pytest.mark.parametrize("values", [("valid", 0, 64), ("train", -1, 64), ("train", 0, 100)])
def test_bad_settings(values):
    with pytest.raises(ValueError, match=r"choose|negative"):
        Settings(*values)


def test_truth_that_is_none_is_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"bad\.npz"):
        read_truth(tmp_path / "bad.npz")


def test_a_missing_pybullet_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "pybullet", None)
    with pytest.raises(ValueError, match=r"\.\[worlds\]"):
        physics.load_pybullet()
    assert main(["worlds", "bodies", "--out", str(tmp_path / "set"), "--count", "1"]) == 2
    assert ".[worlds]" in capsys.readouterr().err and not (tmp_path / "set").exists()


def test_command_writes_a_set(tmp_path, capsys):
    words = ["worlds", "bodies", "--out", str(tmp_path / "set"), "--count", "1", "--pixels", "64", "--split", "unseen"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "set/captions.jsonl")
