"""Jobs made into folders: what is shown while a clip grows, and who makes which clips."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo.distributed import ProcessGroup
from cogvideo.rng import sample_keys
from cogvideo.sampling import runner as module
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.jobs import ClipJob, InterpolationJob, Job
from cogvideo.sampling.kept import keep_nothing
from cogvideo.sampling.runner import my_groups, produce
from cogvideo.sampling.work import Work
from tests.helpers import decoding as tiny

CONFIG = SampleConfig(rounds=2, num_clusters=8)
PIPELINE = tiny.pipeline(CONFIG)
KEYS = sample_keys(0, ["a", "b"])


def before(frames: int) -> torch.Tensor:
    return torch.randint(tiny.NUM_CODES, (2, frames, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("job", "shown"),
    [
        (ClipJob(PIPELINE, CONFIG, KEYS), [(1, 0.25), (5, 1.0), (9, 2.0), (17, 4.0)]),
        (ClipJob(PIPELINE, CONFIG, KEYS, before(1)), [(5, 1.0), (9, 2.0), (17, 4.0)]),
        # 4 frames a second: 6 frames before the first new one, of which every 4th, every 2nd, all are shown
        (ClipJob(PIPELINE, CONFIG, KEYS, before(7)), [(1 + 5, 1.0), (3 + 9, 2.0), (6 + 17, 4.0)]),
        (InterpolationJob(PIPELINE, CONFIG, KEYS, before(3)), [(5, 1.0), (9, 2.0)]),
    ],
)
def test_a_clip_as_it_grows(job: Job, shown: list[tuple[int, float]]) -> None:
    drawn: list[int] = []
    stages = list(job.stages([0, 1], keep_nothing, drawn.append))
    assert [(stage.tokens.shape[1], stage.fps) for stage in stages] == shown
    assert sum(drawn) == 2 * job.tokens_a_clip and stages[-1].tokens.shape[1] == job.num_frames
    assert (job.num_frames - 1) / job.seconds == stages[-1].fps
    (alone,) = [stage.tokens for stage in job.stages([1], keep_nothing, None)][-1:]
    assert torch.equal(alone[0], stages[-1].tokens[1]), "a clip does not see its group"


def test_what_was_there_before_stays_before() -> None:
    given = before(7)
    *_, last = ClipJob(PIPELINE, CONFIG, KEYS, given).stages([0, 1], keep_nothing, None)
    assert torch.equal(last.tokens[:, :7], given)
    first, *_ = ClipJob(PIPELINE, CONFIG, KEYS, given).stages([0, 1], keep_nothing, None)
    assert torch.equal(first.tokens[:, :2], given[:, [2, 6]]), "as far apart as key frames, and up to them"


def test_every_input_is_part_of_what_a_job_is() -> None:
    jobs: list[Job] = [
        ClipJob(PIPELINE, CONFIG, KEYS),
        ClipJob(PIPELINE, CONFIG, KEYS[::-1]),
        ClipJob(PIPELINE, replace(CONFIG, seed=1), KEYS),
        ClipJob(PIPELINE, CONFIG, KEYS, before(1)),
        ClipJob(PIPELINE, CONFIG, KEYS, before(1) + 1),
        InterpolationJob(PIPELINE, CONFIG, KEYS, before(1)),
    ]
    said = [str(job.identity()) for job in jobs]
    assert len(set(said)) == len(said)


def test_groups() -> None:
    """A prompt's samples stay together; a process's clips are cut into batches."""
    keys = sample_keys(0, list("abcde"), 2)
    job = ClipJob(PIPELINE, replace(CONFIG, clips_at_once=3), keys)
    groups = [my_groups(job, Work(Path(), {}, ProcessGroup(rank, 2)), 2) for rank in range(2)]
    assert groups == [[[0, 1, 4], [5, 8, 9]], [[2, 3, 6], [7]]]


def test_videos_grow_and_are_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, float, bool]] = []

    def look(stem: Path, frames: np.ndarray, fps: float, caption: str, *, finished: bool) -> Iterator[Path]:
        seen.append((stem.name, len(frames), fps, finished))
        yield stem

    monkeypatch.setattr(module, "write_clip", look)
    job = ClipJob(PIPELINE, replace(CONFIG, rounds=1), KEYS)

    def run(resume: bool) -> None:
        work = Work(tmp_path, job.identity(), ProcessGroup())
        assert work.begin(resume=resume)
        seen.clear()
        list(produce(job, work))

    monkeypatch.setattr(Work, "end", lambda work: None)  # as if killed just before
    run(resume=False)
    stages = [(1, 0.25, False), (5, 1.0, False), (9, 2.0, True)]
    assert seen == [(name, *stage) for stage in stages for name in ("000-a", "001-b")]
    run(resume=True)
    assert seen == []
    (tmp_path / "unfinished" / "000000.safetensors").unlink()
    run(resume=True)
    assert len(seen) == 6, "without its batches all is drawn again"
