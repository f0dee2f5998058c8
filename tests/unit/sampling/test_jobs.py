"""Jobs: what they generate stage by stage, what identifies them, and requests that are refused."""

from dataclasses import replace

import pytest
import torch

from cogvideo.rng import SampleKey, sample_keys
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.inputs import InputClips
from cogvideo.sampling.jobs import ClipJob, InterpolationJob, Job, clip_job, describe_job, interpolation_job
from tests.helpers import decoding as tiny
from tests.helpers import pipelines

CONFIG = SampleConfig(rounds=2, num_clusters=8)
PIPELINE = pipelines.pipeline(CONFIG)


def given(frames: int, seconds: float | None = None) -> InputClips:
    tokens = torch.randint(tiny.NUM_CODES, (2, frames, 4), generator=torch.Generator().manual_seed(0))
    return InputClips(tokens, seconds, (("a", 0), ("b", 0)))


def new_clips(frames: int | None = None) -> ClipJob:
    return clip_job(PIPELINE, CONFIG, ["a", "b"], None if frames is None else given(frames))


@pytest.mark.parametrize(
    ("job", "stages"),
    [
        (new_clips(), [(1, 0.25), (5, 1.0), (9, 2.0), (17, 4.0)]),
        (new_clips(1), [(5, 1.0), (9, 2.0), (17, 4.0)]),
        # 4 frames per second: of the 6 frames before the first new one, every 4th, every 2nd, then all are included
        (new_clips(7), [(1 + 5, 1.0), (3 + 9, 2.0), (6 + 17, 4.0)]),
        (interpolation_job(PIPELINE, CONFIG, given(3), None), [(5, 1.0), (9, 2.0)]),
    ],
)
def test_frames_and_frame_rate_after_each_stage(job: Job, stages: list[tuple[int, float]]) -> None:
    drawn: list[int] = []
    outputs = list(job.stages([0, 1], progress=drawn.append))
    assert [(output.tokens.shape[1], output.fps) for output in outputs] == stages
    assert sum(drawn) == 2 * job.tokens_per_clip and outputs[-1].tokens.shape[1] == job.num_frames
    assert (job.num_frames - 1) / job.seconds == outputs[-1].fps
    *_, alone = job.stages([1])
    assert torch.equal(alone.tokens[0], outputs[-1].tokens[1]), "a clip does not depend on its group"


def test_previous_frames_stay_in_front() -> None:
    job, previous = new_clips(7), given(7).tokens
    first, *_, last = job.stages([0, 1])
    assert torch.equal(last.tokens[:, :7], previous)
    assert torch.equal(first.tokens[:, :2], previous[:, [2, 6]]), "as far apart as key frames, ending with the last"


def test_every_input_is_part_of_the_identity() -> None:
    other = replace(given(1), tokens=given(1).tokens + 1)
    jobs: list[Job] = [
        new_clips(),
        clip_job(PIPELINE, CONFIG, ["b", "a"]),
        clip_job(PIPELINE, replace(CONFIG, seed=1), ["a", "b"]),
        new_clips(1),
        clip_job(PIPELINE, CONFIG, ["a", "b"], other),
        interpolation_job(PIPELINE, CONFIG, given(3), None),
        interpolation_job(PIPELINE, CONFIG, given(3), "c"),
        interpolation_job(PIPELINE, CONFIG, given(3, seconds=2.5), None),
    ]
    identities = [str(job.identity()) for job in jobs]
    assert len(set(identities)) == len(identities)


def test_captions_come_from_the_request_or_the_input() -> None:
    assert clip_job(PIPELINE, CONFIG, [], given(1)).keys == [SampleKey(0, "a", 0), SampleKey(0, "b", 0)]
    seen = {"a": 2}
    assert clip_job(PIPELINE, CONFIG, ["a"], None, seen).keys == [SampleKey(0, "a", 2)] and seen == {"a": 3}
    assert interpolation_job(PIPELINE, CONFIG, given(3), "c").keys == sample_keys(0, ["c"], 2)


def test_one_given_clip_serves_all_prompts() -> None:
    one = replace(given(3), tokens=given(3).tokens[:1])
    job = clip_job(PIPELINE, CONFIG, list("abc"), one)
    assert job.previous_frames is not None and torch.equal(job.previous_frames[2], one.tokens[0])
    with pytest.raises(ValueError, match="the given file holds 2 clips, but 3 are requested; request the same number"):
        clip_job(PIPELINE, CONFIG, list("abc"), given(3))


def test_interpolation_refuses() -> None:
    silent = replace(given(3), samples=())
    for config, clips, message in (
        (replace(CONFIG, rounds=0), given(3), "rounds=0 adds no frames; give at least 1"),
        (CONFIG, given(1), "interpolation needs at least 2 frames, got 1"),
        (CONFIG, silent, "the input has no caption; pass --caption"),
    ):
        with pytest.raises(ValueError, match=message):
            interpolation_job(PIPELINE, config, clips, None)
    with pytest.raises(ValueError, match="shorten it"):
        interpolation_job(PIPELINE, CONFIG, given(3), "x" * 99)


def test_description() -> None:
    assert describe_job(new_clips()) == "2 clips of 17 frames, 4 per second"
    job: InterpolationJob = interpolation_job(PIPELINE, CONFIG, replace(given(3), tokens=given(3).tokens[:1]), "a")
    assert describe_job(job) == "1 clip of 9 frames, 2 per second"
