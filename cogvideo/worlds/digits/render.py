"""Moving digits: handwritten digits that move across a dark canvas, with captions in English or Chinese.

A clip is a value (`DigitClip`), sampled by `draw_clip` and drawn by `render`. The 1,797 digits are those that
scikit-learn ships; no digit image appears in both training and test clips. This file makes pixels and captions;
`files.py` writes them as videos, which are then treated like any user's.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Split = Literal["train", "test"]
Palette = Literal["basic", "new"]
Language = Literal["zh", "en"]

CANVAS = 40  # side in pixels
BACKGROUND = (16, 16, 24)
SCALE = 1.75  # canvas pixels per pixel of scikit-learn's 8x8 digits; ink is 14 px high
INK_THRESHOLD = 2  # of 16; fainter marks do not widen the ink box
SPLIT_SEED = 20220529
NUM_TEST_DIGITS = 360  # of 1,797

FPS = 8
NUM_FRAMES = 33
SECONDS = (NUM_FRAMES - 1) / FPS  # 4.0: frame k is at k / 8 s
FREE_FRACTION = 7 / 8  # of the clip in which no digit touches an edge, if the canvas is large enough

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (232, 52, 48),
    "green": (56, 196, 72),
    "blue": (64, 112, 248),
    "yellow": (240, 216, 48),
    "purple": (200, 80, 232),
    "white": (236, 236, 236),
}
NEW_COLOURS: dict[str, tuple[int, int, int]] = {
    "orange": (245, 120, 45),
    "violet": (150, 100, 245),
    "cream": (245, 245, 150),
}
"""Colours that the bundled weights were not trained on, but that their image tokenizer can represent."""
PALETTES: dict[Palette, dict[str, tuple[int, int, int]]] = {"basic": COLOURS, "new": NEW_COLOURS}
ALL_COLOURS = COLOURS | NEW_COLOURS
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, float] = {"slowly": 2.0, "quickly": 6.0}  # pixels per second
CHINESE: dict[str, str] = {
    **{"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "white": "白色"},
    **{"orange": "橙色", "violet": "蓝紫色", "cream": "米黄色"},
    **{"left": "左", "right": "右", "up": "上", "down": "下"},
    **{"slowly": "缓慢", "quickly": "快速"},
}


@dataclass(frozen=True)
class DigitClip:
    """One moving digit."""

    image: int  # index among scikit-learn's 1,797 digits
    label: int  # 0..9
    colour: str  # a key of ALL_COLOURS
    direction: str  # a key of DIRECTIONS
    speed: str  # a key of SPEEDS
    start: tuple[float, float]  # left and top of the ink box at time 0, in pixels

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the ink box in pixels."""
        rows, columns = digit_ink(self.image).shape
        return columns * SCALE, rows * SCALE

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per second, rightwards and downwards."""
        step = SPEEDS[self.speed]
        across, down = DIRECTIONS[self.direction]
        return across * step, down * step

    def caption(self, language: Language) -> str:
        """The clip's caption, such as "红色的数字3向左快速移动" or "the red digit 3 moves left quickly"."""
        if language == "en":
            return f"the {self.colour} digit {self.label} moves {self.direction} {self.speed}"
        return f"{CHINESE[self.colour]}的数字{self.label}向{CHINESE[self.direction]}{CHINESE[self.speed]}移动"

    def positions(self, times: ArrayLike) -> NDArray[np.float64]:
        """Left and top of the ink box at `times` (N,) seconds -> (N, 2) pixels."""
        width, height = self.size
        across, down = self.velocity
        left = bounce(self.start[0], across, times, 0.0, CANVAS - width)
        top = bounce(self.start[1], down, times, 0.0, CANVAS - height)
        return np.stack([left, top], axis=-1)


def bounce(
    start: ArrayLike, velocity: ArrayLike, time: ArrayLike, low: ArrayLike, high: ArrayLike
) -> NDArray[np.float64]:
    """Position after `time` of a point that moves at constant speed and is reflected at `low` and `high`."""
    span = np.maximum(np.asarray(high, float) - low, 1e-9)
    phase = np.mod(np.asarray(start, float) - low + np.asarray(velocity, float) * np.asarray(time, float), 2 * span)
    folded: NDArray[np.float64] = low + np.where(phase > span, 2 * span - phase, phase)
    return folded


