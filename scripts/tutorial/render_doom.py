"""Render captioned clips of a 3D game, without a display: ViZDoom's camera moves through rooms with one object.

    python scripts/tutorial/render_doom.py --out DIR --count 1200 [--seed 0]

ViZDoom (`pip install -e ".[tutorial]"`) comes with Freedoom's levels and art, which are free. A clip lasts 4 s at 8
frames per second. Captions are derived from the engine's labels of every frame: which object is where in the picture,
and how large. Clips whose object leaves the picture, is hidden, or does not move clearly are drawn again.

DIR gets captions.jsonl and clips/000000.mp4, ..., for `cogvideo prepare` or `cogvideo pretrain`, and prompts.txt, each
caption once. Clip i depends only on the seed and i. The folder appears when it is complete.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogvideo.cli.main import run_command
from cogvideo.files import atomic_directory
from cogvideo.logs import progress
from cogvideo.media.video import write_video

FPS, NUM_FRAMES = 8, 33
TICS_PER_FRAME = 4  # the game has 35 tics per second, so clips show it a tenth too slow
SIDE = 120  # pixels, of the square that is kept from the picture's middle
OBJECTS = {
    "RedTorch": "a red torch",
    "GreenTorch": "a green torch",
    "BlueTorch": "a blue torch",
    "TallGreenColumn": "a green column",
    "TallRedColumn": "a red column",
    "TorchTree": "a dead tree",
    "BurningBarrel": "a burning barrel",
    "Candelabra": "a candelabra",
}
"""Captions of objects as Freedoom draws them, by the engine's names."""
MOTIONS = ("forwards", "backwards", "left", "right")
DISTANCE = {"forwards": (200, 260), "backwards": (70, 110), "left": (110, 200), "right": (110, 200)}
"""Map units from the camera to the object at the start; the object is 20 to 40 wide, a room 200 to 400."""
START_TICS = 12
"""Left out, as the camera is still accelerating."""
ATTEMPTS = 200

LARGER, SMALLER = 1.4, 1 / 1.4
"""The object's last height over its first: at least LARGER if it comes closer, at most SMALLER if it goes away."""
VISIBLE = 0.7
"""Least visible part of the object in a frame, relative to the frame in which it is most visible."""
ACROSS, ASIDE = 0.25, 0.12
"""Fractions of the picture's side: the least sideways move of an object that slides across the picture, and the most of
one that comes closer or goes away."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """The engine's bounding box of the object in a frame, in pixels of the cropped picture."""

    left: float
    top: float
    width: float
    height: float
    visible: float
    """The fraction of the box that shows the object, not what is in front of it or behind it."""

    @property
    def is_inside(self) -> bool:
        return self.left >= 0 and self.left + self.width <= SIDE

    @property
    def centre(self) -> float:
        return self.left + self.width / 2


def caption_of(name: str, boxes: list[Box | None]) -> str | None:
    """A clip's caption, by the object's box in every frame; None if it is hidden, cut off or moves unclearly."""
    seen = [box for box in boxes if box is not None and box.is_inside]
    if len(seen) < len(boxes) or min(box.visible for box in seen) < VISIBLE * max(box.visible for box in seen):
        return None
    first, last = seen[0], seen[-1]
    growth, way = last.height / first.height, (last.centre - first.centre) / SIDE
    thing = OBJECTS[name]
    if abs(way) <= ASIDE and growth >= LARGER:
        return f"the camera moves towards {thing}"
    if abs(way) <= ASIDE and growth <= SMALLER:
        return f"the camera moves away from {thing}"
    if abs(way) >= ACROSS and SMALLER < growth < LARGER:
        steps = np.sign(way) * np.diff([box.centre for box in seen])
        if steps.min() > -2:  # pixels: it never turns back
            return f"{thing} slides across the picture to the {'right' if way > 0 else 'left'}"
    return None


