"""Data sets of moving digits: file names, captions, pixels after the codec, and clips in memory."""

import json

import numpy as np
import pytest
import torch

from cogvideo.data.readers import open_captions
from cogvideo.media.video import read_video
from cogvideo.worlds.digits.files import clips_in_memory, draw_clips, write_dataset
from cogvideo.worlds.digits.render import frame_times, render


def test_dataset_reads_back_as_it_was_drawn(tmp_path):
    captions = write_dataset(tmp_path / "digits", "test", 4, seed=3)
    found = list(open_captions(captions))
    assert [caption.text for caption in found] == [clip.caption(lang) for clip, lang in draw_clips("test", 4, 3)]
    for caption, (clip, _) in zip(found, draw_clips("test", 4, 3), strict=True):
        frames, seconds = read_video(captions.parent / caption.video)
        assert np.array_equal(seconds, frame_times())
        assert np.abs(frames.astype(int) - render(clip, frame_times())).mean() < 1.5


def test_a_larger_set_begins_with_the_smaller():
    assert list(draw_clips("train", 5, 0))[:3] == list(draw_clips("train", 3, 0))
    assert list(draw_clips("train", 3, 0)) != list(draw_clips("train", 3, 1))


def test_both_languages_occur_about_equally(tmp_path):
    languages = [language for _, language in draw_clips("train", 200, 0)]
    assert 70 < languages.count("zh") < 130


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        write_dataset(tmp_path, "train", 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


@pytest.mark.parametrize(("split", "count"), [("train", 0), ("other", 1)])
def test_arguments_out_of_range_are_refused(tmp_path, split, count):
    with pytest.raises(ValueError, match=r"expected|choose"):
        write_dataset(tmp_path / "new", split, count, 0)
    assert not (tmp_path / "new").exists()


def test_captions_file_is_plain_json_lines(tmp_path):
    captions = write_dataset(tmp_path / "digits", "train", 2, seed=0)
    lines = [json.loads(line) for line in captions.read_text(encoding="utf-8").splitlines()]
    assert [line["video"] for line in lines] == ["clips/000000.mp4", "clips/000001.mp4"]


def test_clips_in_memory_are_the_training_clips_as_tokens():
    class Tokenizer:
        num_tokens, device, model = 256, "cpu", torch.nn.Identity()

        def encode(self, pixels, batch_size):
            return (pixels * 255).round().long().flatten(1)

    clips = clips_in_memory(Tokenizer(), 4, seed=3)
    seconds = [1.0, 2.0, 4.0, 1.0]
    drawn = list(draw_clips("train", 4, 3))
    assert clips.texts(range(4)) == [
        (length, clip.caption(language)) for length, (clip, language) in zip(seconds, drawn, strict=True)
    ]
    rendered = render(drawn[1][0], np.linspace(0, 2, 5))
    assert np.array_equal(clips.frames([1])[0], rendered.transpose(0, 3, 1, 2).reshape(5, -1))