def frame_times() -> NDArray[np.float64]:
    """Times in seconds of a clip's 33 frames."""
    return np.arange(NUM_FRAMES) / FPS


@lru_cache(maxsize=1)
def load_images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's digits: images (1797, 8, 8) with values 0..16, and labels (1797,)."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int64)


@cache
def digit_ink(image: int) -> NDArray[np.float32]:
    """One digit cropped to its ink box: (rows, columns) in 0..1."""
    pixels = load_images()[0][image]
    rows = np.flatnonzero((pixels > INK_THRESHOLD).any(axis=1))
    columns = np.flatnonzero((pixels > INK_THRESHOLD).any(axis=0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / 16


@lru_cache(maxsize=2)
def split_images(split: Split) -> NDArray[np.int64]:
    """Indices of a split's digit images; SPLIT_SEED fixes the split. Raises: ValueError for an unknown split."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is not a split of the moving digits; choose train or test")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(load_images()[1]))
    return np.sort(order[:NUM_TEST_DIGITS] if split == "test" else order[NUM_TEST_DIGITS:])


def draw_clip(rng: np.random.Generator, split: Split, palette: Palette = "basic") -> DigitClip:
    """Sample a clip: image, colour, direction and speed uniformly, then a start that puts off bounces to the end."""
    image = int(rng.choice(split_images(split)))
    colour, direction, speed = (str(rng.choice(list(table))) for table in (PALETTES[palette], DIRECTIONS, SPEEDS))
    rows, columns = digit_ink(image).shape
    start = [0.0, 0.0]
    # Per axis: `travel` is the distance to cover before any bounce; start at least that far from the edge ahead.
    for axis, (span, sign) in enumerate(
        zip((CANVAS - columns * SCALE, CANVAS - rows * SCALE), DIRECTIONS[direction], strict=True)
    ):
        travel = min(abs(sign) * SPEEDS[speed] * SECONDS * FREE_FRACTION, span)
        offset = rng.uniform(0, span - travel)
        start[axis] = offset if sign >= 0 else span - offset
    return DigitClip(image, int(load_images()[1][image]), colour, direction, speed, (start[0], start[1]))


def draw_language(rng: np.random.Generator) -> Language:
    """Sample the caption's language: half are Chinese, half English."""
    return "zh" if rng.random() < 0.5 else "en"


def render(clip: DigitClip, times: ArrayLike, pixels: int = CANVAS) -> NDArray[np.uint8]:
    """Draw a clip at `times` (N,) seconds -> (N, pixels, pixels, 3) uint8, with sub-pixel positions.

    `pixels` scales the whole picture; a clip's own numbers are in pixels of the 40x40 canvas.
    Bilinear interpolation of the digit is separable, so a frame takes two small matrix products.
    """
    ink = digit_ink(clip.image)
    positions = clip.positions(np.atleast_1d(np.asarray(times, float)))
    columns = _bilinear_weights(positions[:, 0], ink.shape[1], pixels)
    rows = _bilinear_weights(positions[:, 1], ink.shape[0], pixels)
    coverage = np.matmul(np.matmul(rows, ink), columns.transpose(0, 2, 1))[..., None]
    background, colour = np.array(BACKGROUND, np.float32), np.array(ALL_COLOURS[clip.colour], np.float32)
    return np.rint(background + coverage * (colour - background)).astype(np.uint8)


def _bilinear_weights(offsets: NDArray[np.float64], length: int, pixels: int) -> NDArray[np.float32]:
    """Weights (N, pixels, length) of the digit's pixels at each picture pixel along one axis.

    `offsets` (N,): where the digit's box begins, in canvas pixels.
    """
    # Picture pixel centres in the digit's own pixel coordinates, then 1 at distance 0, falling to 0 at distance 1.
    centres = ((np.arange(pixels) + 0.5) * (CANVAS / pixels) - offsets[:, None]) / SCALE - 0.5
    return np.maximum(0, 1 - np.abs(centres[..., None] - np.arange(length))).astype(np.float32)


def sample_frames(rng: np.random.Generator, count: int, split: Split) -> NDArray[np.uint8]:
    """Sample single frames, each from its own clip at a uniformly random time: (count, 40, 40, 3) uint8."""
    frames = np.empty((count, CANVAS, CANVAS, 3), np.uint8)
    for index in range(count):
        frames[index] = render(draw_clip(rng, split), rng.uniform(0, SECONDS))[0]
    return frames
