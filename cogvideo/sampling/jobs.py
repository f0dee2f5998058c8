"""What there is to make, as a list of clips that can be made group by group: by `sample`, `interpolate` or `upsample`.

A job knows the models and what goes into each clip; it knows no folder, no file and no other process.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cogvideo.config import to_dict
from cogvideo.inference.engine import Progress
from cogvideo.rng import SampleKey
from cogvideo.sampling.config import SampleConfig, UpsampleConfig
from cogvideo.sampling.kept import Keep
from cogvideo.sampling.pipeline import Pipeline, pictures_of
from cogvideo.sampling.superres import Upsampler


class Stage(NamedTuple):
    """What there is of some clips so far."""

    tokens: Tensor
    """(clips, frames, frame_len) int64."""
    fps: float


class Job(Protocol):
    @property
    def config(self) -> SampleConfig | UpsampleConfig: ...

    @property
    def keys(self) -> Sequence[SampleKey]:
        """One a clip."""
        ...

    @property
    def num_frames(self) -> int:
        """Of a finished clip."""
        ...

    @property
    def seconds(self) -> float:
        """Of a finished clip, from its first frame to its last."""
        ...

    @property
    def tokens_a_clip(self) -> int:
        """That are to be drawn."""
        ...

    def stages(self, clips: Sequence[int], keep: Keep, progress: Progress | None) -> Iterator[Stage]:
        """The clips of these numbers as they grow; the last stage is the finished one."""
        ...

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Pictures (frames, height, width, 3) uint8 of (frames, frame_len)."""
        ...

    def identity(self) -> dict[str, Any]:
        """All that decides what is made, but for the bundle's weights, ready for JSON: equal for equal clips only."""
        ...


@dataclass(frozen=True)
class ClipJob:
    """Clips of captions, alone or behind frames that are there already."""

    pipeline: Pipeline
    config: SampleConfig
    keys: Sequence[SampleKey]
    before: Tensor | None = None
    """(clips, K, frame_len): what each clip goes on from, at its frame rate; the last of them is its first frame, and
    the only one where just that is given."""

    @property
    def _frames_before(self) -> int:
        return 0 if self.before is None else self.before.shape[1] - 1

    @property
    def num_frames(self) -> int:
        return self._frames_before + self.pipeline.num_frames(self.config)

    @property
    def seconds(self) -> float:
        return (self.num_frames - 1) / self.pipeline.fps(self.config)

    @property
    def tokens_a_clip(self) -> int:
        frames = self.pipeline.num_frames(self.config) - (self.before is not None)
        return frames * self.pipeline.sequential.config.frame_len

    def stages(self, clips: Sequence[int], keep: Keep, progress: Progress | None) -> Iterator[Stage]:
        keys = [self.keys[clip] for clip in clips]
        whole = self.pipeline.num_frames(self.config)
        before = None if self.before is None else self.before[list(clips)]
        stages = self.pipeline.stages(
            keys,
            self.config,
            first_frames=None if before is None else before[:, -1],
            start=-(-self._frames_before // 2**self.config.rounds),
            keep=keep,
            progress=progress,
        )
        for tokens in stages:
            frames = tokens.shape[1]
            if before is not None:
                # as far apart as the new ones are by now, counted back from the first of these
                apart = (whole - 1) // (frames - 1)
                tokens = torch.cat([before[:, :-1].flip(1)[:, apart - 1 :: apart].flip(1), tokens], dim=1)
            yield Stage(tokens, max(frames - 1, 1) / self.config.seconds)

    def decode(self, tokens: Tensor) -> np.ndarray:
        return self.pipeline.decode(tokens)

    def identity(self) -> dict[str, Any]:
        return {
            "clips": _say_keys(self.keys),
            "settings": to_dict(self.config),
            "given frames": None if self.before is None else _hash(self.before),
        }


@dataclass(frozen=True)
class InterpolationJob:
    """Frames between given ones."""

    pipeline: Pipeline
    config: SampleConfig
    """`seconds`: that the given frames span."""
    keys: Sequence[SampleKey]
    frames: Tensor
    """(clips, K, frame_len)."""

    @property
    def num_frames(self) -> int:
        return (self.frames.shape[1] - 1) * 2**self.config.rounds + 1

    @property
    def seconds(self) -> float:
        return self.config.seconds

    @property
    def tokens_a_clip(self) -> int:
        return self.pipeline.num_tokens_between(self.config, self.frames.shape[1])

    def stages(self, clips: Sequence[int], keep: Keep, progress: Progress | None) -> Iterator[Stage]:
        keys, frames = [self.keys[clip] for clip in clips], self.frames[list(clips)]
        before = self._rounds_before()
        for tokens in self.pipeline.between(
            frames, keys, self.config, rounds_before=before, keep=keep, progress=progress
        ):
            yield Stage(tokens, (tokens.shape[1] - 1) / self.config.seconds)

    def _rounds_before(self) -> int:
        """Rounds that key frames went through to be as many as the given frames: then these are taken for such.

        So key frames interpolated later become what they would have become at once.
        """
        gaps, rounds = self.pipeline.sequential.config.num_frames - 1, 0
        while gaps < self.frames.shape[1] - 1:
            gaps, rounds = 2 * gaps, rounds + 1
        return rounds if gaps == self.frames.shape[1] - 1 else 0

    def decode(self, tokens: Tensor) -> np.ndarray:
        return self.pipeline.decode(tokens)

    def identity(self) -> dict[str, Any]:
        return {
            "clips": _say_keys(self.keys),
            "settings": to_dict(self.config),
            "frames": _hash(self.frames),
        }


@dataclass(frozen=True)
class UpsampleJob:
    """Fine frames of coarse ones."""

    upsampler: Upsampler
    keys: Sequence[SampleKey]
    frames: Tensor
    """(clips, K, low_res_len)."""
    seconds: float
    """That the frames span."""

    @property
    def config(self) -> UpsampleConfig:
        return self.upsampler.config

    @property
    def num_frames(self) -> int:
        return self.frames.shape[1]

    @property
    def tokens_a_clip(self) -> int:
        return self.num_frames * self.upsampler.tokens_a_frame

    def stages(self, clips: Sequence[int], keep: Keep, progress: Progress | None) -> Iterator[Stage]:
        fine, at_once = [], self.config.frames_at_once
        for clip in clips:
            made = []
            for first in range(0, self.num_frames, at_once):
                some = range(first, min(first + at_once, self.num_frames))

                def make(clip: int = clip, some: range = some) -> Tensor:
                    return self.upsampler(self.frames[clip, some.start : some.stop], self.keys[clip], some)

                made.append(keep(f"fine-{clip:06d}-{first:06d}", make))
                if progress is not None:
                    progress(len(some) * self.upsampler.tokens_a_frame)
            fine.append(torch.cat(made))
        yield Stage(torch.stack(fine), max(self.num_frames - 1, 1) / self.seconds)

    def decode(self, tokens: Tensor) -> np.ndarray:
        return pictures_of(self.upsampler.image_tokenizer, tokens)

    def identity(self) -> dict[str, Any]:
        return {
            "clips": _say_keys(self.keys),
            "settings": to_dict(self.config),
            "coarse frames": _hash(self.frames),
            "super-resolution models": list(self.upsampler.fingerprints),
        }


def _say_keys(keys: Sequence[SampleKey]) -> list[list[Any]]:
    return [[key.caption, key.number] for key in keys]


def _hash(tokens: Tensor) -> str:
    shape = ",".join(map(str, tokens.shape))
    return hashlib.sha256(shape.encode() + tokens.contiguous().numpy().tobytes()).hexdigest()
