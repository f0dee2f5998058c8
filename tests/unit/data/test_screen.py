"""Which clips a screen leaves out, and what it says of them."""

import numpy as np

from cogvideo.data.clips import Clip
from cogvideo.data.extract import VideoPlan
from cogvideo.data.screen import ClipScreen

MOVING = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 40, 80, 120)])


def plan(*rows):
    return VideoPlan(np.arange(4.0), [(caption, Clip(1.0, frames)) for caption, frames in rows], [])


def test_without_thresholds_nothing_is_left_out():
    planned = plan((0, (0, 1)))
    kept, frames = ClipScreen(None, None).screen("a.mp4", planned, MOVING * 0)
    assert kept is planned and len(frames) == 4


def test_near_static_clips_are_left_out_and_their_frames_not_encoded():
    frames = MOVING.copy()
    frames[1] = frames[0]
    kept, pixels = ClipScreen(5.0, None).screen("a.mp4", plan((3, (0, 1)), (3, (2, 3)), (4, (0, 1))), frames)
    assert [(caption, clip.frames) for caption, clip in kept.rows] == [(3, (0, 1))]
    assert kept.times.tolist() == [2.0, 3.0] and np.array_equal(pixels, frames[2:])
    part, whole = kept.skipped
    assert part["screened"] and part["caption"] is None and "1 of 2 clips of caption 3" in part["reason"]
    assert whole["caption"] == 4 and "motion 0.00 of 255 is below clips.min_motion=5" in whole["reason"]


def test_near_duplicates_of_an_earlier_video_are_left_out():
    screen, planned = ClipScreen(None, 2.0), plan((0, (0, 1)), (0, (2, 3)))
    assert len(screen.screen("a.mp4", planned, MOVING)[0].rows) == 2
    kept, _ = screen.screen("b.mp4", planned, MOVING + np.array([1, 1, 200, 200], np.uint8)[:, None, None, None])
    assert [clip.frames for _, clip in kept.rows] == [(0, 1)]  # the second clip, renumbered
    assert "near-duplicate of a.mp4, distance 1.00 of 255" in kept.skipped[0]["reason"]


def test_clips_of_one_video_are_no_duplicates_of_each_other():
    kept, _ = ClipScreen(None, 2.0).screen("a.mp4", plan((0, (0, 1)), (1, (0, 1))), MOVING)
    assert len(kept.rows) == 2
