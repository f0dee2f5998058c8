"""Datasets of one or several prepared folders, damaged and incompatible ones, and how many files stay open."""

import json

import numpy as np
import pytest
import torch

from cogvideo.data.captions import Caption
from cogvideo.data.dataset import (
    MAX_OPEN_ARRAYS,
    CaptionTexts,
    ClipDataset,
    ConcatenatedArrays,
    FrameDataset,
    InMemoryClips,
)
from cogvideo.data.loader import ClipLoader, LoaderConfig
from cogvideo.text import LANGUAGES
from tests.helpers.data import ByteTokenizer, decode, make_prepared


@pytest.fixture
def clips(tmp_path):
    return ClipDataset(make_prepared(tmp_path / "prepared"))


@pytest.fixture
def two(tmp_path):
    return [make_prepared(tmp_path / "a"), make_prepared(tmp_path / "b", first_row=24)]


def test_rows_of_a_prepared_folder(clips):
    assert len(clips) == 24 and clips.num_frames == 5 and clips.frame_len == 4 and clips.num_tokens == 64
    frames, seconds, caption = clips.row(13)
    assert frames.dtype == np.int64 and frames[2].tolist() == [13, 2, 13, 13]
    assert (seconds, caption) == (2.0, "clip 3")
    clips.verify()


def test_clips_of_chosen_lengths(clips):
    folder = clips._rows.folders[0].path
    chosen = ClipDataset(folder, clip_seconds=[4.0])
    assert len(chosen) == 6 and set(chosen.seconds) == {4.0}
    assert [chosen.row(i)[0][0, 0] for i in range(6)] == [0, 4, 8, 12, 16, 20]
    with pytest.raises(ValueError, match="available lengths: 2, 4 s"):
        ClipDataset(folder, clip_seconds=[8.0])


def test_damaged_shards_are_refused(tmp_path):
    folder = make_prepared(tmp_path / "prepared")
    tokens = folder / "shards" / "00001" / "tokens.npy"
    data = bytearray(tokens.read_bytes())
    data[-1] ^= 1
    tokens.write_bytes(data)
    opened = ClipDataset(folder)
    with pytest.raises(ValueError, match="has changed"):
        opened.verify()
    tokens.write_bytes(data[:-3])
    with pytest.raises(ValueError, match="bytes, expected"):
        ClipDataset(folder)
    tokens.unlink()
    with pytest.raises(ValueError, match="is missing"):
        ClipDataset(folder)


def test_folders_that_are_not_prepared_clips_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not prepared data"):
        ClipDataset(tmp_path)
    folder = make_prepared(tmp_path / "frames", "frames")
    with pytest.raises(ValueError, match="expected format 'cogvideo-tokens'"):
        ClipDataset(folder)
    (folder / "manifest.json").rename(folder / "plan.json")
    with pytest.raises(ValueError, match="not finished"):
        ClipDataset(folder)


def test_folders_are_read_end_to_end(two):
    clips = ClipDataset(two)
    assert len(clips) == 48
    for index in (0, 23, 24, 37, 47):
        frames, seconds, caption = clips.row(index)
        assert (frames[0, 0], seconds, caption) == (index, 2.0 if index % 4 else 4.0, f"clip {index // 4}")
    assert ClipDataset(two, clip_seconds=[4.0]).frames(range(12))[:, 0, 0].tolist() == list(range(0, 48, 4))
    assert len(ClipDataset([two[0], *two])) == 72, "a folder given twice counts twice"
    clips.verify()


def test_folders_are_mixed_in_proportion_to_rows_and_resume_exactly(two):
    config = LoaderConfig(batch_size=16, text_len=32, guidance_dropout=0.3)
    batches = [ClipLoader(ClipDataset(two), ByteTokenizer(), config).batch(step) for step in range(3)]
    assert sorted(torch.cat([batch.frames[:, 0, 0] for batch in batches]).tolist()) == list(range(48))
    again = ClipLoader(ClipDataset(two), ByteTokenizer(), config, rank=1, world_size=2).batch(2)
    assert torch.equal(again.frames, batches[2].frames[1::2]) and torch.equal(again.text, batches[2].text[1::2])


def test_weights_mix_folders_whatever_their_sizes(two):
    sizes = [len(ClipDataset(folder)) for folder in two]
    config = LoaderConfig(batch_size=1000, text_len=32, weights=[9.0, 1.0], loss_by=["source", "language"])
    batch = ClipLoader(ClipDataset(two), ByteTokenizer(), config).batch(0)
    seen = np.bincount(batch.frames[:, 0, 0].numpy(), minlength=sum(sizes))
    assert [seen[: sizes[0]].sum(), seen[sizes[0] :].sum()] == [900, 100]
    assert all(np.ptp(part) <= 1 for part in np.split(seen, [sizes[0]])), "within a folder, rows are equally frequent"
    assert batch.loss_groups.shape == (1000, 2) and batch.loss_groups[:, 0].bincount().tolist() == [900, 100]
    assert {LANGUAGES[number] for number in batch.loss_groups[:, 1].tolist()} == {"English"}
    part = ClipLoader(ClipDataset(two), ByteTokenizer(), config, rank=1, world_size=4).batch(0)
    assert torch.equal(part.frames, batch.frames[1::4]) and torch.equal(part.loss_groups, batch.loss_groups[1::4])


