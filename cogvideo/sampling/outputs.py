"""Results on disk: a folder of videos, contact sheets and tokens. Every file appears complete or not at all.

config.yaml            the settings in effect; `cogvideo sample --config` reads it
samples.json           version, weights, and each sample's name, prompt and number; the last file to appear
tokens.safetensors     `tokens` (samples, frames, frame_len) int64, `seconds` (1,)
000-the-red-digit.mp4  H.264; .gif: the same, looping; .png: frames side by side
large/                 the same clips at a higher resolution, in a folder like this one; only on request
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from typing_extensions import TypedDict

from cogvideo import __version__
from cogvideo.config import dump_yaml
from cogvideo.files import atomic_write, read_json, write_json
from cogvideo.media.contact_sheet import contact_sheet
from cogvideo.media.video import write_gif, write_video
from cogvideo.rng import SampleKey
from cogvideo.sampling.config import SampleConfig, UpsampleConfig

SAMPLES_FILE = "samples.json"
LARGE = "large"
"""The folder of upsampled clips, inside that of the clips that they were made from."""
RESULT_NAME = re.compile(r"(config\.yaml|samples\.json|tokens\.safetensors|\d{3,}-.*\.(mp4|gif|png))", re.DOTALL)
"""Matches the names of the files in a folder of results."""
MAX_SUMMARY_BYTES = 64 << 20
MIN_VIDEO_SIDE = 240
"""Videos smaller than this, in pixels, are enlarged by an integer factor: players show small ones at stamp size."""
FRAMES_ON_SHEET = 9
GIF_FPS = 50
"""Highest frame rate that a GIF can play; faster clips are thinned."""
GIF_SECONDS = 600
"""A GIF shows a frame for at most 655 seconds, and identical frames are merged into one; longer clips are sped up."""


class SampleRecord(TypedDict):
    """A clip in samples.json."""

    name: str
    """Of its files, without the ending."""
    prompt: str
    number: int
    """Index among the samples of its prompt."""


class _Summary(TypedDict):
    """The part of samples.json that is read."""

    samples: list[SampleRecord]


def describe_samples(names: Sequence[str], keys: Sequence[SampleKey]) -> list[SampleRecord]:
    """Each sample's record, for samples.json and the header of the tokens file."""
    return [SampleRecord(name=name, prompt=k.caption, number=k.number) for name, k in zip(names, keys, strict=True)]


def read_samples(folder: Path) -> list[SampleRecord]:
    """The clips of a finished folder; names that point outside it are skipped.

    Raises: OSError; ValueError if samples.json is damaged.
    """
    summary: _Summary = read_json(folder / SAMPLES_FILE, _Summary, max_bytes=MAX_SUMMARY_BYTES)
    return [sample for sample in summary["samples"] if Path(sample["name"]).name == sample["name"]]


def write_summary(
    out: Path,
    config: SampleConfig | UpsampleConfig,
    samples: list[SampleRecord],
    tokens: Tensor,
    *,
    seconds: float,
    extra: dict[str, Any],
) -> None:
    """Write the files that cover all clips. `tokens` (samples, frames, frame_len) span `seconds`.

    `extra` is added to samples.json.
    """
    with atomic_write(out / "config.yaml") as temporary:
        temporary.write_text(dump_yaml(config), encoding="utf-8")
    write_tokens(out / "tokens.safetensors", tokens, seconds, samples)
    fps = (tokens.shape[1] - 1) / seconds
    write_json(out / SAMPLES_FILE, {"cogvideo": __version__, **extra, "fps": fps, "samples": samples})


def write_tokens(path: Path, tokens: Tensor, seconds: float, samples: list[SampleRecord]) -> None:
    """Write tokens (samples, frames, frame_len), their length and their captions as one safetensors file."""
    with atomic_write(path) as temporary:
        tensors = {"tokens": tokens.contiguous(), "seconds": torch.tensor([seconds])}
        # not save_file, which creates files that only their owner can read
        temporary.write_bytes(save(tensors, metadata={"samples": json.dumps(samples, ensure_ascii=False)}))


def write_clip(
    stem: Path, frames: NDArray[np.uint8], fps: float, caption: str, *, final: bool = True
) -> Iterator[Path]:
    """Write a clip (frames, height, width, 3) as .mp4, .gif and contact sheet; yields each file once it is written.

    `final=False`: later stages will replace the clip, so there is no .gif, and no .mp4 of a single frame.
    """
    scale = max(1, MIN_VIDEO_SIDE // min(frames.shape[1:3]))
    # not with_suffix: a stem may contain a dot
    video, gif, sheet = (stem.with_name(stem.name + ending) for ending in (".mp4", ".gif", ".png"))
    step = max(1, -(-(len(frames) - 1) // (FRAMES_ON_SHEET - 1)))
    contact_sheet(sheet, [frames[::step]], [caption], scale=max(1, scale // 2))
    yield sheet
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    if final or len(frames) > 1:
        write_video(video, large, fps)
        yield video
    if final:
        every = max(1, math.ceil(fps / GIF_FPS))
        write_gif(gif, large[::every], max(fps / every, len(large) / every / GIF_SECONDS))
        yield gif
