"""The contents of a clip of the bodies world: an event, bodies and how they start, camera, light, floor and wall.

A `Scene` is a value. `random_scenes.py` draws one, `physics.py` simulates it, `render.py` turns it into pixels and
`captions.py` into words. Lengths are in metres; x points to the viewer's right, y away from the viewer, z up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

Shape = Literal["ball", "box", "cylinder"]
Event = Literal["roll", "behind", "front", "into", "knock", "fall", "onto", "bounce", "topple", "circle"]
Split = Literal["train", "test", "unseen"]
Direction = Literal["left", "right"]
Speed = Literal["slowly", "quickly"]
Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]

FPS = 8
NUM_FRAMES = 33
SECONDS = (NUM_FRAMES - 1) / FPS
REFERENCE_PIXELS = 64
"""Side of the frames that speeds and sizes in pixels refer to."""
GRAVITY = 6.0
"""m/s^2. Less than on Earth: a fall of 2 m takes 0.8 s, seven frames."""
ROLL_PX_PER_SECOND: dict[str, float] = {"slowly": 6.0, "quickly": 12.0}
"""On a frame of REFERENCE_PIXELS: 24 and 48 pixels in a whole clip."""
CIRCLE_RADIANS_PER_SECOND: dict[str, float] = {"slowly": 0.25, "quickly": 0.6}

COLOURS: dict[str, Vector] = {
    "red": (0.86, 0.12, 0.11),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.13, 0.33, 0.92),
    "yellow": (0.96, 0.80, 0.08),
    "purple": (0.60, 0.18, 0.78),
    "white": (0.97, 0.97, 0.97),
}
SHAPES: tuple[Shape, ...] = ("ball", "box", "cylinder")
EVENTS: tuple[Event, ...] = (
    "roll",
    "behind",
    "front",
    "into",
    "knock",
    "fall",
    "onto",
    "bounce",
    "topple",
    "circle",
)
ROLLING: tuple[Event, ...] = ("roll", "behind", "front", "into", "knock")
"""The events in which a ball rolls."""
STREAMS: dict[str, int] = {"train": 0, "test": 1, "unseen": 2}

FLOORS: dict[str, Vector] = {
    "grey": (0.45, 0.46, 0.47),
    "slate": (0.37, 0.40, 0.44),
    "sand": (0.49, 0.45, 0.39),
    "clay": (0.44, 0.39, 0.36),
    "moss": (0.40, 0.43, 0.38),
}
"""Darker and duller than any body, so that every body stands out."""
PATTERNS = ("plain", "tiles", "checks")
WALLS: tuple[Vector, ...] = ((0.46, 0.50, 0.55), (0.42, 0.46, 0.52), (0.50, 0.49, 0.47), (0.38, 0.40, 0.44))


@dataclass(frozen=True)
class Body:
    """A body, and its state at the start of the clip."""

    shape: Shape
    colour: str
    """A key of COLOURS; no two bodies of a scene share one."""
    size: Vector
    """Half extents in metres: (radius, radius, radius) of a ball, (radius, radius, half the height) of a cylinder."""
    position: Vector
    orientation: Quaternion = (0.0, 0.0, 0.0, 1.0)
    """x, y, z, w."""
    velocity: Vector = (0.0, 0.0, 0.0)
    spin: Vector = (0.0, 0.0, 0.0)
    """Angular velocity, radians per second about the world's axes."""
    mass: float = 1.0
    friction: float = 0.8
    restitution: float = 0.2

    @property
    def tall(self) -> bool:
        """Whether it is a tower, which captions call tall."""
        return self.shape != "ball" and self.size[2] > 2 * self.size[0]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on a circle around the vertical axis through (shift, 0)."""

    distance: float
    """Horizontal distance from the axis in metres."""
    height: float
    target_height: float
    shift: float
    angle: float
    """Radians at the first frame: 0 is at negative y, looking along y; positive is to the viewer's right."""
    radians_per_second: float
    field_of_view: float = math.radians(42)

    def eye(self, seconds: float) -> Vector:
        angle = self.angle + self.radians_per_second * seconds
        return self.shift + self.distance * math.sin(angle), -self.distance * math.cos(angle), self.height

    @property
    def target(self) -> Vector:
        return self.shift, 0.0, self.target_height

    def axes(self, seconds: float) -> np.ndarray:
        """Unit vectors to the right, up and forward: (3, 3), rows."""
        return _camera_axes(self, seconds)

    def project(self, points: np.ndarray, seconds: float, pixels: int = REFERENCE_PIXELS) -> np.ndarray:
        """Project points onto a frame of this side: (..., 3) metres -> (..., 3): x, y in pixels and depth in metres."""
        local = (np.asarray(points, float) - self.eye(seconds)) @ self.axes(seconds).T
        focal = pixels / (2 * math.tan(self.field_of_view / 2))
        x = pixels / 2 + focal * local[..., 0] / local[..., 2]
        y = pixels / 2 - focal * local[..., 1] / local[..., 2]
        return np.stack([x, y, local[..., 2]], axis=-1)

    def metres_per_pixel(self, point: Vector) -> float:
        """Metres per pixel of a frame of REFERENCE_PIXELS, sideways, at a point in the first frame."""
        return float(self.project(np.array(point), 0.0)[2]) * 2 * math.tan(self.field_of_view / 2) / REFERENCE_PIXELS