class Rooms:
    """A level of rooms with different walls, and the camera in it."""

    def __init__(self) -> None:
        """Raises: ValueError if ViZDoom is not installed."""
        try:
            import vizdoom
        except ImportError:
            raise ValueError("the tutorial needs ViZDoom; pip install -e '.[tutorial]'") from None
        self._vizdoom: Any = vizdoom
        folder = Path(vizdoom.__file__).parent
        game = self.game = vizdoom.DoomGame()
        game.set_doom_game_path(str(folder / "freedoom2.wad"))
        game.set_doom_scenario_path(str(folder / "scenarios/my_way_home.wad"))
        game.set_doom_map("map01")
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for shown in ("hud", "weapon", "crosshair", "decals", "particles", "messages", "effects_sprites", "corpses"):
            getattr(game, f"set_render_{shown}")(False)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_labels_buffer_enabled(True)
        game.set_sectors_info_enabled(True)
        game.set_episode_timeout(0)
        button, variable = vizdoom.Button, vizdoom.GameVariable
        game.set_available_buttons([button.MOVE_FORWARD_BACKWARD_DELTA, button.MOVE_LEFT_RIGHT_DELTA])
        self._pose = [variable.POSITION_X, variable.POSITION_Y, variable.ANGLE]
        game.set_available_game_variables(self._pose)
        game.add_game_args("+sv_cheats 1 -nomonsters")
        self._folder = tempfile.TemporaryDirectory()
        with contextlib.chdir(self._folder.name):  # where the engine writes settings and a cache
            game.init()

    def close(self) -> None:
        self.game.close()
        self._folder.cleanup()

    def render(self, rng: np.random.Generator, name: str, motion: str) -> tuple[list[np.ndarray], list[Box | None]]:
        """One attempt: frames (SIDE, SIDE, 3) uint8 and the object's box in each, None where it is not visible."""
        game = self.game
        game.set_seed(int(rng.integers(1, 2**31)))
        game.new_episode()  # somewhere in some room
        game.send_game_command("movebob 0")
        game.send_game_command(f"summon {name}")  # in front of the camera
        game.make_action([0, 0], TICS_PER_FRAME)
        state = game.get_state()
        if state is None:
            return [], [None]
        x, y, angle = (game.get_game_variable(variable) for variable in self._pose)
        forward = math.radians(angle)
        back, aside = rng.uniform(*DISTANCE[motion]) - 50, rng.uniform(-0.3, 0.3)
        if motion in ("left", "right"):
            aside = rng.uniform(0.3, 0.6) * (-1 if motion == "left" else 1)  # so that the object crosses the picture
        aside *= back + 50
        start = x, y
        x += -back * math.cos(forward) - aside * math.sin(forward)
        y += -back * math.sin(forward) + aside * math.cos(forward)
        walls = [line for sector in state.sectors for line in sector.lines if line.is_blocking]
        if any(_cross(start, (x, y), (wall.x1, wall.y1), (wall.x2, wall.y2)) for wall in walls):
            return [], [None]  # behind a wall, perhaps outside the level
        game.send_game_command(f"warp {x:.1f} {y:.1f}")
        speed = rng.uniform(1.8, 2.8)
        action = {"forwards": [speed, 0], "backwards": [-speed, 0], "left": [0, -speed], "right": [0, speed]}[motion]
        game.make_action(action, START_TICS)
        frames: list[np.ndarray] = []
        boxes: list[Box | None] = []
        for _ in range(NUM_FRAMES):
            state = game.get_state()
            if state is None:
                return frames, [None]  # the camera has reached the end of the level
            margin = (state.screen_buffer.shape[1] - SIDE) // 2
            frames.append(state.screen_buffer[:, margin : margin + SIDE].copy())
            boxes.append(_box(state, name, margin))
            game.make_action(action, TICS_PER_FRAME)
        return frames, boxes


def _box(state: Any, name: str, margin: int) -> Box | None:
    """The object's box in a frame whose left `margin` pixels are cut off."""
    labels = [label for label in state.labels if label.object_name == name]
    if len(labels) != 1:
        return None
    (label,) = labels
    pixels = np.count_nonzero(state.labels_buffer == label.value)
    return Box(label.x - margin, label.y, label.width, label.height, pixels / (label.width * label.height))


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether the segments from a to b and from c to d cross."""

    def side(p: Point, q: Point, r: Point) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) <= 0 and side(c, d, a) * side(c, d, b) <= 0


def draw_clips(rooms: Rooms, count: int, seed: int) -> Iterator[tuple[np.ndarray, str]]:
    """Frames and captions. Raises: ValueError if no attempt at a clip succeeds."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        name, motion = str(rng.choice(list(OBJECTS))), str(rng.choice(MOTIONS))
        for _ in range(ATTEMPTS):
            frames, boxes = rooms.render(rng, name, motion)
            if (caption := caption_of(name, boxes)) is not None:
                yield np.stack(frames), caption
                break
        else:
            raise ValueError(f"no clip {index} in {ATTEMPTS} attempts; is this another version of ViZDoom?")


def write_dataset(folder: Path, count: int, seed: int) -> Path:
    """Write the clips; returns the path of captions.jsonl."""
    rooms = Rooms()
    try:
        with atomic_directory(folder) as temporary, progress(count, "rendering", "clips") as bar:
            (temporary / "clips").mkdir()
            lines, prompts = [], set()
            for index, (frames, caption) in enumerate(draw_clips(rooms, count, seed)):
                name = f"clips/{index:06d}.mp4"
                write_video(temporary / name, frames, FPS, crf=12)
                lines.append(json.dumps({"video": name, "caption": caption}))
                prompts.add(caption)
                bar.update(1)
            (temporary / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (temporary / "prompts.txt").write_text("\n".join(sorted(prompts)) + "\n", encoding="utf-8")
    finally:
        rooms.close()
    return folder / "captions.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--count", type=int, default=1200, help="clips (default: 1200)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    if args.count < 1 or args.seed < 0:
        parser.error("--count must be above 0, --seed at least 0")
    print(write_dataset(args.out, args.count, args.seed))


if __name__ == "__main__":
    sys.exit(run_command(main, "render_doom"))
