"""What sampling leaves on disk: a folder of videos, pictures and tokens. Every file appears whole or not at all.

config.yaml            the settings in effect; `cogvideo sample --config` takes it back
samples.json           version, weights, and for each sample its name, prompt and number
tokens.safetensors     `tokens` (samples, frames, frame_len) int64, `seconds` (1,)
000-the-red-digit.mp4  H.264; .gif: the same, looping; .png: its frames side by side
"""

import json
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
from cogvideo.sampling.config import SampleConfig

WATCHABLE_PIXELS = 240
"""Smaller pictures are enlarged, pixel by pixel, until players show more than a stamp."""
FRAMES_ON_SHEET = 9


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


def sample_names(prompts: Sequence[str], samples_per_prompt: int) -> list[str]:
    """File stems, numbered, so that none repeats; made of letters and digits whatever the prompt holds."""
    each = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    return [f"{index:03d}-{safe_name(prompt)}" for index, prompt in enumerate(each)]


def write_results(
    out: Path,
    prompts: Sequence[str],
    config: SampleConfig,
    weights: str,
    tokens: Tensor,
    frames: np.ndarray,
    fps: float,
) -> Iterator[Path]:
    """Write all files, yielding each as it is done. `frames` (samples, frames, height, width, 3) uint8."""
    numbers = range(config.samples_per_prompt)
    of_prompt = [(prompt, number) for prompt in prompts for number in numbers]
    names = sample_names(prompts, config.samples_per_prompt)
    about = [
        {"name": name, "prompt": prompt, "number": number}
        for name, (prompt, number) in zip(names, of_prompt, strict=True)
    ]
    with atomic_write(out / "config.yaml") as part:
        part.write_text(dump_yaml(config), encoding="utf-8")
    write_json(out / "samples.json", {"cogvideo": __version__, "weights": weights, "fps": fps, "samples": about})
    write_tokens(out / "tokens.safetensors", tokens, config.seconds, about)
    yield out / "tokens.safetensors"
    for name, (prompt, _), clip in zip(names, of_prompt, frames, strict=True):
        yield from write_clip(out / name, clip, fps, prompt)


def write_tokens(path: Path, tokens: Tensor, seconds: float, about: list[dict[str, Any]]) -> None:
    """Tokens (samples, frames, frame_len) and what they are of, as one safetensors file."""
    with atomic_write(path) as part:
        tensors = {"tokens": tokens.contiguous(), "seconds": torch.tensor([seconds])}
        # not save_file, which lets nobody else read the file
        part.write_bytes(save(tensors, metadata={"samples": json.dumps(about, ensure_ascii=False)}))


def write_clip(stem: Path, frames: np.ndarray, fps: float, caption: str) -> Iterator[Path]:
    """One clip as .mp4, .gif and contact sheet, `stem` with these endings."""
    scale = max(1, WATCHABLE_PIXELS // min(frames.shape[1:3]))
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    # not with_suffix: a stem may end in what looks like one
    video, gif, sheet = (stem.with_name(stem.name + ending) for ending in (".mp4", ".gif", ".png"))
    write_video(video, large, fps)
    yield video
    write_gif(gif, large, fps)
    yield gif
    step = max(1, -(-(len(frames) - 1) // (FRAMES_ON_SHEET - 1)))
    contact_sheet(sheet, [frames[::step]], [caption], scale=max(1, scale // 2))
    yield sheet
