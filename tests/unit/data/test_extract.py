"""Where a video of a captions file lies: names as other systems write them, and what is no name here."""

import unicodedata

import numpy as np
import pytest

from cogvideo.data.captions import Caption
from cogvideo.data.clips import ClipConfig, plan_clips
from cogvideo.data.extract import Extractor, VideoJob
from cogvideo.media.video import write_video


@pytest.fixture
def probe(tmp_path):
    """Writes a video under one name and finds its size under another."""
    folder = tmp_path / "videos"
    extractor = Extractor(folder, 16, lambda times, caption: [], False, 1 << 30)

    def find(stored, named):
        path = folder / stored
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, np.zeros((2, 16, 24, 3), np.uint8), 8)
        info = extractor.probe(VideoJob(named, ((0, Caption(named, "x")),)))
        return info.width, info.height

    return find


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("a%03d [1]*?#&.mp4", "a%03d [1]*?#&.mp4"),
        (" a.mp4 ", " a.mp4 "),
        ("clips/a.mp4", "clips\\a.mp4"),
        ("a.mp4", "\ufeffa.mp4"),
        ("a.mp4", " a.mp4\u00a0"),
        (unicodedata.normalize("NFD", "caf\u00e9.mp4"), "caf\u00e9.mp4"),
        ("caf\u00e9.mp4", unicodedata.normalize("NFD", "caf\u00e9.mp4")),
    ],
)
def test_a_name_is_found_however_another_system_writes_it(probe, stored, named):
    assert probe(stored, named) == (24, 16)


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("https://example.org/b.mp4", "https://example.org/b.mp4 is an address; download the video"),
        ("file:///data/b.mp4", "is an address"),
        ("C:\\data\\b.mp4", "is a path on another machine"),
        ("\\\\server\\b.mp4", "is a path on another machine"),
        ("..\\b.mp4", "is a link that leads out"),
        ("b.mp4", "b.mp4 is not a file"),
    ],
)
def test_what_is_no_name_here(probe, tmp_path, named, reason):
    (tmp_path / "b.mp4").write_bytes(b"outside of the folder")
    with pytest.raises(ValueError) as caught:
        probe("a.mp4", named)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("end", "words"), [(None, "its 10 frames per second"), (0.3, "no clip fits between 0 s and")])
def test_a_skipped_caption_names_the_frame_rate_if_the_span_is_long_enough(tmp_path, end, words):
    write_video(tmp_path / "a.mp4", np.zeros((20, 16, 16, 3), np.uint8), 10)
    clips = ClipConfig((0.5,), num_frames=11)
    extractor = Extractor(tmp_path, 16, lambda times, c: plan_clips(times, clips), False, 1 << 30, clips=clips)
    (skipped,) = extractor.plan(VideoJob("a.mp4", ((0, Caption("a.mp4", "x", 0.0, end)),))).skipped
    assert words in skipped["reason"] and ("per second" in skipped["reason"]) == (end is None)
