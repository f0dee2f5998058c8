"""Videos inside other files."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from cogvideo.media.byte_range import ByteRange, check_readable, is_file
from cogvideo.media.video import probe_video, read_video, write_video


def test_a_video_in_the_middle_of_a_file_is_read_in_place(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
    write_video(tmp_path / "v.mp4", frames, 8)
    data = (tmp_path / "v.mp4").read_bytes()
    tar = tmp_path / "a, b:%é"
    tar.write_bytes(b"x" * 777 + data + b"y" * 777)
    inside = ByteRange(tar, 777, len(data), "f/v.mp4")
    expected, times = read_video(tmp_path / "v.mp4", side=16)
    found, found_times = read_video(inside, side=16)
    assert (found == expected).all() and (found_times == times).all()
    assert (probe_video(inside).seconds == probe_video(tmp_path / "v.mp4").seconds).all()
    with pytest.raises(ValueError, match=r"^f/v\.mp4 is not a readable video"):
        read_video(ByteRange(tar, 0, 700, "f/v.mp4"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty; download or copy it again"),
        (b" \n" * 10, "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer to a file in Git LFS"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page, not a video"),
        (b"\0\0\0", "is not a readable video"),
    ],
)
def test_what_a_download_left_instead_of_a_video_is_named(tmp_path, content, problem):
    (tmp_path / "a.mp4").write_bytes(content)
    (tmp_path / "s.tar").write_bytes(b"x" * 512 + content + b"x" * 512)
    for path in (tmp_path / "a.mp4", ByteRange(tmp_path / "s.tar", 512, len(content), "s.tar/a.mp4")):
        with pytest.raises(ValueError, match=problem) as caught:
            probe_video(path)
        assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_failing_disk_is_not_a_missing_file(tmp_path, monkeypatch, number):
    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("cogvideo.media.byte_range.os.stat", fail)
    with pytest.raises(OSError) as caught:
        is_file(tmp_path / "a.mp4")
    monkeypatch.undo()
    assert caught.value.errno == number


def test_a_file_is_read_to_its_end(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(3 << 20))
    check_readable(tmp_path / "a.tar")
    check_readable(ByteRange(tmp_path / "a.tar", 512, 2 << 20, "a"))
    for path in ("/proc/self/mem", ByteRange(Path("/proc/self/mem"), 0, 8, "a")):
        with pytest.raises(OSError) as caught:
            check_readable(path)
        assert caught.value.errno == errno.EIO
