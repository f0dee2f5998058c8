"""Stage 2: one round of interpolation puts a frame between every two. Rounds follow each other in pipeline.py."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from cogvideo.inference.engine import Progress
from cogvideo.rng import SampleKey, sample_uniforms
from cogvideo.sampling.kept import Sampler
from cogvideo.sequence.layout import ClipLayout


def clip_seconds(layout: ClipLayout, num_frames: int, seconds: float) -> float:
    """How long each of the model's clips lasts when `num_frames` frames over `seconds` are to be interpolated."""
    return seconds * (len(layout.given_frames) - 1) / (num_frames - 1)


def clips_a_round(layout: ClipLayout, num_frames: int) -> int:
    """Clips of the model that cover `num_frames` frames; neighbours share a frame."""
    return -(-(num_frames - 1) // (len(layout.given_frames) - 1))


def sample_between(
    sampler: Sampler,
    frames: Tensor,
    texts: Sequence[Sequence[int]],
    guide: Sequence[int] | None,
    keys: Sequence[SampleKey],
    round_number: int,
    progress: Progress | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """Frames (samples, K, frame_len) -> (samples, 2 K - 1, frame_len). `round_number` counts from 1.

    The model's clip has its given frames from neighbours in `frames`, sharing the outer ones with the next clip
    (published: triplets 2i, 2i+1, 2i+2). All clips of all samples are one batch: none depends on another. Where the
    last clip is short of frames, the last one is repeated, and what is drawn behind it is left out.
    `start` is the number of the first new frame in a longer video: where the random numbers begin.
    Raises: ValueError for fewer than two frames.
    """
    layout = sampler.model.config.layout
    given, new = list(layout.given_frames), list(layout.supervised_frames)
    stride = len(given) - 1
    samples, count, frame_len = frames.shape
    if count < 2:
        raise ValueError(f"there is nothing between {count} frame; interpolation takes at least 2")
    groups = clips_a_round(layout, count)
    missing = 1 + groups * stride - count
    padded = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1)], dim=1)
    known = frames.new_zeros(samples * groups, layout.num_frames, frame_len)
    known[:, given] = rearrange(padded.unfold(1, len(given), stride), "s g n given -> (s g) given n")
    numbers = torch.zeros(*known.shape, 2, dtype=torch.float64)
    drawn = sample_uniforms(keys, round_number, range(start, start + groups * len(new)), frame_len)
    numbers[:, new] = rearrange(drawn, "s (g new) n two -> (s g) new n two", g=groups)
    clips = sampler(known, [text for text in texts for _ in range(groups)], guide, numbers, progress)
    whole = torch.cat([rearrange(clips[:, :-1], "(s g) f n -> s (g f) n", s=samples), padded[:, -1:]], dim=1)
    return whole[:, : 2 * count - 1]
