"""Multi-frame-rate clips: which frames are picked for given times, and properties that hold for any times."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.config import load_config
from cogvideo.data.clips import Clip, ClipConfig, plan_clips, plan_frames, rate_problem
from cogvideo.data.prepare import PrepareConfig

DIGIT_TIMES = np.arange(33) / 8
CONFIGS = Path(__file__).parents[3] / "configs/data"


def test_lowest_takes_the_longest_length_that_fits():
    clips = plan_clips(DIGIT_TIMES, ClipConfig(clip_seconds=(16.0, 4.0, 2.0)))
    assert [(clip.seconds, clip.frames) for clip in clips] == [(4.0, (0, 8, 16, 24, 32))]


def test_all_takes_every_length_evenly_spread():
    clips = plan_clips(DIGIT_TIMES, ClipConfig((4.0, 2.0, 1.0, 0.5), "all", max_clips_per_length=4))
    assert [clip.seconds for clip in clips] == [4.0] + [2.0] * 4 + [1.0] * 4 + [0.5] * 4
    for clip in clips:
        assert np.array_equal(np.diff(DIGIT_TIMES[list(clip.frames)]), [clip.seconds / 4] * 4)
    assert [DIGIT_TIMES[clip.frames[0]] for clip in clips if clip.seconds == 1] == [0, 1, 2, 3]
    assert clips[4].frames[-1] == 32


def test_a_length_fits_to_the_end_of_the_last_frames_display():
    clips = plan_clips(np.arange(100) / 25, ClipConfig((4.0,)))
    assert clips[0].frames == (0, 25, 50, 75, 99)
    assert plan_clips(np.arange(98) / 25, ClipConfig((4.0,))) == []


def test_clips_stay_inside_the_captioned_span():
    clips = plan_clips(np.arange(400) / 25, ClipConfig((8.0, 2.0, 1.0)), start=4.0, end=7.0)
    assert {clip.seconds for clip in clips} == {2.0}
    assert min(clip.frames[0] for clip in clips) == 100 and max(clip.frames[-1] for clip in clips) == 175


def test_no_frame_repeats_where_the_frame_rate_is_too_low():
    assert plan_clips(np.arange(20) / 2, ClipConfig((1.0,), "all")) == []
    assert plan_clips(np.arange(20) / 4, ClipConfig((1.0,), "all")) != []


@pytest.mark.parametrize("times", [[], [0.0], [0.0, 1.0, 2.0, 3.0]])
def test_too_few_frames_give_no_clip(times):
    assert plan_clips(np.array(times), ClipConfig((1.0,))) == []


@given(
    steps=st.lists(st.floats(0.005, 0.4), min_size=4, max_size=80),
    lengths=st.lists(st.floats(0.2, 8), min_size=1, max_size=4).map(tuple),
    policy=st.sampled_from(["lowest", "all"]),
    most=st.integers(1, 6),
    start=st.floats(0, 3),
    span=st.none() | st.floats(0.1, 10),
)
def test_every_clip_fits_its_length_span_and_tolerance(steps, lengths, policy, most, start, span):
    times = np.cumsum([0.0, *steps])
    config = ClipConfig(lengths, policy, max_clips_per_length=most)
    end = None if span is None else start + span
    clips = plan_clips(times, config, start, end)
    counts = {seconds: sum(clip.seconds == seconds for clip in clips) for seconds in {clip.seconds for clip in clips}}
    assert all(count <= most for count in counts.values())
    assert policy == "all" or len(counts) <= 1
    assert len({(clip.seconds, clip.frames) for clip in clips}) == len(clips)
    for clip in clips:
        picked = times[list(clip.frames)]
        assert clip.seconds in lengths and len(picked) == 5
        assert (np.diff(picked) > 0).all()
        wanted = picked[0] + np.linspace(0, clip.seconds, 5)
        assert (np.abs(picked - wanted) <= config.tolerance * clip.seconds / 4 + 1e-5).all()
        assert picked[0] >= start - 1e-5 and (end is None or picked[-1] <= end + 1e-5)


def test_single_frames_are_spread_over_the_span():
    assert [clip.frames for clip in plan_frames(DIGIT_TIMES, 3)] == [(0,), (16,), (32,)]
    assert [clip.frames for clip in plan_frames(DIGIT_TIMES, 2, start=1.0, end=2.0)] == [(8,), (16,)]
    assert plan_frames(DIGIT_TIMES, 9, start=1.0, end=1.2) == [Clip(0.0, (8,)), Clip(0.0, (9,))]
    assert plan_frames(DIGIT_TIMES, 3, start=9.0) == []


@given(rate=st.integers(4, 60), seconds=st.sampled_from([1.0, 2.0, 4.0, 8.0]))
def test_a_constant_rate_gives_a_clip_if_its_spacing_is_two_frames_or_more(rate, seconds):
    times = np.arange(int(10 * rate)) / rate
    found = plan_clips(times, ClipConfig((seconds,)))
    assert found or seconds / 4 * rate < 2


@pytest.mark.parametrize("name", ["recipe_ucf101", "recipe_kinetics600"])
@pytest.mark.parametrize("rate", [23.976, 24, 25, 29.97, 30, 50, 60])
def test_the_recipes_of_short_clips_take_all_common_frame_rates(name, rate):
    config = load_config(PrepareConfig, [CONFIGS / f"{name}.yaml"]).clips
    clips = plan_clips(np.arange(int(10 * rate)) / rate, config)
    assert {clip.seconds for clip in clips} == set(config.clip_seconds)


def test_a_frame_rate_that_gives_no_clip_is_the_reason():
    config, times = ClipConfig((0.6,), num_frames=16), np.arange(300) / 30
    assert plan_clips(times, config) == []
    assert rate_problem(times, config) == (
        "its 30 frames per second do not allow 16 frames evenly spread over 0.6 s (25 per second); "
        "raise clips.tolerance (below 0.5) or clips.clip_seconds"
    )
    assert rate_problem(times, config, start=1.0, end=1.5) is None
    slow = rate_problem(np.arange(20) / 2, ClipConfig((1.0,)))
    assert slow is not None and slow.endswith("(4 per second); raise clips.clip_seconds")
    assert rate_problem(np.array([0.0]), config) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_seconds": ()},
        {"clip_seconds": (0.0,)},
        {"num_frames": 1},
        {"max_clips_per_length": 0},
        {"tolerance": 0.5},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ClipConfig(**settings)
