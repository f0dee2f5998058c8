"""Recognises the shape of a body by a support vector machine on its outline and shading.

The classifier is trained here, in seconds, on freshly rendered bodies of training scenes, never on generated frames,
test scenes or a tokenizer's output.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from cogvideo.worlds.bodies.physics import States
from cogvideo.worlds.bodies.random_scenes import draw_scene
from cogvideo.worlds.bodies.render import render
from cogvideo.worlds.bodies.scene import REFERENCE_PIXELS, SHAPES, Scene
from cogvideo.worlds.bodies.tracking import COLOUR_NAMES, MIN_AREA, name_pixels, to_reference

PATCH = 20  # pixels per side; the largest bodies are 17 wide
TRAINING_SCENES = 600
POSES = 4  # per scene
TRAINING_SEED = 97  # not a seed that data sets are likely to have
BLURS = (0.0, 0.5, 0.9)  # pixels, standard deviation
FRAMES_PER_BODY = 5  # frames that are classified


def patch(frame: np.ndarray, named: np.ndarray, colour: int) -> np.ndarray:
    """Cut out and centre a body: its mask, and within the mask its lightness relative to its own mean.

    Shapes: frame (64, 64, 3) uint8; named (64, 64) as `name_pixels` gives; returns (2 * PATCH * PATCH,).
    """
    mask = named == colour
    rows, columns = np.nonzero(mask)
    top, left = round(rows.mean() + 0.5 - PATCH / 2), round(columns.mean() + 0.5 - PATCH / 2)
    light = frame.max(axis=-1).astype(np.float32)
    light = np.where(mask, light / max(float(light[mask].mean()), 1.0) - 1, 0)
    outline = np.pad(mask.astype(np.float32), PATCH)
    shading = np.pad(light, PATCH)
    place = np.s_[top + PATCH : top + 2 * PATCH, left + PATCH : left + 2 * PATCH]
    return np.concatenate([outline[place].ravel(), 2 * shading[place].ravel()])


@lru_cache(maxsize=1)
def shape_classifier() -> Any:
    """A scikit-learn SVC over `patch`, trained once per process on bodies in full view (about 20 seconds)."""
    from scipy.ndimage import gaussian_filter
    from sklearn.svm import SVC  # a second to import

    rng = np.random.default_rng(TRAINING_SEED)
    features, shapes = [], []
    for index in range(TRAINING_SCENES):
        scene = draw_scene(TRAINING_SEED, "train", index)
        poses = (3 if any(body.tall for body in scene.bodies) else 1) * POSES  # towers are the hardest to tell apart
        rendering = render(scene, _poses(scene, poses, rng), REFERENCE_PIXELS)
        blur = BLURS[index % len(BLURS)]
        frames = gaussian_filter(rendering.frames.astype(np.float32), (0, blur, blur, 0))
        frames = np.rint(frames).astype(np.uint8)
        named = name_pixels(frames)
        for number, body in enumerate(scene.bodies):
            colour = COLOUR_NAMES.index(body.colour)
            for frame in range(poses):
                if rendering.visible[frame, number] > 0.97 and (named[frame] == colour).sum() >= MIN_AREA:
                    features.append(patch(frames[frame], named[frame], colour))
                    shapes.append(SHAPES.index(body.shape))
    return SVC(C=10.0, gamma="scale").fit(np.stack(features), np.array(shapes))


def recognise_shape(frames: np.ndarray, colour: int, chosen: np.ndarray) -> int:
    """The shape of the body of this colour, an index into SHAPES, by the summed scores of a few frames.

    Shapes: frames (frames, N, N, 3) uint8; chosen: indices of frames that show the body whole.
    """
    picked = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(FRAMES_PER_BODY, len(chosen))).round().astype(int))]
    shown = to_reference(frames[picked])
    named = name_pixels(shown)
    scores = shape_classifier().decision_function(
        np.stack([patch(frame, names, colour) for frame, names in zip(shown, named, strict=True)])
    )
    return int(scores.sum(axis=0).argmax())


def _poses(scene: Scene, count: int, rng: np.random.Generator) -> States:
    """Random poses of the scene's bodies: near their start, turned a little; towers also tilted, up to lying down.

    There is no physics: the frames are independent.
    """
    bodies = len(scene.bodies)
    position = np.empty((count, bodies, 3))
    orientation = np.zeros((count, bodies, 4))
    for frame in range(count):
        for number, body in enumerate(scene.bodies):
            x, y, z = body.position
            if body.tall and rng.random() < 0.6:
                angle = rng.choice([-1, 1]) * rng.uniform(0, math.pi / 2)
                z = body.size[0] * abs(math.sin(angle)) + body.size[2] * abs(math.cos(angle))
                orientation[frame, number] = 0.0, math.sin(angle / 2), 0.0, math.cos(angle / 2)
            else:
                angle = rng.uniform(-0.4, 0.4)
                orientation[frame, number] = 0.0, 0.0, math.sin(angle / 2), math.cos(angle / 2)
            position[frame, number] = x + rng.uniform(-0.1, 0.1), y + rng.uniform(-0.05, 0.05), z
    zero = np.zeros((count, bodies, 3))
    return States(position, orientation, zero, zero, np.zeros((count, bodies, bodies + 1), bool))
