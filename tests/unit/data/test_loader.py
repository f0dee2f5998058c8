"""Batches by position: the same on any number of ranks, exact on resuming, every clip once per epoch."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.data.dataset import ClipDataset, FrameDataset, InMemoryClips
from cogvideo.data.loader import (
    ClipLoader,
    FrameLoader,
    LoaderConfig,
    balanced_rows,
    batch_indices,
    prefetch,
)
from cogvideo.sequence.layout import Vocabulary
from cogvideo.sequence.prompt import PromptFormat, seconds_as_given
from tests.helpers.data import VOCABULARY, ByteTokenizer, decode, make_prepared


@pytest.fixture
def clips(tmp_path):
    return ClipDataset(make_prepared(tmp_path / "prepared"))


@given(
    step=st.integers(0, 500),
    share=st.integers(1, 6),
    world_size=st.integers(1, 5),
    length=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_the_global_batch_does_not_depend_on_the_ranks(step, share, world_size, length, seed):
    batch = share * world_size
    alone, positions = batch_indices(step, 0, 1, batch, length, seed)
    for rank in range(world_size):
        part, part_positions = batch_indices(step, rank, world_size, batch, length, seed)
        assert (part == alone[rank::world_size]).all() and (part_positions == positions[rank::world_size]).all()


@given(batch=st.integers(1, 12), length=st.integers(1, 30), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_row_occurs_once_per_epoch(batch, length, epochs, seed):
    steps = -(-epochs * length // batch)
    seen = np.concatenate([batch_indices(step, 0, 1, batch, length, seed)[0] for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_epochs_are_in_different_orders():
    first, second = (batch_indices(step, 0, 1, 50, 50, 0)[0] for step in (0, 1))
    assert (first != second).any()


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        batch_indices(0, 0, 3, 8, 10, 0)


def test_balancing_repeats_the_rarer_lengths():
    seconds = np.array([4, 2, 2, 2, 4, 2, 2], np.float32)
    rows = balanced_rows(seconds)
    assert set(rows) == set(range(7))
    assert (seconds[rows] == 4).sum() == (seconds[rows] == 2).sum() == 5


def test_clip_batches_hold_length_and_caption(clips):
    batch = ClipLoader(clips, ByteTokenizer(), LoaderConfig(batch_size=4, text_len=32)).batch(3)
    assert batch.text.shape == (4, 32) and batch.frames.shape == (4, 5, 4) and batch.frames.dtype == torch.int64
    for text, mask, frames, seconds in zip(batch.text, batch.text_mask, batch.frames, batch.seconds, strict=True):
        row = int(frames[0, 0])
        assert decode(text[mask]) == f"{float(seconds)}秒|clip {row // 4} 视频"
        assert float(seconds) == (4.0 if row % 4 == 0 else 2.0)
        assert (text[~mask] == VOCABULARY.pad).all()


@pytest.mark.parametrize("in_memory", [False, True])
def test_texts_have_the_lengths_that_sampling_writes(tmp_path, in_memory):
    lengths = (0.64, 0.6, 0.1, 1.2)
    clips = ClipDataset(make_prepared(tmp_path / "prepared", lengths=lengths))
    if in_memory:
        captions = [caption for _, caption in clips.texts(range(24))]
        clips = InMemoryClips(clips.frames(range(24)), lengths * 6, captions, clips.num_tokens)
    tokenizer, prompt = ByteTokenizer(), PromptFormat()
    batch = ClipLoader(clips, tokenizer, LoaderConfig(batch_size=24, text_len=40)).batch(0)
    for text, mask, frames in zip(batch.text, batch.text_mask, batch.frames, strict=True):
        row = int(frames[0, 0])
        caption, newline = f"clip {row // 4}", tokenizer.vocabulary.newline
        sampled = prompt.clip_text(tokenizer.encode, newline, lengths[row % 4], caption, 40, suffix=prompt.video_suffix)
        assert text[mask].tolist() == sampled


@pytest.mark.parametrize("seconds", [0.64, 0.6, 0.1, 1.2, 0.16, 4.0, 0.03125])
def test_lengths_of_clips_survive_float32(seconds):
    assert seconds_as_given(np.float32(seconds)) == seconds


def test_image_batches_hold_one_frame(clips):
    batch = ClipLoader(clips, ByteTokenizer(), LoaderConfig("image", batch_size=24, text_len=32)).batch(0)
    assert batch.frames.shape == (24, 1, 4)
    assert set(batch.frames[:, 0, 1].tolist()) == {0, 1, 2, 3, 4}
    assert decode(batch.text[0][batch.text_mask[0]]) == f"clip {int(batch.frames[0, 0, 0]) // 4} 高清摄影"


def test_guidance_dropout_replaces_captions_at_its_rate(clips):
    loader = ClipLoader(clips, ByteTokenizer(), LoaderConfig(batch_size=200, text_len=32, guidance_dropout=0.25))
    batch = loader.batch(0)
    dropped = [decode(text[mask]).endswith("秒|视频") for text, mask in zip(batch.text, batch.text_mask, strict=True)]
    assert 30 < sum(dropped) < 70


def test_ranks_get_parts_of_the_same_batch(clips):
    config = LoaderConfig(batch_size=6, text_len=32, guidance_dropout=0.5, suffix_probability=0.5, balance_lengths=True)
    whole = ClipLoader(clips, ByteTokenizer(), config).batch(5)
    for rank in range(3):
        part = ClipLoader(clips, ByteTokenizer(), config, rank=rank, world_size=3).batch(5)
        for a, b in zip(vars(part).values(), vars(whole).values(), strict=True):
            assert torch.equal(a, b[rank::3])


def test_a_resumed_loader_yields_the_same_batches(clips):
    config = LoaderConfig(batch_size=5, text_len=32, guidance_dropout=0.3)
    running = ClipLoader(clips, ByteTokenizer(), config).batches()
    ran = [next(running) for _ in range(8)]
    running.close()
    resumed = ClipLoader(clips, ByteTokenizer(), config).batches(first_step=6, ahead=0)
    for step in (6, 7):
        batch = next(resumed)
        assert torch.equal(batch.text, ran[step].text) and torch.equal(batch.frames, ran[step].frames)


def test_long_captions_are_truncated(tmp_path):
    folder = make_prepared(tmp_path / "prepared")
    (folder / "captions.jsonl").write_text('{"text": "a very long caption"}\n' * 6)
    clips = ClipDataset(folder)
    batch = ClipLoader(clips, ByteTokenizer(), LoaderConfig(batch_size=2, text_len=10)).batch(0)
    assert batch.text_mask.all() and {decode(text)[1:] for text in batch.text} == {".0秒|a v"}


def test_tokens_beyond_the_vocabulary_are_refused(clips):
    class Small(ByteTokenizer):
        vocabulary = Vocabulary(size=400, num_image_tokens=32, pad=64, newline=65, start_of_image=66)

    with pytest.raises(ValueError, match="64 image tokens"):
        ClipLoader(clips, Small(), LoaderConfig())


def test_frame_batches(tmp_path):
    frames = FrameDataset(make_prepared(tmp_path / "frames", "frames"))
    batch = FrameLoader(frames, 8).batch(0)
    assert batch.shape == (8, 3, 6, 6) and len(set((batch[:, 0, 0, 0] * 255).round().tolist())) == 8
    assert batch.max() <= 1


def test_prefetching_keeps_order_and_stops():
    computed = []

    def compute(step):
        computed.append(step)
        return step

    steps = prefetch(compute, 3, ahead=2)
    assert [next(steps) for _ in range(4)] == [3, 4, 5, 6]
    steps.close()
    count = len(computed)
    time.sleep(0.05)
    assert len(computed) == count <= 8


def test_an_error_is_raised_at_its_step():
    def compute(step):
        if step == 2:
            raise ValueError("row 2 is bad")
        return step

    steps = prefetch(compute, 0, ahead=4)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(ValueError, match="row 2 is bad"):
        next(steps)


@pytest.mark.parametrize("settings", [{"guidance_dropout": 1.5}, {"suffix_probability": -0.1}])
def test_probabilities_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="between 0 and 1"):
        LoaderConfig(**settings)
