"""Videos inside other files."""

import numpy as np
import pytest

from cogvideo.media.byte_range import ByteRange
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
