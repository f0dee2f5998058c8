"""What there is to generate, as data: the clips of a `sample`, `interpolate` or `upsample` request, fully checked.

A job holds models, inputs and encoded prompts. It knows no folder, no file and no other process: `runner.py` does.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from cogvideo.config import to_dict
from cogvideo.inference.engine import Progress
from cogvideo.rng import SampleKey, sample_keys
from cogvideo.sampling.config import SampleConfig, UpsampleConfig
from cogvideo.sampling.inputs import MAX_TOKENS, InputClips
from cogvideo.sampling.pipeline import BatchCache, Pipeline, StageOutput
from cogvideo.sampling.prompts import ClipPrompts, EncodedPrompt, prompt_keys
from cogvideo.sampling.superres import Upsampler
from cogvideo.text import clean_text


class Job(Protocol):
    """Clips to generate."""

    @property
    def config(self) -> SampleConfig | UpsampleConfig: ...

    @property
    def keys(self) -> Sequence[SampleKey]:
        """One per clip."""
        ...

    @property
    def samples_per_prompt(self) -> int:
        """Clips of one prompt, adjacent in `keys`, that one process generates."""
        ...

    @property
    def clips_per_group(self) -> int:
        """Clips that pass through all stages together."""
        ...

    @property
    def num_frames(self) -> int:
        """Frames per finished clip."""
        ...

    @property
    def seconds(self) -> float:
        """Length of a finished clip, from its first frame to its last."""
        ...

    @property
    def tokens_per_clip(self) -> int:
        """Tokens to draw per clip."""
        ...

    def stages(
        self, clips: Sequence[int], cache: BatchCache | None = None, progress: Progress | None = None
    ) -> Iterator[StageOutput]:
        """Generate the clips with these indices, yielding them after every stage; the last output is finished."""
        ...

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Decode frames (frames, frame_len) to pixels (frames, height, width, 3) uint8."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that determines the result except the bundle's weights, ready for JSON."""
        ...


@dataclass(frozen=True)
class ClipJob:
    """Clips of captions, either new or continuing given frames."""

    pipeline: Pipeline
    config: SampleConfig
    keys: Sequence[SampleKey]
    prompts: Sequence[ClipPrompts]
    """The captions of `keys`, encoded."""
    previous_frames: Tensor | None = None
    """(clips, K, frame_len), at the frame rate of the clips: frames that the clips continue; see `Pipeline.stages`."""
    samples_per_prompt: int = 1

    @property
    def clips_per_group(self) -> int:
        return self.config.clips_at_once

    @property
    def num_frames(self) -> int:
        return max(0, self._num_previous - 1) + self.pipeline.num_frames(self.config, self._num_previous)

    @property
    def seconds(self) -> float:
        return (self.num_frames - 1) / self.pipeline.fps(self.config)

    @property
    def tokens_per_clip(self) -> int:
        frames = self.pipeline.num_frames(self.config, self._num_previous) - (self.previous_frames is not None)
        return frames * self.pipeline.sequential.config.frame_len

    @property
    def _num_previous(self) -> int:
        return 0 if self.previous_frames is None else self.previous_frames.shape[1]

    def stages(
        self, clips: Sequence[int], cache: BatchCache | None = None, progress: Progress | None = None
    ) -> Iterator[StageOutput]:
        return self.pipeline.stages(
            [self.keys[clip] for clip in clips],
            [self.prompts[clip] for clip in clips],
            self.config,
            previous_frames=None if self.previous_frames is None else self.previous_frames[list(clips)],
            cache=cache,
            progress=progress,
        )

    def decode(self, tokens: Tensor) -> np.ndarray:
        return self.pipeline.decode(tokens)

    def identity(self) -> dict[str, Any]:
        return {
            "clips": _captions_and_numbers(self.keys),
            "settings": to_dict(self.config),
            "given frames": None if self.previous_frames is None else _hash(self.previous_frames),
        }