def test_weights_balance_lengths_within_each_folder(two):
    config = LoaderConfig(batch_size=1000, text_len=32, weights=[1.0, 1.0], balance_lengths=True)
    seconds = ClipLoader(ClipDataset(two), ByteTokenizer(), config).batch(0).seconds
    assert 490 < (seconds == 4).sum() < 510


def test_a_folder_that_would_never_be_seen_is_refused(two):
    for weights, message in (([1.0, 1e-5], "folder 2 .* less than one clip in 1000"), ([1, 1], "folder 1 .* no clip")):
        clips = ClipDataset(two)
        if "no clip" in message:
            clips.sources = lambda rows: np.ones(len(rows), np.int64)
        with pytest.raises(ValueError, match=rf"data\.weights.*{message}"):
            ClipLoader(clips, ByteTokenizer(), LoaderConfig(weights=weights))


def test_balancing_is_over_all_folders(two):
    loader = ClipLoader(
        ClipDataset(two), ByteTokenizer(), LoaderConfig(batch_size=72, text_len=32, balance_lengths=True)
    )
    batch = loader.batch(0)
    assert (batch.seconds == 4).sum() == (batch.seconds == 2).sum() == 36
    assert decode(batch.text[0][batch.text_mask[0]]).endswith(f"clip {int(batch.frames[0, 0, 0]) // 4} 视频")


@pytest.mark.parametrize(
    ("other", "message"),
    [({"frame_len": 9}, "holds rows of 5x9, .*a of 5x4; prepare"), ({"codes": "b"}, "different image tokenizers")],
)
def test_incompatible_folders_are_refused(tmp_path, other, message):
    folders = [make_prepared(tmp_path / "a"), make_prepared(tmp_path / "b", **other)]
    with pytest.raises(ValueError, match=message) as caught:
        ClipDataset(folders)
    assert "\n" not in str(caught.value)


def test_single_frames_of_two_folders(tmp_path):
    folders = [make_prepared(tmp_path / name, "frames", first_row) for name, first_row in (("a", 0), ("b", 24))]
    assert FrameDataset(folders).frames([0, 30, 47])[:, 0, 0, 0].tolist() == [0, 30, 47]
    with pytest.raises(ValueError, match="no folders given"):
        FrameDataset([])


def test_a_folder_without_the_common_rows_file_is_read(two):
    (two[0] / "rows.npy").unlink()
    manifest = json.loads((two[0] / "manifest.json").read_text())
    del manifest["files"]
    (two[0] / "manifest.json").write_text(json.dumps(manifest))
    assert ClipDataset(two).row(13)[1:] == (2.0, "clip 3")


def test_a_limited_number_of_arrays_stays_open():
    opened = []

    def load(index):
        opened.append(index)
        return np.array([2 * index, 2 * index + 1])

    count = 2 * MAX_OPEN_ARRAYS
    array = ConcatenatedArrays([2] * count, load)
    order = np.random.default_rng(0).permutation(len(array))
    assert (array.gather(order) == order).all()
    assert len(opened) > count, "some were closed and opened again"
    opened.clear()
    array.gather(np.array([7, 7, 6]))
    array.gather(np.array([6]))
    assert opened in ([], [3])


@pytest.mark.parametrize(
    "extra", [{"hash": 2**64 - 1}, {"nested": json.loads("[" * 40 + "]" * 40)}, {"long": "x" * (1 << 20)}]
)
def test_whatever_other_fields_hold_captions_are_read_back(tmp_path, extra):
    line = Caption("a.mp4", "a dog", extra=extra).to_json_line()
    (tmp_path / "c.jsonl").write_text(line, encoding="utf-8")
    assert CaptionTexts(tmp_path / "c.jsonl")[0] == "a dog"


def test_caption_texts_by_line(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "数字"}\n{"text": "b"}\n[]\n', encoding="utf-8")
    texts = CaptionTexts(tmp_path / "c.jsonl")
    assert len(texts) == 3 and [texts[1], texts[0]] == ["b", "数字"]
    with pytest.raises(ValueError, match="line 3: expected an object with `text`"):
        texts[2]
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xed\xa0\x80"}\n')
    with pytest.raises(ValueError, match="line 1: expected an object with `text`"):
        CaptionTexts(tmp_path / "c.jsonl")[0]


def test_clips_in_memory_read_like_prepared_ones(clips):
    indices = np.arange(24)
    seconds, captions = zip(*clips.texts(indices), strict=True)
    memory = InMemoryClips(clips.frames(indices), seconds, captions, clips.num_tokens)
    assert (len(memory), memory.num_frames, memory.frame_len) == (24, 5, 4)
    config = LoaderConfig(batch_size=8, text_len=32, balance_lengths=True)
    one, other = (ClipLoader(dataset, ByteTokenizer(), config).batch(2) for dataset in (memory, clips))
    assert torch.equal(one.frames, other.frames) and torch.equal(one.text, other.text)
