"""Captions of the bodies world: wording in two languages, and spans in which the words are true."""

import numpy as np
import pytest

from cogvideo.data.clips import ClipConfig, plan_clips
from cogvideo.worlds.bodies.captions import SPAN_SECONDS, describe, find_span
from cogvideo.worlds.bodies.scene import EVENTS, FPS
from tests.helpers.bodies import find_clip, find_scene


@pytest.mark.parametrize("event", EVENTS)
def test_captions_name_every_body_and_the_motion(event):
    for number in range(6):
        scene = find_scene(event, number)[1]
        for seed in range(4):
            english = describe(scene, "en", np.random.default_rng(seed))
            chinese = describe(scene, "zh", np.random.default_rng(seed))
            for body in scene.bodies:
                assert f"{body.colour} {body.shape}" in english
            assert (scene.direction or "") in english and (scene.speed or "") in english
            assert all(ord(letter) > 127 for letter in chinese) and "  " not in english


@pytest.mark.parametrize("event", EVENTS)
def test_prepare_cuts_clips_of_the_captions_length_from_its_span(event):
    config = ClipConfig(clip_seconds=SPAN_SECONDS)
    _, truth = find_clip(event)
    assert {caption.clip_seconds for caption in truth.captions} >= {4.0, 2.0, 1.0}
    for caption in truth.captions:
        clips = plan_clips(np.arange(33) / FPS, config, caption.start, caption.end)
        assert {clip.seconds for clip in clips} == {caption.clip_seconds}


def test_short_spans_hold_the_event():
    for event in ("into", "knock"):
        _, truth = find_clip(event)
        contact = truth.states.first_contact(0, 1) / FPS
        for caption in truth.captions:
            assert caption.start < contact < caption.end
    _, truth = find_clip("fall")
    assert all(caption.start <= 0.25 for caption in truth.captions)


def test_no_span_where_nothing_happens_within_the_length():
    scene, truth = find_scene("bounce")[1], find_clip("bounce")[1]
    states = type(truth.states)(**{**truth.states.arrays(), "contact": np.zeros_like(truth.states.contact)})
    assert find_span(scene, states, truth.visible, 1.0, np.random.default_rng(0)) is None
