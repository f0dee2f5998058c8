"""Sample the clips that a protocol measures; in frame prediction they begin with real frames.

Clips are sampled in groups of `clips_at_once`, each stored in the cache folder. Processes share the groups, and an
interrupted evaluation resumes at the next group; the clips do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cogvideo.config import to_dict
from cogvideo.distributed import ProcessGroup
from cogvideo.evaluation.compare import check_count
from cogvideo.evaluation.measure import ALONE, Choice, ChosenClip, cached, choose_clips
from cogvideo.evaluation.preprocessing import choose_frames, resize_frames, to_bytes
from cogvideo.evaluation.protocols import Protocol
from cogvideo.evaluation.sources import Clip, ClipSource, Frames, clips_of_tokens
from cogvideo.inference.engine import Progress
from cogvideo.logs import progress
from cogvideo.rng import SampleKey
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.prompts import prompt_keys


class PredictedClip(Clip):
    """A generated clip whose first frames are taken from a real one, resized to match the generated frames."""

    def __init__(self, generated: Clip, given: ChosenClip, protocol: Protocol) -> None:
        self._generated, self._given, self._protocol = generated, given, protocol
        self.name, self.caption = generated.name, generated.caption

    @property
    def num_frames(self) -> int:
        return self._generated.num_frames

    @property
    def seconds(self) -> NDArray[np.float64] | None:
        return self._generated.seconds

    @property
    def identity(self) -> str:
        first = self._given.indices[: self._protocol.given_frames].tolist()
        return f"{self._given.clip.identity} {first} {self._generated.identity}"

    def read(self, indices: NDArray[np.int64]) -> Frames:
        frames = self._generated.read(indices).copy()
        given = indices < self._protocol.given_frames
        if given.any():
            crop, filter = self._protocol.crop, self._protocol.filter
            resize = partial(resize_frames, side=frames.shape[1], crop=crop, filter=filter)
            frames[given] = to_bytes(self._given.clip.resized(self._given.indices[indices[given]], resize))
        return frames


def sample_clips(
    pipeline: Pipeline,
    config: SampleConfig,
    prompts: Sequence[str],
    protocol: Protocol,
    real: ClipSource | None,
    *,
    weights: str = "",
    cache: Path | None = None,
    processes: ProcessGroup = ALONE,
) -> ClipSource:
    """Sample as many clips as the protocol needs, cycling through the prompts, whose clip counts differ by at most one.

    In frame prediction the model continues the first frames of clips of `real`, conditioned on the last of them, or on
    the last `config.given_frames` at the rate of key frames. `weights`: the bundle's fingerprint, part of the key of
    tokens in `cache`. All processes call this and get all clips; with several, all must be able to access `cache`.
    Raises: ValueError, before sampling, if generated clips would be too short or there are too few real ones.
    """
    wanted = protocol.clips or len(prompts) * config.samples_per_prompt
    keys = prompt_keys(config.seed, list(islice(cycle(prompts), wanted)))
    given = max(0, protocol.given_frames - 1)  # before the frame that the model starts from
    count = pipeline.num_frames(config, protocol.given_frames) + given
    seconds = (count - 1) / pipeline.fps(config)
    if choose_frames(protocol, count, np.linspace(0, seconds, count), "first", np.random.default_rng()) is None:
        raise ValueError(
            f"the model makes clips of {count} frames, {protocol.name} needs {protocol.frames}; set rounds="
        )
    chosen: list[ChosenClip] = []
    if real is not None:
        choice = choose_clips(real, protocol, protocol.real_start, wanted, seed=0, processes=processes)
        check_count(protocol, real, choice, "real", wanted if protocol.clips or protocol.given_frames else 2)
        chosen = choice.clips
    encoded = pipeline.encode_prompts([key.caption for key in keys], config)

    def draw(rows: slice, update: Progress) -> torch.Tensor:
        previous = _encode(pipeline, protocol, chosen[rows]) if protocol.given_frames else None
        *_, last = pipeline.stages(keys[rows], encoded[rows], config, previous_frames=previous, progress=update)
        return last.tokens

    def continued(rows: slice) -> list[str] | None:
        return [protocol.hash, Choice(chosen[rows], 0).digest] if protocol.given_frames else None

    tokens = sample_groups(
        pipeline,
        config,
        keys,
        count,
        draw,
        given=given,
        weights=weights,
        about=continued,
        cache=cache,
        processes=processes,
    )
    names = [f"{number:05d} {key.caption}" for number, key in enumerate(keys)]
    captions = [key.caption for key in keys]
    source = clips_of_tokens(tokens, seconds, names, pipeline.image_tokenizer, "the model", captions)
    if not protocol.given_frames:
        return source
    pairs = zip(source.clips, chosen, strict=True)
    return ClipSource(source.origin, source.kind, tuple(PredictedClip(clip, real, protocol) for clip, real in pairs))


def sample_groups(
    pipeline: Pipeline,
    config: SampleConfig,
    keys: Sequence[SampleKey],
    num_frames: int,
    draw: Callable[[slice, Progress], torch.Tensor],
    *,
    given: int = 0,
    weights: str = "",
    about: Callable[[slice], object] = lambda rows: None,
    cache: Path | None = None,
    processes: ProcessGroup = ALONE,
) -> torch.Tensor:
    """Tokens (clips, num_frames, frame_len) of all clips, sampled in groups of `config.clips_at_once`.

    `draw` samples the group for some rows of `keys`. Groups are stored in `cache` under `weights`, the keys, the
    settings, and `about`: anything else that determines them, as JSON. `given`: frames per clip that are not sampled.
    """
    frame_len = pipeline.sequential.config.frame_len
    tokens_per_clip = (num_frames - given) * frame_len

    def group(rows: slice, update: Progress) -> torch.Tensor:
        words = json.dumps([weights, keys[rows], to_dict(config), about(rows)])
        name = None if cache is None else cache / f"generated-{hashlib.sha256(words.encode()).hexdigest()[:32]}.npz"

        def fits(arrays: dict[str, NDArray[Any]]) -> bool:
            tokens = arrays.get("tokens", np.empty(0))
            codes = pipeline.image_tokenizer.num_tokens
            shape = len(keys[rows]), num_frames, frame_len
            return tokens.dtype == np.int64 and tokens.shape == shape and 0 <= tokens.min() <= tokens.max() < codes

        arrays, was_there = cached(name, lambda: {"tokens": draw(rows, update).numpy()}, fits)
        if was_there:
            update(len(keys[rows]) * tokens_per_clip)
        return torch.from_numpy(arrays["tokens"])

    groups = [slice(first, first + config.clips_at_once) for first in range(0, len(keys), config.clips_at_once)]
    own = processes.shard(len(groups))
    own_clips = sum(len(keys[groups[number]]) for number in own)
    with progress(own_clips * tokens_per_clip, "sampling", "tokens") as bar:
        drawn = {number: group(groups[number], bar.update) for number in own}
    processes.barrier()
    for number in set(range(len(groups))) - set(own):
        drawn[number] = group(groups[number], lambda tokens: None)
    return torch.cat([drawn[number] for number in range(len(groups))])


def _encode(pipeline: Pipeline, protocol: Protocol, chosen: Sequence[ChosenClip]) -> torch.Tensor:
    """The first frames of real clips as the model's tokens (clips, given frames, frame_len)."""
    side = pipeline.sequential.config.frame_side * pipeline.image_tokenizer.compress_rate
    resize = partial(resize_frames, side=side, crop=protocol.crop, filter=protocol.filter)
    tokens = []
    with progress(len(chosen), "given frames", "clips") as bar:
        for clip, indices in chosen:
            frames = clip.resized(indices[: protocol.given_frames], resize)
            tokens.append(pipeline.image_tokenizer.encode(frames / 255).cpu())
            bar.update(1)
    return torch.stack(tokens)
