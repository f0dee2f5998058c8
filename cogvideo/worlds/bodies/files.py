"""Writes the bodies world as a user's data set: videos and captions, plus the simulator's states for each clip.

    DIR/captions.jsonl          for `cogvideo prepare --captions`: video, caption, start, end
    DIR/clips/000000.mp4        64 x 64 pixels
    DIR/captions_192.jsonl, DIR/clips_192/000000.mp4     the same clips at 192 pixels, if asked for
    DIR/truth/000000.npz        scene, states, visibility, captions: see `Truth`
    DIR/dataset.json            the settings; a run with different ones is refused

Clip i depends on (seed, split, i) alone: its bytes are the same for any number of processes, and a larger set begins
with the smaller one. A rerun after a stop, or with a larger count, writes only the missing clips.
"""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cogvideo.files import (
    atomic_write,
    is_temporary,
    parse_json,
    read_json,
    read_npz,
    remove_all_leftovers,
    write_json,
)
from cogvideo.locks import entries
from cogvideo.logs import progress
from cogvideo.media.video import write_video
from cogvideo.worlds.bodies.captions import SpanCaption, write_captions
from cogvideo.worlds.bodies.physics import States, load_pybullet, simulate
from cogvideo.worlds.bodies.random_scenes import draw_scene
from cogvideo.worlds.bodies.render import area_average, render
from cogvideo.worlds.bodies.scene import (
    FPS,
    REFERENCE_PIXELS,
    STREAMS,
    Body,
    Camera,
    Light,
    Scene,
    Split,
    Surroundings,
    held_out_bodies,
)

VERSION = 1
"""Raise it when a change makes the same seed give different clips."""
CAPTION_STREAM = 0xCA
PIXEL_FORMAT = "yuv444p"  # full colour resolution: bodies are ten pixels wide
CRF = 10
SIZES = (64, 192)
RAYS = {64: 3, 192: 2}
"""Rays per side of a pixel. 64-pixel frames averaged from 192 have six in effect; those rendered at 64 have rougher
outlines and shadow edges. The two differ by 0.3 levels of 255 on average, by up to 40 on an outline."""


@dataclass(frozen=True)
class Truth:
    """What is known about a clip besides its pixels."""

    scene: Scene
    states: States
    visible: np.ndarray
    """(frames, bodies) as in `render.Rendering`."""
    area: np.ndarray
    """(frames, bodies) as in `render.Rendering`."""
    captions: tuple[SpanCaption, ...]


@dataclass(frozen=True)
class Settings:
    """What determines every byte of a data set, except its length."""

    split: Split
    seed: int
    pixels: int
    """Side of rendered frames: 192 writes clips at 192 and, averaged down, at 64; 64 renders and writes 64 only."""
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.split not in STREAMS:
            raise ValueError(f"split={self.split!r}; choose one of {', '.join(STREAMS)}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative; give 0 or more")
        if self.pixels not in SIZES:
            raise ValueError(f"pixels={self.pixels}; choose 64, or 192 for both sizes")


def make_clip(settings: Settings, index: int) -> tuple[np.ndarray, Truth]:
    """Clip `index`: frames (33, pixels, pixels, 3) uint8 and its truth."""
    scene = draw_scene(settings.seed, settings.split, index)
    states = simulate(scene)
    rendering = render(scene, states, settings.pixels, RAYS[settings.pixels])
    words = np.random.default_rng([settings.seed, STREAMS[settings.split], index, CAPTION_STREAM])
    captions = write_captions(scene, states, rendering.visible, words)
    return rendering.frames, Truth(scene, states, rendering.visible, rendering.area, captions)


def write_dataset(folder: str | Path, settings: Settings, count: int, *, processes: int = 1) -> Path:
    """Write the first `count` clips, except those that exist already; returns the captions file's path.

    Raises: ValueError for a bad count, a folder with other settings, or if PyBullet is not installed; FileExistsError
    for a folder of anything else.
    """
    if count < 1:
        raise ValueError(f"count={count}: expected at least one clip")
    if processes < 1:
        raise ValueError(f"processes={processes}: expected at least one")
    load_pybullet()
    folder = Path(folder)
    _claim(folder, settings)
    missing = [index for index in range(count) if not _truth_path(folder, index).exists()]
    with progress(len(missing), "rendering", "clips") as bar:
        for _ in _write_clips(folder, settings, missing, processes):
            bar.update(1)
    return _write_captions_files(folder, settings, count)


def _write_clips(folder: Path, settings: Settings, indices: list[int], processes: int) -> Iterator[int]:
    write = partial(_write_clip, folder, settings)
    if processes == 1 or len(indices) < 2:
        yield from map(write, indices)
        return
    # Fresh processes: a fork would copy locks that other threads of the parent hold.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write, indices, chunksize=4)


