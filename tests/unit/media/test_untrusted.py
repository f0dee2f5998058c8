"""Strangers' files: what is read, and what is refused before anything is decoded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideo.media.untrusted import check_untrusted
from cogvideo.media.video import write_video


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "bmp", "tiff", "mp4"])
def test_plain_files_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "mp4":
        write_video(path, np.zeros((4, 16, 24, 3), np.uint8), 2)
    else:
        Image.new("RGB", (24, 16)).save(path)
    info = check_untrusted(path)
    assert (info.width, info.height, len(info.seconds)) == (24, 16, 4 if ending == "mp4" else 1)


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat", "list.png"])
def test_files_that_name_others_are_refused(tmp_path: Path, name: str) -> None:
    """FFmpeg by itself would read the video that these lists name."""
    write_video(tmp_path / "secret.mp4", np.zeros((4, 16, 16, 3), np.uint8), 2)
    for text in ("ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="is no picture or video that can be read"):
            check_untrusted(tmp_path / name)


def test_bounds(tmp_path: Path) -> None:
    Image.new("RGB", (300, 20)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png has 300x20 pixels; send at most 5999 in all"):
        check_untrusted(tmp_path / "wide.png", max_pixels=5999)
    moves = [Image.new("RGB", (300, 20), colour) for colour in ("red", "blue")]
    moves[0].save(tmp_path / "moves.webp", save_all=True, append_images=moves[1:])  # FFmpeg takes its size for 0x0
    with pytest.raises(ValueError, match="is no picture or video that can be read"):
        check_untrusted(tmp_path / "moves.webp", max_pixels=5999)
    write_video(tmp_path / "long.mp4", np.zeros((9, 16, 16, 3), np.uint8), 2)
    with pytest.raises(ValueError, match=r"long\.mp4 lasts 4 seconds; send at most 3"):
        check_untrusted(tmp_path / "long.mp4", max_seconds=3)


def test_a_name_that_means_a_row_of_files_is_refused(tmp_path: Path) -> None:
    for name in ("a001.png", "a%03d.png"):
        Image.new("RGB", (24, 16)).save(tmp_path / name)
    with pytest.raises(ValueError, match="is no picture or video that can be read"):
        check_untrusted(tmp_path / "a%03d.png")
