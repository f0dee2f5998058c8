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
    with pytest.raises(ValueError, match=r"^f/v\.mp4 "):
        read_video(ByteRange(tar, 0, 700, "f/v.mp4"))
