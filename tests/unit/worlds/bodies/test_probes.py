"""Probes of the bodies world: right on real clips, wrong on clips that do not show what the caption says."""

from dataclasses import fields

import numpy as np
import pytest

from cogvideo.worlds.bodies.measure import ClipMeasurements, Facts
from cogvideo.worlds.bodies.probes import BOOLEAN_PROBES, ClipScore, score_clip, summarise
from cogvideo.worlds.bodies.scene import EVENTS, FPS, ROLLING
from cogvideo.worlds.bodies.tracking import COLOUR_NAMES, track
from tests.helpers.bodies import find_clip

TIMES = np.arange(33) / FPS


def measure(event, number=0, change=lambda frames: frames, times=TIMES):
    frames, truth = find_clip(event, number)
    return ClipMeasurements(track(np.ascontiguousarray(change(frames))), Facts.from_scene(truth.scene), times)


def mirror(frames):
    return frames[:, :, ::-1]


def freeze(frames):
    return frames[:1].repeat(len(frames), axis=0)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("number", range(2))
def test_real_clips_have_their_colours_and_movers(event, number):
    clip = measure(event, number)
    assert clip.colours_right()
    assert event == "circle" or clip.movers_right()
    stray = clip.stray()
    assert stray is None or event == "circle" or stray < 0.5


@pytest.mark.parametrize("event", [*ROLLING, "topple", "circle"])
def test_direction_is_seen_and_a_mirrored_clip_has_the_other(event):
    assert measure(event).direction_right()
    assert not measure(event, change=mirror).direction_right()
    assert not measure(event, change=freeze).direction_right()


@pytest.mark.parametrize("event", [*ROLLING, "circle"])
def test_speed_is_measured_at_every_clip_length(event):
    assert measure(event).speed_ratio() == pytest.approx(1, abs=0.15)
    if event in ("roll", "circle"):  # the others meet a body within the clip
        for frames in (33, 17, 9)[: 2 if event == "circle" else 3]:
            picked = np.linspace(0, frames - 1, 5).astype(int)
            ratio = measure(event, change=lambda clip, picked=picked: clip[picked], times=TIMES[picked]).speed_ratio()
            assert ratio == pytest.approx(1, abs=0.15)
    assert measure(event, times=2 * TIMES).speed_ratio() == pytest.approx(0.5, abs=0.1)


def test_depth_order_follows_who_hides_whom():
    assert measure("behind").depth_right() and measure("front").depth_right()
    behind, front = measure("behind"), measure("front")
    behind.facts, front.facts = front.facts, behind.facts
    assert not behind.depth_right() and not front.depth_right()


def test_contact_needs_the_hit_body_to_move_when_the_ball_is_there():
    for event in ("into", "knock"):
        assert measure(event).contact_right()
        assert not measure(event, change=freeze).contact_right()
        assert not measure(event, change=lambda frames: frames[::-1]).contact_right()


@pytest.mark.parametrize("event", ["fall", "onto", "bounce"])
def test_gravity_is_the_worlds_and_slow_motion_is_not(event):
    clip = measure(event)
    assert clip.gravity_ratio() == pytest.approx(1, abs=0.12)
    assert clip.gravity_right(clip.gravity_ratio())
    slow = measure(event, change=lambda frames: frames[np.arange(33) // 2])
    assert not slow.gravity_right(slow.gravity_ratio())
    still = measure(event, change=freeze)
    assert not still.gravity_right(still.gravity_ratio())


def test_a_clip_in_which_nothing_falls_has_an_error_of_one():
    """Or clips that stand still would raise no error, and a model could reach the target with them."""
    unknown = dict.fromkeys((field.name for field in fields(ClipScore)), None)
    judged = [(1.1, True), (None, False), (None, None)]
    scores = [ClipScore(**{**unknown, "gravity_ratio": ratio, "gravity": right}) for ratio, right in judged]
    error = summarise(scores).means["gravity_error"]
    assert error.value == pytest.approx(0.55) and error.total == 2


def test_a_camera_that_shows_a_single_body_is_wrong():
    clip = measure("circle")
    clip.present[:, 1:] = False
    assert clip.direction_right() is False and clip.speed_ratio() == 0


def test_permanence_needs_the_ball_to_come_out_on_the_other_side():
    assert measure("behind").permanence_right()
    assert not measure(
        "behind", change=lambda frames: np.concatenate([frames[:17], frames[16::-1][:16]])
    ).permanence_right()
    assert not measure("behind", change=freeze).permanence_right()


def test_towers_lie_at_the_end_and_falling_bodies_rest():
    assert measure("topple").toppled() and measure("knock").toppled()
    assert measure("fall").landed() and measure("onto").landed() and measure("bounce").bounced()
    assert not measure("topple", change=freeze).toppled() and not measure("fall", change=freeze).landed()


def test_a_jittering_body_is_not_still():
    rng = np.random.default_rng(0)
    shifts = rng.integers(-2, 3, 33)
    number = next(n for n in range(20) if len(find_clip("bounce", n)[1].scene.bodies) > 1)
    shaken = measure(
        "bounce", number, lambda frames: np.stack([np.roll(f, s, 1) for f, s in zip(frames, shifts, strict=True)])
    )
    assert measure("bounce", number).stray() < 0.5 < shaken.stray()


def test_a_colour_too_many_is_wrong():
    frames, truth = find_clip("roll")
    other = next(name for name in COLOUR_NAMES if name not in ("white", truth.scene.bodies[0].colour))
    painted = frames.copy()
    painted[:, 50:58, 2:10] = {"red": (220, 30, 30), "green": (20, 160, 50)}.get(other, (30, 80, 230))
    assert not measure("roll", change=lambda _: painted).colours_right()


@pytest.mark.slow
def test_scores_of_all_probes_on_real_clips():
    scores = []
    for event in EVENTS:
        for number in range(2):
            frames, truth = find_clip(event, number)
            scores.append(score_clip(frames, Facts.from_scene(truth.scene), TIMES))
    summary = summarise(scores)
    assert set(summary.proportions) == set(BOOLEAN_PROBES)
    for name, proportion in summary.proportions.items():
        assert proportion.total and proportion.value >= 0.9, name
    assert {"speed_ratio", "gravity_ratio", "colours"} <= set(summary.to_json())


def test_bad_shapes_are_refused():
    frames, truth = find_clip("roll")
    facts = Facts.from_scene(truth.scene)
    with pytest.raises(ValueError, match="expected"):
        score_clip(frames, facts, TIMES[:5])
    with pytest.raises(ValueError, match="multiple of 64"):
        score_clip(frames[:, :50, :50], facts, TIMES)