@dataclass(frozen=True)
class InterpolationJob:
    """Frames between given frames."""

    pipeline: Pipeline
    config: SampleConfig
    """`seconds` is the time that the given frames span."""
    keys: Sequence[SampleKey]
    prompts: Sequence[Sequence[EncodedPrompt]]
    """The captions of `keys`, encoded for each round."""
    frames: Tensor
    """(clips, K, frame_len)."""
    samples_per_prompt: int = 1

    @property
    def clips_per_group(self) -> int:
        return self.config.clips_at_once

    @property
    def num_frames(self) -> int:
        frames: int = (self.frames.shape[1] - 1) * 2**self.config.rounds + 1
        return frames

    @property
    def seconds(self) -> float:
        return self.config.seconds

    @property
    def tokens_per_clip(self) -> int:
        return self.pipeline.num_interpolation_tokens(self.config, self.frames.shape[1])

    def stages(
        self, clips: Sequence[int], cache: BatchCache | None = None, progress: Progress | None = None
    ) -> Iterator[StageOutput]:
        return self.pipeline.interpolate(
            self.frames[list(clips)],
            [self.keys[clip] for clip in clips],
            [self.prompts[clip] for clip in clips],
            self.config,
            rounds_before=self._rounds_before(),
            cache=cache,
            progress=progress,
        )

    def _rounds_before(self) -> int:
        """Rounds after which key frames are as many as the given frames; 0 if that never happens.

        The given frames are then treated as such, so that interpolating in two commands gives the clip of one.
        """
        intervals, rounds = self.pipeline.sequential.config.num_frames - 1, 0
        while intervals < self.frames.shape[1] - 1:
            intervals, rounds = 2 * intervals, rounds + 1
        return rounds if intervals == self.frames.shape[1] - 1 else 0

    def decode(self, tokens: Tensor) -> np.ndarray:
        return self.pipeline.decode(tokens)

    def identity(self) -> dict[str, Any]:
        return {
            "clips": _captions_and_numbers(self.keys),
            "settings": to_dict(self.config),
            "frames": _hash(self.frames),
        }


@dataclass(frozen=True)
class UpsampleJob:
    """High-resolution frames of low-resolution ones."""

    upsampler: Upsampler
    keys: Sequence[SampleKey]
    prompts: Sequence[list[int]]
    """The captions of `keys`, encoded."""
    frames: Tensor
    """(clips, K, low_res_len)."""
    seconds: float
    """Time that the frames span."""
    samples_per_prompt: int = 1
    clips_per_group: int = 1

    @property
    def config(self) -> UpsampleConfig:
        return self.upsampler.config

    @property
    def num_frames(self) -> int:
        return self.frames.shape[1]

    @property
    def tokens_per_clip(self) -> int:
        return self.num_frames * self.upsampler.tokens_per_frame

    def stages(
        self, clips: Sequence[int], cache: BatchCache | None = None, progress: Progress | None = None
    ) -> Iterator[StageOutput]:
        tokens = self.upsampler.upsample_clips(self.frames, self.keys, self.prompts, clips, cache, progress)
        yield StageOutput(tokens, max(self.num_frames - 1, 1) / self.seconds)

    def decode(self, tokens: Tensor) -> np.ndarray:
        return self.upsampler.decode(tokens)

    def identity(self) -> dict[str, Any]:
        return {
            "clips": _captions_and_numbers(self.keys),
            "settings": to_dict(self.config),
            "coarse frames": _hash(self.frames),
            "super-resolution models": list(self.upsampler.fingerprints),
        }


def describe_job(job: Job) -> str:
    """One line for the user: `2 clips of 33 frames, 8 per second`."""
    clips, fps = len(job.keys), (job.num_frames - 1) / job.seconds
    return f"{clips} clip{'s' * (clips > 1)} of {job.num_frames} frames, {fps:g} per second"


