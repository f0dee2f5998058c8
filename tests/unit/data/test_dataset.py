"""Several prepared folders as one, those that do not go together, and how many files stay open."""

import json

import numpy as np
import pytest
import torch

from cogvideo.data.chain import MAX_OPEN, Chain, Lines
from cogvideo.data.dataset import ClipDataset, FrameDataset
from cogvideo.data.loader import ClipLoader, LoaderConfig
from tests.unit.data.test_loader import Letters, decode, make_prepared


@pytest.fixture
def two(tmp_path):
    return [make_prepared(tmp_path / "a"), make_prepared(tmp_path / "b", first_row=24)]


def test_folders_are_read_end_to_end(two):
    clips = ClipDataset(two)
    assert len(clips) == 48
    for index in (0, 23, 24, 37, 47):
        frames, seconds, caption = clips.row(index)
        assert (frames[0, 0], seconds, caption) == (index, 2.0 if index % 4 else 4.0, f"clip {index // 4}")
    assert ClipDataset(two, clip_seconds=[4.0]).frames(range(12))[:, 0, 0].tolist() == list(range(0, 48, 4))
    assert len(ClipDataset([two[0], *two])) == 72, "a folder given twice counts twice"
    clips.verify()


def test_a_mixture_is_in_proportion_to_rows_and_resumes_exactly(two):
    config = LoaderConfig(batch_size=16, text_len=32, guidance_dropout=0.3)
    batches = [ClipLoader(ClipDataset(two), Letters(), config).batch(step) for step in range(3)]
    assert sorted(torch.cat([batch.frames[:, 0, 0] for batch in batches]).tolist()) == list(range(48))
    again = ClipLoader(ClipDataset(two), Letters(), config, rank=1, world=2).batch(2)
    assert torch.equal(again.frames, batches[2].frames[1::2]) and torch.equal(again.text, batches[2].text[1::2])


def test_balancing_is_over_all_folders(two):
    loader = ClipLoader(ClipDataset(two), Letters(), LoaderConfig(batch_size=72, text_len=32, balance_lengths=True))
    batch = loader.batch(0)
    assert (batch.seconds == 4).sum() == (batch.seconds == 2).sum() == 36
    assert decode(batch.text[0][batch.text_mask[0]]).endswith(f"clip {int(batch.frames[0, 0, 0]) // 4} 视频")


@pytest.mark.parametrize(
    ("other", "said"),
    [({"frame_len": 9}, "holds rows of 5x9, .*a of 5x4; prepare"), ({"codes": "b"}, "different image tokenizers")],
)
def test_folders_that_do_not_go_together(tmp_path, other, said):
    folders = [make_prepared(tmp_path / "a"), make_prepared(tmp_path / "b", **other)]
    with pytest.raises(ValueError, match=said) as caught:
        ClipDataset(folders)
    assert "\n" not in str(caught.value)


def test_single_frames_of_two_folders(tmp_path):
    folders = [make_prepared(tmp_path / name, "frames", first_row) for name, first_row in (("a", 0), ("b", 24))]
    assert FrameDataset(folders).frames([0, 30, 47])[:, 0, 0, 0].tolist() == [0, 30, 47]
    with pytest.raises(ValueError, match="empty list"):
        FrameDataset([])


def test_a_folder_from_before_the_rows_were_gathered(two):
    (two[0] / "rows.npy").unlink()
    manifest = json.loads((two[0] / "manifest.json").read_text())
    del manifest["files"]
    (two[0] / "manifest.json").write_text(json.dumps(manifest))
    assert ClipDataset(two).row(13)[1:] == (2.0, "clip 3")


def test_few_files_stay_open():
    opened = []

    def load(index):
        opened.append(index)
        return np.array([2 * index, 2 * index + 1])

    count = 2 * MAX_OPEN
    chain = Chain([2] * count, load)
    order = np.random.default_rng(0).permutation(len(chain))
    assert (chain.gather(order) == order).all()
    assert len(opened) > count, "some were closed, and opened again"
    opened.clear()
    chain.gather(np.array([7, 7, 6]))
    chain.gather(np.array([6]))
    assert opened in ([], [3])


def test_captions_by_number(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "数字"}\n{"text": "b"}\n[]\n', encoding="utf-8")
    lines = Lines(tmp_path / "c.jsonl")
    assert len(lines) == 3 and [lines.text(1), lines.text(0)] == ["b", "数字"]
    with pytest.raises(ValueError, match="line 3: expected an object with `text`"):
        lines.text(2)
