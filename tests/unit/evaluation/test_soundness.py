"""The checks of `cogvideo check`: each fault is named, and what is sound is called so."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cogvideo.data.statistics import CaptionLengths, CodeUse
from cogvideo.evaluation.soundness import (
    Decoded,
    check_cache,
    check_captions,
    check_round_trip,
    check_samples,
    check_training,
    decode_again,
    describe_slot,
    summary,
)
from cogvideo.inference.engine import ClipState
from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import Batch
from cogvideo.sequence.layout import Vocabulary

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    text_len=8,
    frame_side=3,
    num_frames=5,
    num_positions=24,
    frame_position_start=8,
    vocabulary=Vocabulary(size=60, num_image_tokens=32, pad=32, newline=33, start_of_image=34),
)
SOUND = Decoded(0.01, 1.0, 0.99, 1.0, None, 1e-6, "")


def lengths(*counts: int, spelled: int = 0) -> CaptionLengths:
    return CaptionLengths(np.array(counts), spelled)


def model_and_batch(**changes) -> tuple[CogVideoTransformer, Batch]:
    config = replace(CONFIG, **changes)
    model = CogVideoTransformer(config)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():  # larger than at the start of training, so that logits differ from slot to slot
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    random = torch.Generator().manual_seed(1)
    text = torch.randint(35, 60, (3, 8), generator=random)
    mask = torch.arange(8) >= torch.tensor([[0], [3], [5]])
    frames = torch.randint(32, (3, 5, 9), generator=random)
    return model.eval(), Batch(text, mask, frames, torch.ones(3))


@pytest.mark.parametrize("changes", [{}, {"learn_first_frame": True}, {"task": "interpolation"}])
def test_cached_logits_agree_with_uncached(changes: dict):
    decoded = decode_again(*model_and_batch(**changes))
    assert decoded.slot is None and decoded.difference < 1e-4
    assert check_cache(decoded).sound


def test_a_broken_cache_is_named_with_its_slot(monkeypatch: pytest.MonkeyPatch):
    right = ClipState.input_tokens

    def wrong_from_slot_20(state: ClipState, slots: torch.Tensor) -> torch.Tensor:
        tokens = right(state, slots)
        return torch.where(slots == 20, (tokens + 1) % 32, tokens)

    monkeypatch.setattr(ClipState, "input_tokens", wrong_from_slot_20)
    decoded = decode_again(*model_and_batch())
    finding = check_cache(decoded)
    assert decoded.slot == 20 and not finding.sound
    assert "cached logits differ from uncached at slot 20 (frame 2, row 0, column 2)" in finding.text


def test_logits_that_are_not_finite_differ(monkeypatch: pytest.MonkeyPatch):
    right = ClipState.sample
    monkeypatch.setattr(ClipState, "sample", lambda state, logits, slots: right(state, logits * torch.nan, slots))
    assert decode_again(*model_and_batch()).slot == 9


def test_drawn_tokens_are_the_likeliest_whatever_was_learned():
    decoded = decode_again(*model_and_batch())
    assert decoded.forced_right < 0.3 and decoded.consistent == 1
    assert check_samples(decoded).sound


def test_samples_that_the_model_would_not_draw_are_noise():
    assert check_samples(SOUND).sound
    noise = check_samples(replace(SOUND, sampled_right=0.03, consistent=0.05, slot=37))
    assert not noise.sound
    assert "loss falls but samples are noise, because cached logits differ from uncached at slot 37" in noise.text
    other = check_samples(replace(SOUND, sampled_right=0.03, consistent=0.05))
    assert not other.sound and "the schedule" in other.text


def test_a_model_that_has_not_learned_its_clips_is_named():
    assert check_training(SOUND, 6.9, 200, 1024).sound
    for loss in (5.0, float("nan")):
        finding = check_training(replace(SOUND, loss=loss), 6.9, 200, 1024)
        assert not finding.sound and "has not learned" in finding.text


def test_captions_that_are_cut_are_named():
    assert all(finding.sound for finding in check_captions(lengths(10, 20, 64), 64))
    captions, _ = check_captions(lengths(10, 20, 65), 64)
    assert not captions.sound and "1 of 3 are longer" in captions.text and "model.text_len=65" in captions.text
    captions, _ = check_captions(lengths(*[10] * 999, 65), 64)
    assert captions.sound and "1 of 1,000" in captions.text


def test_a_vocabulary_of_other_texts_is_named():
    _, vocabulary = check_captions(lengths(10, 20, 30, spelled=2), 64)
    assert not vocabulary.sound and "cogvideo vocabulary" in vocabulary.text


def test_reconstructions_must_beat_a_plain_colour():
    frames = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    use = CodeUse(500, 1000, 10_000)
    assert check_round_trip(frames, frames // 8 * 8, use).sound
    grey = check_round_trip(frames, np.full_like(frames, 128), use)
    assert not grey.sound and "train one on these videos" in grey.text
    few = check_round_trip(frames, frames // 8 * 8, CodeUse(3, 1000, 10_000))
    assert not few.sound and "look alike" in few.text
    black = np.zeros_like(frames)
    assert check_round_trip(black, black, use).sound  # a plain colour is perfect, and so are they


def test_slots_and_the_whole_are_described_in_words():
    assert describe_slot(37, 5) == "frame 1, row 2, column 2"
    assert summary([check_samples(SOUND)]).startswith("sound")
    assert summary([check_samples(SOUND), check_samples(replace(SOUND, consistent=0.0))]) == "broken: samples"
    assert str(check_samples(SOUND)).startswith("ok      samples: ")