def clip_job(
    pipeline: Pipeline,
    config: SampleConfig,
    prompts: Sequence[str],
    given: InputClips | None = None,
    seen: dict[str, int] | None = None,
) -> ClipJob:
    """Check a request for clips of `prompts`, or without prompts of the captions saved with the given clips.

    `seen` counts the samples that each prompt already has, as in `prompt_keys`: a repeated prompt is a new sample.
    Raises: ValueError for a prompt that is empty or too long, or if the number of given clips does not fit.
    """
    samples_per_prompt = config.samples_per_prompt
    if not prompts and given is not None:
        keys, samples_per_prompt = _saved_keys(given, config.seed), 1
    else:
        keys = prompt_keys(config.seed, prompts, config.samples_per_prompt, seen)
    encoded = pipeline.encode_prompts([key.caption for key in keys], config)
    previous_frames = None
    if given is not None:
        if len(given.tokens) not in (1, len(keys)):
            raise ValueError(
                f"the given file holds {len(given.tokens)} clips, but {len(keys)} are requested; give as many prompts"
            )
        previous_frames = given.tokens.expand(len(keys), -1, -1)
    return ClipJob(pipeline, config, keys, encoded, previous_frames, samples_per_prompt)


def interpolation_job(
    pipeline: Pipeline, config: SampleConfig, given: InputClips, caption: str | None
) -> InterpolationJob:
    """Check a request to interpolate the given clips.

    Raises: ValueError if there is nothing to interpolate, no caption, or one that is too long.
    """
    if config.rounds < 1:
        raise ValueError("rounds=0 adds no frames; give at least 1")
    if given.num_frames < 2:
        raise ValueError(f"interpolation needs at least 2 frames, got {given.num_frames}")
    keys = _keys_of(given, caption, config.seed)
    config = config if given.seconds is None else replace(config, seconds=given.seconds)
    prompts = pipeline.encode_interpolation_prompts([key.caption for key in keys], config, given.num_frames)
    return InterpolationJob(pipeline, config, keys, prompts, given.tokens)


def upsample_job(upsampler: Upsampler, given: InputClips, caption: str | None) -> UpsampleJob:
    """Check a request to upsample the given clips. Raises: ValueError if a caption is missing or empty."""
    keys = _keys_of(given, caption, upsampler.config.seed)
    seconds = given.seconds or float(max(given.num_frames - 1, 1))  # pictures: one per second
    prompts = [upsampler.encode_caption(key.caption) for key in keys]
    return UpsampleJob(upsampler, keys, prompts, given.tokens, seconds)


def check_one_family(pipeline: Pipeline, upsampler: Upsampler) -> None:
    """Raises: ValueError if super-resolution reads frames of another size than those of the pipeline's clips."""
    side, low_res_side = pipeline.sequential.config.frame_side, upsampler.direct.config.low_res_side
    if side != low_res_side:
        raise ValueError(
            f"the clips have frames of {side}x{side} tokens, super-resolution reads {low_res_side}x{low_res_side}; "
            "use models of one family"
        )


def check_upsampling(job: ClipJob, upsampler: Upsampler) -> None:
    """Check, before a job's clips are drawn, that they can be upsampled. Raises: ValueError."""
    check_one_family(job.pipeline, upsampler)
    tokens = len(job.keys) * job.num_frames * job.pipeline.sequential.config.frame_len
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"{len(job.keys)} clips have {tokens} tokens, more than the {MAX_TOKENS} that can be upsampled together; "
            "ask for fewer"
        )


def _keys_of(given: InputClips, caption: str | None, seed: int) -> list[SampleKey]:
    """Keys of the given clips: of the caption if there is one, else of those saved with the tokens.

    Raises: ValueError if there is neither.
    """
    if caption is not None:
        return sample_keys(seed, [clean_text(caption, "caption")], len(given.tokens))
    if not given.samples:
        raise ValueError("the input has no caption; pass --caption")
    return _saved_keys(given, seed)


def _saved_keys(given: InputClips, seed: int) -> list[SampleKey]:
    """Keys of the captions saved with the given clips. Raises: ValueError as `clean_text`."""
    return [SampleKey(seed, clean_text(caption, "caption"), number) for caption, number in given.samples]


def _captions_and_numbers(keys: Sequence[SampleKey]) -> list[list[Any]]:
    return [[key.caption, key.number] for key in keys]


def _hash(tokens: Tensor) -> str:
    shape = ",".join(map(str, tokens.shape))
    return hashlib.sha256(shape.encode() + tokens.contiguous().numpy().tobytes()).hexdigest()
