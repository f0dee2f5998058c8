"""What is chosen for given videos: clip lengths, prompts, text lengths."""

import pytest

from cogvideo.cli.main import main
from cogvideo.data.readers import open_captions
from cogvideo.recipes.pretrain import Choices
from cogvideo.recipes.survey import Survey, example_prompts, survey_videos, text_length


def survey(seconds=(4.0,), fps=25.0, videos=100, captions=100, side=360):
    return Survey(videos, captions, tuple(seconds), fps, side)


def test_clips_are_as_long_as_half_of_the_captions_allow():
    assert survey([9.0, 9.0, 3.0]).clip_lengths(4) == (8.0, 4.0, 2.0, 1.0)
    assert survey([9.0, 3.0, 3.0]).clip_lengths(4) == (2.0, 1.0, 0.5)  # 0.25 s does not hold five even frames


def test_clips_are_not_shorter_than_five_frames():
    assert survey([8.0], fps=2).clip_lengths(4) == (8.0, 4.0, 2.0)
    with pytest.raises(ValueError, match=r"no clip of five frames fits videos of 0\.1 s at 25 frames per second"):
        survey([0.1]).clip_lengths(4)


def test_text_length_holds_the_longest_prompt():
    assert text_length([5, 33]) == 48 and text_length([5]) == 32 and text_length([1000]) == 256


def test_choices_follow_the_data_and_the_machine():
    choices = Choices.of(survey(videos=1000, captions=8000), pixels=None, num_gpus=0, bf16=False)
    assert (choices.pixels, choices.frames_per_video, choices.num_codes, choices.holds_out) == (64, 20, 1024, True)
    assert choices.clip_seconds == (4.0, 2.0, 1.0, 0.5) and choices.rounds == 3
    assert choices.key_frame_seconds == (4.0, 2.0, 1.0) and choices.between_seconds == (2.0, 1.0, 0.5)
    assert choices.size.hidden_size == 256
    few = Choices.of(survey(videos=8, side=50), pixels=None, num_gpus=4, bf16=True)
    assert (few.pixels, few.num_codes, few.holds_out, few.processes) == (48, 256, False, 4)
    with pytest.raises(ValueError, match="--pixels 50; expected a multiple of 8"):
        Choices.of(survey(), pixels=50, num_gpus=0, bf16=False)


def test_videos_are_read_for_their_times(tmp_path):
    assert main(["digits", "--out", str(tmp_path), "--count", "3", "--pixels", "80"]) == 0
    found = survey_videos(open_captions(tmp_path / "captions.jsonl"))
    assert (found.num_videos, found.fps, found.short_side) == (3, 8.0, 80)
    assert found.clip_lengths(9) == (4.0, 2.0, 1.0, 0.5)


def test_no_readable_video_is_one_line(tmp_path):
    (tmp_path / "captions.csv").write_text("video,caption\nnone.mp4,a dog\n")
    with pytest.raises(ValueError, match=r"no video of .*captions.csv can be read: .*none.mp4"):
        survey_videos(open_captions(tmp_path / "captions.csv"))


def test_prompts_are_different_captions(tmp_path):
    lines = "".join(f"a.mp4,caption {index // 10}\n" for index in range(100))
    (tmp_path / "captions.csv").write_text("video,caption\n" + lines)
    prompts = example_prompts(open_captions(tmp_path / "captions.csv"), 4)
    assert len(set(prompts)) == 4 and prompts[0] == "caption 0" and prompts[-1] == "caption 9"
