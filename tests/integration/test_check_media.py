"""Reading agrees with FFmpeg's program on one file of each kind; `scripts/check_media.py` has the whole matrix."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("imageio_ffmpeg", reason="needs FFmpeg's program")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import check_media

KINDS = (
    *(
        "mpeg4b.avi",
        "refresh.ts",
        "opengop265.mp4",
        "vfr_mkv.mkv",
        "trim264_1.25_2.0.mp4",
        "copycut.mkv",
        "shuffled.mkv",
    ),
    *("joined_h264.ts", "midgop_m2.ts", "sar4to3.mov", "containersar2to1.mkv", "turn90hflip.mp4", "cover_first.mp4"),
    *("two_default.mkv", "bt709_pc.mp4", "alpha_qtrle.mov", "interlaced_tff.ts", "odd17x130.gif", "a%03d.mp4"),
)


@pytest.mark.parametrize("name", KINDS)
def test_frames_and_times_are_those_of_ffmpeg(tmp_path, name):
    ffmpeg = check_media.find_ffmpeg()
    (case,) = (case for case in check_media.all_cases() if case.name == name)
    assert check_media.check(ffmpeg, case, tmp_path) is None


def test_a_difference_is_reported(tmp_path):
    ffmpeg = check_media.find_ffmpeg()
    case = check_media.plain("a.mkv", check_media.LOSSLESS, view="negate")
    assert "differs by" in check_media.check(ffmpeg, case, tmp_path)
    case = check_media.plain("b.mkv", check_media.LOSSLESS, view="setpts=2*PTS")
    assert "a time differs by" in check_media.check(ffmpeg, case, tmp_path)
