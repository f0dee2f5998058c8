"""Writes moving digits in the form of a user's data set: .mp4 files and a captions.jsonl. No short cut to training."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cogvideo.files import atomic_directory
from cogvideo.logs import progress
from cogvideo.media.video import write_video
from cogvideo.worlds.digits.render import (
    CANVAS,
    FPS,
    DigitClip,
    Language,
    Split,
    draw_clip,
    draw_language,
    frame_times,
    render,
)

CAPTIONS_FILE = "captions.jsonl"
PIXEL_FORMAT = "yuv444p"  # full colour resolution: at 40x40, halved chroma would smear a digit's colour
CRF = 10  # mean error about 1 of 255 levels, most of it the rounding of the ground colour
STREAMS = {"train": 0, "test": 1}


def clips_of(split: Split, count: int, seed: int) -> Iterator[tuple[DigitClip, Language]]:
    """The clips of a data set, clip i drawn from (seed, split, i): a larger count begins with the same clips."""
    for index in range(count):
        rng = np.random.default_rng([seed, STREAMS[split], index])
        yield draw_clip(rng, split), draw_language(rng)


def write_dataset(
    folder: str | Path, split: Split, count: int, seed: int, *, pixels: int = CANVAS, workers: int = 2
) -> Path:
    """Write `count` clips of 4 s, 33 frames, 8 a second as clips/000000.mp4 ... and captions.jsonl; returns the latter.

    The folder appears when all of it is written. Raises: ValueError for a bad split or count; FileExistsError.
    """
    if count < 1:
        raise ValueError(f"count={count}: expected at least one clip")
    if pixels < CANVAS or pixels % CANVAS:
        raise ValueError(f"pixels={pixels}; expected a multiple of {CANVAS}, the canvas that digits move on")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; give 0 or more")
    if split not in STREAMS:
        raise ValueError(f"split={split!r} is not a split of the moving digits; choose train or test")
    with atomic_directory(folder) as part:
        (part / "clips").mkdir()

        def write(job: tuple[int, tuple[DigitClip, Language]]) -> str:
            index, (clip, language) = job
            name = f"clips/{index:06d}.mp4"
            write_video(part / name, render(clip, frame_times(), pixels), FPS, pixel_format=PIXEL_FORMAT, crf=CRF)
            return json.dumps({"video": name, "caption": clip.caption(language)}, ensure_ascii=False)

        with ThreadPoolExecutor(workers) as pool, progress(count, "writing digits", "clips") as bar:
            lines = []
            for line in pool.map(write, enumerate(clips_of(split, count, seed))):
                lines.append(line)
                bar.update(1)
        (part / CAPTIONS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(folder) / CAPTIONS_FILE
