"""Writes animated GIFs with Pillow."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cogvideo.files import atomic_write

TICK = Fraction(1, 100)  # seconds; a GIF counts time in these


def write_gif(path: str | Path, frames: NDArray[np.uint8], fps: float | Fraction, *, scale: int = 1) -> None:
    """Write frames (N, H, W, 3) uint8 as a GIF that loops; the whole lasts N / fps seconds to within a hundredth.

    A GIF's time is in hundredths, so single frames differ by one of them where 1 / fps does not fit. `scale` repeats
    pixels. One palette serves all frames, so colours do not flicker. Pillow merges equal neighbours and adds up
    their times: the file may hold fewer frames than were given.
    """
    if not len(frames):
        raise ValueError(f"no frames to write to {path}")
    if not 0 < fps <= 50:
        raise ValueError(f"fps={fps}: a GIF plays above 0 and at most 50 frames a second")
    ends = [round(Fraction(index) / Fraction(fps) / TICK) for index in range(len(frames) + 1)]
    durations = [10 * (after - before) for before, after in pairwise(ends)]  # milliseconds
    palette = _palette(frames)
    pictures = [
        Image.fromarray(frame.repeat(scale, axis=0).repeat(scale, axis=1)).quantize(
            palette=palette, dither=Image.Dither.NONE
        )
        for frame in frames
    ]
    with atomic_write(path) as part:
        pictures[0].save(
            part,
            "GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
            optimize=False,
        )


def _palette(frames: NDArray[np.uint8], most: int = 16) -> Image.Image:
    """The 256 colours that serve frames spread over the whole clip."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, most).astype(int))]
    return Image.fromarray(np.concatenate(list(chosen), axis=0)).quantize(256, dither=Image.Dither.NONE)