@lru_cache(maxsize=256)
def _camera_axes(camera: Camera, seconds: float) -> np.ndarray:
    forward = np.subtract(camera.target, camera.eye(seconds))
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(right, forward), forward])
    axes.setflags(write=False)  # shared by all callers
    return axes


@dataclass(frozen=True)
class Light:
    """A distant lamp."""

    direction: Vector
    """Unit vector towards it."""
    ambient: float
    diffuse: float


@dataclass(frozen=True)
class Surroundings:
    """Floor and wall."""

    floor: str
    """A key of FLOORS."""
    pattern: str
    """One of PATTERNS."""
    wall: Vector


@dataclass(frozen=True)
class Scene:
    """A clip before it is simulated."""

    event: Event
    bodies: tuple[Body, ...]
    """The acting body, then the one it meets, if any, then bystanders."""
    direction: Direction | None
    """Of rolling, toppling, or the camera's own motion."""
    speed: Speed | None
    """Of rolling or of the camera."""
    camera: Camera
    light: Light
    surroundings: Surroundings

    @property
    def partner(self) -> Body | None:
        """The body that the first one passes, meets or lands on."""
        return self.bodies[1] if self.event in ("behind", "front", "into", "knock", "onto") else None

    @property
    def bystanders(self) -> tuple[Body, ...]:
        """Bodies that take no part."""
        if self.event == "circle":
            return ()
        return self.bodies[2:] if self.partner else self.bodies[1:]


def is_held_out(event: Event, role: int, colour: str, shape: Shape) -> bool:
    """Whether a body in this role of an event is held out for testing: no training clip has it.

    The rule: colours and shapes are numbered as in COLOURS and SHAPES, events as in EVENTS; the acting body has role 0,
    all others 1; a body is held out if colour + 2 * shape + event + 3 * role is a multiple of 6. So each event holds
    out one of six colours for each shape and role: in training no green ball acts in "fall", but some do in "bounce".
    """
    numbers = list(COLOURS).index(colour) + 2 * SHAPES.index(shape) + EVENTS.index(event) + 3 * role
    return numbers % len(COLOURS) == 0


def held_out_bodies(scene: Scene) -> tuple[int, ...]:
    """Indices of the bodies whose combination of event, role, colour and shape does not occur in training."""
    return tuple(
        index
        for index, body in enumerate(scene.bodies)
        if is_held_out(scene.event, min(index, 1), body.colour, body.shape)
    )
