"""Which digit and colour a frame shows: a support vector machine on the ink, and the nearest of the named colours.

The classifier is trained here, in seconds, on real handwritten digits of the training split; it never sees a generated
frame, a test digit or a tokenizer's output.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cogvideo.worlds.digits.render import CANVAS, COLOURS, GROUND, DigitClip, load_images, render, split_images
from cogvideo.worlds.digits.tracking import foreground, strength, track

PATCH = 16  # pixels a side, centred on the ink: a digit is 14 high
BLURS = (0.0, 0.4, 0.8, 1.2)  # pixels, standard deviation: a rendering of each training digit at each


def patches(frames: np.ndarray, centroid: np.ndarray) -> np.ndarray:
    """The ink as grey pictures of one size, centred on its centroid to a fraction of a pixel; colour does not matter.

    Shapes: frames (frames, height, width, 3) uint8; centroid (frames, 2) x, y in pixels; returns
    (frames, PATCH * PATCH), 1 at full strength.
    """
    ink = foreground(frames)
    ink = ink / np.maximum(strength(ink), 1e-9)[:, None, None]
    offsets = np.arange(PATCH) + 0.5 - PATCH / 2
    columns, rows = (
        np.maximum(0, 1 - np.abs(centroid[:, axis, None, None] + offsets[:, None] - (np.arange(length) + 0.5)))
        for axis, length in ((0, ink.shape[2]), (1, ink.shape[1]))
    )
    return (rows @ ink @ columns.transpose(0, 2, 1)).reshape(len(frames), -1)


@lru_cache(maxsize=1)
def digit_classifier() -> Any:
    """A scikit-learn SVC over `patches`, trained once a process on the training split's digits (a few seconds).

    Each digit is drawn once for each of BLURS, in a random colour at a random place: lossy frames are soft.
    """
    from scipy.ndimage import gaussian_filter
    from sklearn.svm import SVC  # a second to import

    rng = np.random.default_rng(0)
    images = split_images("train")
    frames = np.empty((len(BLURS), len(images), CANVAS, CANVAS, 3), np.float32)
    for blur, copies in zip(BLURS, frames, strict=True):
        for frame, image in zip(copies, images, strict=True):
            colour, (x, y) = str(rng.choice(list(COLOURS))), rng.uniform(0, 1, 2)
            width, height = DigitClip(int(image), 0, colour, "left", "slowly", (0.0, 0.0)).size
            place = (x * (CANVAS - width), y * (CANVAS - height))
            frame[:] = render(DigitClip(int(image), 0, colour, "left", "slowly", place), 0.0)[0]
        gaussian_filter(copies, (0, blur, blur, 0), output=copies)
    shown = np.rint(frames).astype(np.uint8)
    features = patches(shown.reshape(-1, CANVAS, CANVAS, 3), track(shown).centroid.reshape(-1, 2))
    return SVC(C=10.0, gamma="scale").fit(features, np.tile(load_images()[1][images], len(BLURS)))


def digit_scores(frames: np.ndarray, centroid: np.ndarray) -> np.ndarray:
    """The classifier's score of each of the ten digits, largest for its answer.

    Shapes: frames (clips, frames, height, width, 3) uint8; centroid (clips, frames, 2); returns (clips, frames, 10).
    """
    clips, num_frames = frames.shape[:2]
    features = patches(frames.reshape(-1, *frames.shape[2:]), centroid.reshape(-1, 2))
    return digit_classifier().decision_function(features).reshape(clips, num_frames, 10)


def colour_indices(frames: np.ndarray) -> np.ndarray:
    """The named colour nearest to the ink's: (clips,) index into COLOURS, from (clips, frames, height, width, 3) uint8.

    The ink-weighted mean colour of all frames, less the ground, is compared by its direction in RGB (hue and
    saturation), so that soft or thin strokes, which are darker, do not count as another colour.
    """
    ink = foreground(frames)[..., None]
    ground = np.array(GROUND, np.float32)
    mean = (ink * (frames - ground)).sum(axis=(1, 2, 3)) / np.maximum(ink.sum(axis=(1, 2, 3)), 1e-9)
    named = np.array(list(COLOURS.values()), np.float32) - ground
    named /= np.linalg.norm(named, axis=-1, keepdims=True)
    return (mean @ named.T).argmax(axis=-1)
