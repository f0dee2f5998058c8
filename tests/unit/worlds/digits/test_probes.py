"""The probes on rendered clips: real ones score well, each kind of error is detected, failed clips count as wrong."""

from dataclasses import replace

import numpy as np
import pytest

from cogvideo.worlds.digits.probes import FAILED_PX, probe_clips, summarise
from cogvideo.worlds.digits.render import BACKGROUND, COLOURS, DIRECTIONS, draw_clip, frame_times, render

TIMES = np.linspace(0, 4, 5)
REVERSE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(1)
    return [draw_clip(rng, "test") for _ in range(40)]


@pytest.fixture(scope="module")
def frames(clips):
    return np.stack([render(clip, TIMES) for clip in clips])


def test_real_clips_score_near_the_top(clips, frames):
    summary = summarise(probe_clips(frames, clips, TIMES))
    assert summary.complete.value == summary.colour.value == summary.direction.value == 1
    assert summary.digit.value >= 0.9 and summary.digit_frames.value >= 0.9
    assert summary.step_error.value < 0.15
    assert summary.step_by_speed["slowly"].value == pytest.approx(2, abs=0.02)
    assert summary.step_by_speed["quickly"].value == pytest.approx(6, abs=0.05)


@pytest.mark.parametrize("seconds", [2.0, 1.0])
def test_shorter_clips_move_less_per_frame(clips, seconds):
    times = np.linspace(0, seconds, 5)
    short = np.stack([render(clip, times) for clip in clips])
    assert summarise(probe_clips(short, clips, times)).step_error.value < 0.1
    # The same clips scored as if 4 s had been requested: too little motion.
    error = summarise(probe_clips(short, clips, TIMES)).step_error.value
    assert error > 0.8


def test_whole_clips_are_smooth_and_a_jerk_is_detected(clips):
    whole = np.stack([render(clip, frame_times()) for clip in clips[:8]])
    summary = summarise(probe_clips(whole, clips[:8], frame_times(), 5))
    assert summary.midpoint is not None and summary.midpoint.value < 0.15 and len(summary.midpoint_by_round) == 3
    held = whole.copy()
    held[:, 1::2] = whole[:, 0:-1:2]  # odd frames repeat the one before: half a step off the midpoint
    jerky = summarise(probe_clips(held, clips[:8], frame_times(), 5))
    assert jerky.midpoint_by_round[2].value > summary.midpoint_by_round[2].value + 0.1


def test_reversed_motion_is_wrong(clips, frames):
    backwards = [replace(clip, direction=REVERSE[clip.direction]) for clip in clips]
    scores = probe_clips(frames, backwards, TIMES)
    # A clip drawn to move left starts at the right; with "right" in its caption it should bounce, mostly at once.
    assert scores.direction.mean() == 0 and scores.step.max() < 0
    assert summarise(scores).step_error.value > 1


def test_frozen_clips_are_wrong_by_the_whole_step(clips, frames):
    frozen = np.repeat(frames[:, :1], 5, axis=1)
    summary = summarise(probe_clips(frozen, clips, TIMES))
    assert summary.direction.value == 0 and summary.digit.value >= 0.9
    nominal = np.mean([np.abs(np.diff(clip.positions(TIMES), axis=0)).sum(axis=1).mean() for clip in clips])
    assert summary.step_error.value == pytest.approx(nominal, abs=0.1)


def test_wrong_colour_digit_and_axis_are_found(clips, frames):
    names = list(COLOURS)
    other = [
        replace(
            clip,
            colour=names[(names.index(clip.colour) + 1) % len(names)],
            label=(clip.label + 1) % 10,
            direction=list(DIRECTIONS)[(list(DIRECTIONS).index(clip.direction) + 2) % 4],
        )
        for clip in clips
    ]
    summary = summarise(probe_clips(frames, other, TIMES))
    assert summary.colour.value == 0 and summary.direction.value == 0 and summary.digit.value <= 0.1


def test_a_clip_that_loses_its_digit_counts_as_wrong_everywhere(clips, frames):
    damaged = frames.copy()
    damaged[0, 3] = BACKGROUND
    scores = probe_clips(damaged, clips, TIMES)
    assert not (scores.complete[0] or scores.digit[0] or scores.colour[0] or scores.direction[0])
    assert scores.step_error[0] == FAILED_PX and scores.step[0] == 0
    assert scores.complete[1:].all() and len(scores.digit) == len(clips)


def test_shapes_that_do_not_match_are_refused(clips, frames):
    with pytest.raises(ValueError, match="expected"):
        probe_clips(frames[:, :4], clips, TIMES)


def test_new_colours_are_told_from_old_ones():
    rng = np.random.default_rng(3)
    clips = [draw_clip(rng, "train", "new") for _ in range(12)]
    times = np.linspace(0, 4, 5)
    frames = np.stack([render(clip, times) for clip in clips])
    assert summarise(probe_clips(frames, clips, times)).colour.value == 1
    nearest = {"orange": "red", "violet": "blue", "cream": "white"}
    old = np.stack([render(replace(clip, colour=nearest[clip.colour]), times) for clip in clips])
    assert summarise(probe_clips(old, clips, times)).colour.value == 0
