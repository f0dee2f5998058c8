"""Data sets of moving digits: video files with captions, as a user would supply them, or tokens in memory."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogvideo.files import atomic_directory
from cogvideo.logs import progress
from cogvideo.media.video import write_video
from cogvideo.worlds.digits.render import (
    CANVAS,
    FPS,
    DigitClip,
    Language,
    Palette,
    Split,
    draw_clip,
    draw_language,
    frame_times,
    render,
)

if TYPE_CHECKING:
    from cogvideo.data.dataset import InMemoryClips
    from cogvideo.tokenizers.image import ImageTokenizer

CAPTIONS_FILE = "captions.jsonl"
PIXEL_FORMAT = "yuv444p"  # full colour resolution: at 40x40, halved chroma would smear a digit's colour
CRF = 10  # mean error of about 1 level of 255, mostly from rounding the background colour
STREAMS = {"train": 0, "test": 1}


def draw_clips(split: Split, count: int, seed: int, palette: Palette = "basic") -> Iterator[tuple[DigitClip, Language]]:
    """The clips of a data set. Clip i is drawn from (seed, split, i), so a larger set starts with the same clips."""
    for index in range(count):
        rng = np.random.default_rng([seed, STREAMS[split], index])
        yield draw_clip(rng, split, palette), draw_language(rng)


def write_dataset(
    folder: str | Path,
    split: Split,
    count: int,
    seed: int,
    *,
    pixels: int = CANVAS,
    palette: Palette = "basic",
    workers: int = 2,
) -> Path:
    """Write `count` clips of 4 s (33 frames at 8 per second) as clips/000000.mp4, ..., and captions.jsonl.

    Returns the path of captions.jsonl. The folder appears only once it is complete.
    Raises: ValueError for an argument out of range; FileExistsError.
    """
    if count < 1:
        raise ValueError(f"count={count}; expected at least one clip")
    if pixels < CANVAS or pixels % CANVAS:
        raise ValueError(f"pixels={pixels}; expected a multiple of {CANVAS}, the side of the canvas")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; give 0 or more")
    if split not in STREAMS:
        raise ValueError(f"split={split!r} is not a split of the moving digits; choose train or test")
    with atomic_directory(folder) as temporary:
        (temporary / "clips").mkdir()

        def write(job: tuple[int, tuple[DigitClip, Language]]) -> str:
            index, (clip, language) = job
            name = f"clips/{index:06d}.mp4"
            frames = render(clip, frame_times(), pixels)
            write_video(temporary / name, frames, FPS, pixel_format=PIXEL_FORMAT, crf=CRF)
            return json.dumps({"video": name, "caption": clip.caption(language)}, ensure_ascii=False)

        with ThreadPoolExecutor(workers) as pool, progress(count, "writing digits", "clips") as bar:
            lines = []
            for line in pool.map(write, enumerate(draw_clips(split, count, seed, palette))):
                lines.append(line)
                bar.update(1)
        (temporary / CAPTIONS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(folder) / CAPTIONS_FILE


def clips_in_memory(
    tokenizer: "ImageTokenizer",
    count: int,
    *,
    clip_seconds: Sequence[float] | None = None,
    num_frames: int = 5,
    seed: int = 0,
) -> "InMemoryClips":
    """Render and encode `count` training clips, to try training without prepared files.

    Clip lengths cycle through `clip_seconds` (default: 1, 2 and 4). The same arguments give the same clips.
    """
    from cogvideo.data.dataset import InMemoryClips
    from cogvideo.data.encode import TokenEncoder  # imports torch, which `cogvideo digits` does not need

    lengths = sorted(clip_seconds or (4.0, 2.0, 1.0))
    seconds = np.resize(np.array(lengths, np.float32), count)
    captions, frames = [], []
    for (clip, language), length in zip(draw_clips("train", count, seed), seconds, strict=True):
        captions.append(clip.caption(language))
        frames.append(render(clip, np.linspace(0.0, float(length), num_frames)))
    tokens = TokenEncoder(tokenizer)(np.concatenate(frames)).reshape(count, num_frames, -1)
    return InMemoryClips(tokens.astype(np.int64), seconds, captions, tokenizer.num_tokens)
