"""Stage 1: the first frame from the trunk, as a text-to-image model; then the other key frames, one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo.inference.engine import Progress
from cogvideo.rng import SampleKey, sample_uniforms
from cogvideo.sampling.kept import Sampler

ROUND = 0
"""In the address of this stage's random numbers."""


def sample_first_frames(
    sampler: Sampler,
    texts: Sequence[Sequence[int]],
    guide: Sequence[int] | None,
    keys: Sequence[SampleKey],
    progress: Progress | None = None,
) -> Tensor:
    """A picture for each text: (samples, frame_len) int64."""
    frame_len = sampler.model.config.frame_len
    unknown = torch.zeros(len(keys), 1, frame_len, dtype=torch.int64)
    return sampler(unknown, texts, guide, sample_uniforms(keys, ROUND, (0,), frame_len), progress)[:, 0]


def sample_key_frames(
    sampler: Sampler,
    first_frames: Tensor,
    texts: Sequence[Sequence[int]],
    guide: Sequence[int] | None,
    keys: Sequence[SampleKey],
    progress: Progress | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """Continue first frames (samples, frame_len) to whole clips (samples, num_frames, frame_len).

    `start` is the number of the first frame in a longer video, in key frames: where its random numbers begin.
    """
    config = sampler.model.config
    known = first_frames.new_zeros(len(keys), config.num_frames, config.frame_len)
    known[:, 0] = first_frames
    numbers = sample_uniforms(keys, ROUND, range(start, start + config.num_frames), config.frame_len)
    return sampler(known, texts, guide, numbers, progress)
