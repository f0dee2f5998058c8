"""From a job to a folder of results: group after group, stage after stage, each on disk as soon as it is there."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from cogvideo.inference.engine import Progress
from cogvideo.sampling.jobs import Job
from cogvideo.sampling.outputs import describe, sample_names, write_clip, write_summary
from cogvideo.sampling.work import Work


class Written(NamedTuple):
    """A file that was just written whole."""

    path: Path
    finished: bool
    """False: of a clip that still grows; it will be replaced."""


def my_groups(job: Job, work: Work, samples_per_prompt: int) -> list[list[int]]:
    """The clips that this process makes, in groups that go through all stages together.

    A prompt's samples stay with one process. A group is as large as a batch: more would wait longer for their videos.
    """
    prompts = work.processes.shard(len(job.keys) // samples_per_prompt)
    clips = [prompt * samples_per_prompt + number for prompt in prompts for number in range(samples_per_prompt)]
    size = job.config.clips_at_once
    return [clips[first : first + size] for first in range(0, len(clips), size)]


def produce(
    job: Job, work: Work, *, samples_per_prompt: int = 1, weights: str = "", progress: Progress | None = None
) -> Iterator[Written]:
    """Make what is not yet made of this process's clips; yields each file as it appears. `work` must have begun.

    Videos and contact sheets appear with the first frames and are replaced as more are made. The first process waits
    for the others and writes what is about all clips.
    """
    names = sample_names([key.caption for key in job.keys])
    for group in my_groups(job, work, samples_per_prompt):
        if work.is_done(group[0]):
            if progress is not None:
                progress(len(group) * job.tokens_a_clip)
            continue
        tokens, made = torch.empty(0), work.batches_made
        for tokens, fps in job.stages(group, work.keep(group[0]), progress):
            finished = tokens.shape[1] == job.num_frames
            if not finished and work.batches_made == made:
                continue  # all of it was kept: there is a longer video already, or will be in a moment
            made = work.batches_made
            for clip, own in zip(group, tokens, strict=True):
                # one clip at a time, so that its pictures are the same to the bit whatever is made beside it
                frames, caption = job.decode(own), job.keys[clip].caption
                for path in write_clip(work.out / names[clip], frames, fps, caption, finished=finished):
                    yield Written(path, finished)
        work.finish(group[0], group, tokens)
    work.processes.barrier()
    if work.processes.rank == 0:
        tokens = work.gather(len(job.keys))
        about = describe(names, job.keys)
        more = {"weights": weights, "made_from": work.digest}
        write_summary(work.out, job.config, about, tokens, seconds=job.seconds, more=more)
        yield Written(work.out / "tokens.safetensors", True)
        work.end()
    work.processes.close()
