"""What sampling leaves on disk: a folder of videos, pictures and tokens. Every file appears whole or not at all.

config.yaml            the settings in effect; `cogvideo sample --config` takes it back
samples.json           version, weights, and for each sample its name, prompt and number; the last file to appear
tokens.safetensors     `tokens` (samples, frames, frame_len) int64, `seconds` (1,)
000-the-red-digit.mp4  H.264; .gif: the same, looping; .png: its frames side by side
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from cogvideo import __version__
from cogvideo.config import dump_yaml
from cogvideo.files import atomic_write, safe_name, write_json
from cogvideo.media.contact_sheet import contact_sheet
from cogvideo.media.gif import write_gif
from cogvideo.media.video import write_video
from cogvideo.rng import SampleKey
from cogvideo.sampling.config import SampleConfig, UpsampleConfig

WATCHABLE_PIXELS = 240
"""Smaller pictures are enlarged, pixel by pixel, until players show more than a stamp."""
FRAMES_ON_SHEET = 9
GIF_FPS = 50
"""Frames a second that a GIF can play; of faster clips it leaves frames out."""
GIF_SECONDS = 600
"""A GIF can show one picture for 655 seconds, and equal ones become one; slower clips play faster there."""


def claim_folder(out: Path, overwrite: bool) -> None:
    """Make the output folder and prove that it can be written, before hours are spent.

    Raises: FileExistsError if it holds anything and `overwrite` is not set; OSError if it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; --out names a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; choose another folder, or --overwrite to replace files in it")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def sample_names(captions: Sequence[str]) -> list[str]:
    """File stems, numbered, so that none repeats; made of letters and digits whatever the captions hold."""
    return [f"{index:03d}-{safe_name(caption)}" for index, caption in enumerate(captions)]


def describe(names: Sequence[str], keys: Sequence[SampleKey]) -> list[dict[str, Any]]:
    """Of each sample its name, prompt and number."""
    return [{"name": name, "prompt": key.caption, "number": key.number} for name, key in zip(names, keys, strict=True)]


def write_summary(
    out: Path,
    config: SampleConfig | UpsampleConfig,
    about: list[dict[str, Any]],
    tokens: Tensor,
    *,
    seconds: float,
    more: dict[str, Any],
) -> None:
    """All files but the clips' own.

    `tokens` (samples, frames, frame_len) span `seconds`; `more` goes into samples.json.
    """
    with atomic_write(out / "config.yaml") as part:
        part.write_text(dump_yaml(config), encoding="utf-8")
    write_tokens(out / "tokens.safetensors", tokens, seconds, about)
    fps = (tokens.shape[1] - 1) / seconds
    write_json(out / "samples.json", {"cogvideo": __version__, **more, "fps": fps, "samples": about})


def write_tokens(path: Path, tokens: Tensor, seconds: float, about: list[dict[str, Any]]) -> None:
    """Tokens (samples, frames, frame_len) and what they are of, as one safetensors file."""
    with atomic_write(path) as part:
        tensors = {"tokens": tokens.contiguous(), "seconds": torch.tensor([seconds])}
        # not save_file, which lets nobody else read the file
        part.write_bytes(save(tensors, metadata={"samples": json.dumps(about, ensure_ascii=False)}))


def write_clip(stem: Path, frames: np.ndarray, fps: float, caption: str, *, finished: bool = True) -> Iterator[Path]:
    """One clip (frames, height, width, 3) uint8 as .mp4, .gif and contact sheet, `stem` with these endings.

    A clip that still grows is a contact sheet, and a video once there is more than a frame.
    """
    scale = max(1, WATCHABLE_PIXELS // min(frames.shape[1:3]))
    # not with_suffix: a stem may end in what looks like one
    video, gif, sheet = (stem.with_name(stem.name + ending) for ending in (".mp4", ".gif", ".png"))
    step = max(1, -(-(len(frames) - 1) // (FRAMES_ON_SHEET - 1)))
    contact_sheet(sheet, [frames[::step]], [caption], scale=max(1, scale // 2))
    yield sheet
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    if finished or len(frames) > 1:
        write_video(video, large, fps)
        yield video
    if finished:
        every = max(1, math.ceil(fps / GIF_FPS))
        write_gif(gif, large[::every], max(fps / every, len(large) / every / GIF_SECONDS))
        yield gif