def _write_clip(folder: Path, settings: Settings, index: int) -> int:
    """Write a clip's videos, then its truth, whose presence means that the clip is complete."""
    frames, truth = make_clip(settings, index)
    if settings.pixels != REFERENCE_PIXELS:
        _write_frames(folder / _video_name(index, settings.pixels), frames)
        frames = area_average(frames, settings.pixels // REFERENCE_PIXELS)
    _write_frames(folder / _video_name(index, REFERENCE_PIXELS), frames)
    write_truth(_truth_path(folder, index), truth)
    return index


def _write_frames(path: Path, frames: np.ndarray) -> None:
    write_video(path, frames, FPS, pixel_format=PIXEL_FORMAT, crf=CRF)


def _claim(folder: Path, settings: Settings) -> None:
    """Record the settings in a new folder, or check them against those of an existing one; remove leftovers."""
    path = folder / "dataset.json"
    wanted = {"world": "bodies", **asdict(settings)}
    if path.exists():
        found = read_json(path, dict[str, Any])
        if found != wanted:
            raise ValueError(
                f"{folder} was written with {str(found)[:200]}, not {wanted}; use another folder or the same settings"
            )
    elif folder.exists() and not all(map(is_temporary, entries(folder))):
        raise FileExistsError(f"{folder} is not empty and holds no {path.name}; choose another folder")
    else:
        write_json(path, wanted)
    videos = (folder / _video_name(0, pixels) for pixels in (REFERENCE_PIXELS, settings.pixels))
    for place in (folder, *(path.parent for path in (*videos, _truth_path(folder, 0)))):
        remove_all_leftovers(place)


def _write_captions_files(folder: Path, settings: Settings, count: int) -> Path:
    """Write the captions of the first `count` clips, one file per frame size; returns the path of the 64-pixel one."""
    captions = [read_truth(_truth_path(folder, index)).captions for index in range(count)]
    for pixels in (REFERENCE_PIXELS, settings.pixels):
        lines = [
            json.dumps(
                {"video": _video_name(index, pixels), "caption": line.text, "start": line.start, "end": line.end},
                ensure_ascii=False,
            )
            for index, clip in enumerate(captions)
            for line in clip
        ]
        with atomic_write(folder / _captions_name(pixels)) as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / _captions_name(REFERENCE_PIXELS)


def _captions_name(pixels: int) -> str:
    return "captions.jsonl" if pixels == REFERENCE_PIXELS else f"captions_{pixels}.jsonl"


def _video_name(index: int, pixels: int) -> str:
    return f"{'clips' if pixels == REFERENCE_PIXELS else f'clips_{pixels}'}/{index:06d}.mp4"


def _truth_path(folder: Path, index: int) -> Path:
    return folder / "truth" / f"{index:06d}.npz"


def write_truth(path: str | Path, truth: Truth) -> None:
    """Write an .npz of plain arrays: `facts` (JSON text), the states, visible, area, and the camera's eye and axes."""
    scene, num_frames = truth.scene, len(truth.visible)
    facts = {
        "scene": asdict(scene),
        "held_out_bodies": held_out_bodies(scene),
        "captions": [asdict(caption) for caption in truth.captions],
    }
    buffer = io.BytesIO()
    arrays: dict[str, Any] = truth.states.arrays()
    np.savez_compressed(
        buffer,
        facts=np.array(json.dumps(facts, ensure_ascii=False)),
        visible=truth.visible,
        area=truth.area,
        camera_eye=np.array([scene.camera.eye(frame / FPS) for frame in range(num_frames)]),
        camera_axes=np.array([scene.camera.axes(frame / FPS) for frame in range(num_frames)]),
        **arrays,
    )
    with atomic_write(path) as part:
        part.write_bytes(buffer.getvalue())


def read_truth(path: str | Path) -> Truth:
    """Read what `write_truth` wrote. Raises: ValueError or OSError if it cannot be read; no pickle is loaded."""
    arrays = read_npz(path)
    try:
        facts = parse_json(str(arrays["facts"]).encode(), path)
        states = States(*(arrays[name] for name in States.__dataclass_fields__))
        captions = tuple(SpanCaption(**caption) for caption in facts["captions"])
        return Truth(scene_from_json(facts["scene"]), states, arrays["visible"], arrays["area"], captions)
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path}: not a clip's truth ({str(error)[:200]})") from None


def scene_from_json(facts: dict[str, Any]) -> Scene:
    """Rebuild a scene from what `dataclasses.asdict` made of it."""
    light = dict(facts["light"], direction=tuple(facts["light"]["direction"]))
    surroundings = dict(facts["surroundings"], wall=tuple(facts["surroundings"]["wall"]))
    bodies: list[dict[str, Any]] = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in body.items()}
        for body in facts["bodies"]
    ]
    return Scene(
        event=facts["event"],
        bodies=tuple(Body(**body) for body in bodies),
        direction=facts["direction"],
        speed=facts["speed"],
        camera=Camera(**facts["camera"]),
        light=Light(**light),
        surroundings=Surroundings(**surroundings),
    )
