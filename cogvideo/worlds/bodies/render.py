"""Renders the bodies world: an exact ray caster for balls, boxes and cylinders on a floor, in NumPy.

Every pixel is the mean of a grid of rays (no jagged edges); bodies cast soft shadows on the floor and on each other
and darken the floor they stand on. Only the part of a frame that bodies and their shadows can reach is computed anew;
the rest is the empty room, cached while the camera stands still. The visible share of each body is returned too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cogvideo.worlds.bodies.physics import States
from cogvideo.worlds.bodies.scene import COLOURS, FLOORS, FPS, Body, Camera, Scene, Surroundings

LAMP_SPREAD = 0.045  # radians: half the lamp's angular width
SHADE_REACH = 2.2  # distance in radii up to which a body takes ambient light from the floor
FADE_METRES = (9.0, 26.0)  # distances between which the floor fades into the wall's colour
PATTERN_PIXEL = 2 / 128  # slope: pixel width for which distant patterns are softened; the same at all frame sizes
TINY = 1e-6

Box = tuple[int, int, int, int]  # first row, end row, first column, end column


@dataclass(frozen=True)
class Rendering:
    """A clip's pixels, and how much of each body they show."""

    frames: np.ndarray
    """(frames, pixels, pixels, 3) uint8."""
    visible: np.ndarray
    """(frames, bodies) share of a body's silhouette that no other body hides; 0 if none of it is inside the frame."""
    area: np.ndarray
    """(frames, bodies) area of the silhouette within the frame, hidden parts included, as a share of the frame."""


def render(scene: Scene, states: States, pixels: int, rays: int = 2) -> Rendering:
    """Draw all frames of `states`, `rays` x `rays` rays per pixel."""
    count, side = len(scene.bodies), pixels * rays
    num_frames = len(states.position)
    frames = np.empty((num_frames, pixels, pixels, 3), np.uint8)
    visible, area = np.zeros((num_frames, count)), np.zeros((num_frames, count))
    room: _Room | None = None
    for frame in range(num_frames):
        seconds = frame / FPS
        if room is None or scene.camera.radians_per_second:
            room = _Room(scene, seconds, side, rays)
        turned = [rotation_matrix(quaternion) for quaternion in states.orientation[frame]]
        frames[frame], visible[frame], area[frame] = _draw(scene, states.position[frame], turned, room)
    return Rendering(frames, visible, area)


def area_average(frames: np.ndarray, factor: int) -> np.ndarray:
    """Shrink (frames, H, W, 3) uint8 by a whole factor: each pixel becomes the rounded mean of factor x factor."""
    count, height, width, channels = frames.shape
    parts = frames.reshape(count, height // factor, factor, width // factor, factor, channels)
    total = parts.sum(axis=(2, 4), dtype=np.uint32)
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """The (3, 3) rotation from body to world coordinates, of a unit quaternion x, y, z, w."""
    x, y, z, w = (float(value) for value in quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


class _Room:
    """The empty room as the camera sees it at one moment: rays, floor points, colours. Arrays are (side, side)."""

    def __init__(self, scene: Scene, seconds: float, side: int, rays: int):
        camera = scene.camera
        self.side, self.rays, self.seconds = side, rays, seconds
        self.eye = np.array(camera.eye(seconds), np.float32)
        axes = camera.axes(seconds).astype(np.float32)
        slope = np.float32(math.tan(camera.field_of_view / 2))
        grid = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * slope
        # Directions have unit depth: points on a ray are eye + depth * direction, with depth along the camera's axis.
        self.directions = [
            axes[2, axis] + grid[None, :] * axes[0, axis] - grid[:, None] * axes[1, axis] for axis in range(3)
        ]
        down = np.minimum(self.directions[2], -TINY)
        self.floor_depth = np.where(self.directions[2] < -1e-3, -self.eye[2] / down, np.float32(1e4))
        self.floor = [self.eye[axis] + self.floor_depth * self.directions[axis] for axis in range(2)]
        self.colour = self._colour(scene.surroundings, axes)
        small = _mean_of_rays(self.colour, rays)
        self.picture = to_bytes(small)
        self._lamps = _lamps(np.array(scene.light.direction), rays)

    def lamps_at(self, rows: np.ndarray, columns: np.ndarray) -> list[np.ndarray]:
        """Directions to the lamp from the points that rays hit, by the rays' rows and columns: three arrays."""
        picked = self._lamps[rows % self.rays, columns % self.rays]
        return [np.ascontiguousarray(picked[..., axis]) for axis in range(3)]

    def _colour(self, surroundings: Surroundings, axes: np.ndarray) -> np.ndarray:
        """(3, side, side) colours without bodies: floor with its pattern, fading into a wall that is lighter below."""
        wall = np.array(surroundings.wall, np.float32)[:, None, None]
        height = np.clip(self.directions[2] * 2.2, 0, 1)  # 0 at the horizon
        behind = wall * (1.06 - 0.22 * height)
        base = np.array(FLOORS[surroundings.floor], np.float32)[:, None, None]
        x, y = (np.clip(axis, -60, 60) for axis in self.floor)
        distance = np.hypot(x - self.eye[0], y - self.eye[1])
        # Reduce the contrast where a pixel covers much of a tile: the pattern would shimmer otherwise.
        footprint = distance**2 / self.eye[2] * PATTERN_PIXEL
        contrast = np.clip(1.2 - 1.1 * footprint, 0, 1)
        tone = np.float32(1.0)
        if surroundings.pattern == "tiles":
            line = np.maximum(*(np.abs(np.mod(axis + 0.5, 1.2) - 0.6) for axis in (x, y)))
            tone = 1 - 0.16 * contrast * (line > 0.56)
        elif surroundings.pattern == "checks":
            odd = (np.floor(x / 1.0) + np.floor(y / 1.0)) % 2
            tone = 1 + 0.07 * contrast * (2 * odd - 1)
        fade = np.clip((distance - FADE_METRES[0]) / (FADE_METRES[1] - FADE_METRES[0]), 0, 1)
        fade = np.where(self.directions[2] < -1e-3, fade * fade * (3 - 2 * fade), 1)
        return (base * tone * (1 - fade) + behind * fade).astype(np.float32)


def _lamps(direction: np.ndarray, rays: int) -> np.ndarray:
    """Unit vectors to points spread over the lamp, one for each ray of a pixel: (rays, rays, 3).

    The rays of one pixel use different points of the lamp, so that their mean gives shadows soft edges.
    """
    across = np.cross(direction, (0.0, 0.0, 1.0))
    across /= np.linalg.norm(across)
    upward = np.cross(across, direction)
    steps = np.linspace(-1, 1, rays) * LAMP_SPREAD if rays > 1 else np.zeros(1)
    points = direction + steps[:, None, None] * upward + steps[None, :, None] * across
    return (points / np.linalg.norm(points, axis=-1, keepdims=True)).astype(np.float32)


def _draw(
    scene: Scene, positions: np.ndarray, turned: list[np.ndarray], room: _Room
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One frame (pixels, pixels, 3) uint8, and per body the visible share and the outline's area."""
    picture, rays = room.picture.copy(), room.rays
    light, count = scene.light, len(scene.bodies)
    body_boxes = [_body_box(scene, room, positions[index], body) for index, body in enumerate(scene.bodies)]
    floor_boxes = [_floor_box(scene, room, positions[index], body) for index, body in enumerate(scene.bodies)]
    top, bottom, left, right = _around([*body_boxes, *floor_boxes], rays)
    visible, area = np.zeros(count), np.zeros(count)
    if top >= bottom or left >= right:
        return picture, visible, area

    # The floor, without the lamp in shadows and with less ambient light close to bodies.
    colour = room.colour[:, top:bottom, left:right].copy()
    for body, position, rotation, (r0, r1, c0, c1) in zip(scene.bodies, positions, turned, floor_boxes, strict=True):
        if r0 >= r1 or c0 >= c1:
            continue
        floor = [axis[r0:r1, c0:c1] for axis in room.floor]
        lamps = room.lamps_at(np.arange(r0, r1)[:, None], np.arange(c0, c1)[None, :])
        lit = ~_blocked(body, position, rotation, [*floor, np.zeros_like(floor[0])], lamps)
        ambient = 1 - _near_shade(body, position, floor)
        on_floor = room.floor_depth[r0:r1, c0:c1] < 1e3
        share = (light.ambient * ambient + light.diffuse * light.direction[2] * lit) / (
            light.ambient + light.diffuse * light.direction[2]
        )
        colour[:, r0 - top : r1 - top, c0 - left : c1 - left] *= np.where(on_floor, share, 1)

    depth = np.full(colour.shape[1:], np.inf, np.float32)
    owner = np.full(colour.shape[1:], -1, np.int8)
    outline = np.zeros(count)
    for index, (r0, r1, c0, c1) in enumerate(body_boxes):
        if r0 >= r1 or c0 >= c1:
            continue
        directions = [axis[r0:r1, c0:c1] for axis in room.directions]
        body, position, rotation = scene.bodies[index], positions[index], turned[index]
        reach, normal = _intersect(body, position, rotation, room.eye, directions)
        outline[index] = np.isfinite(reach).sum()
        place = np.s_[r0 - top : r1 - top, c0 - left : c1 - left]
        nearer = reach < depth[place]
        if not nearer.any():
            continue
        rows, columns = np.nonzero(nearer)
        shade = _shade(
            *(scene, positions, turned, room, index),
            reach=reach[nearer],
            normal=[axis[nearer] for axis in normal],
            directions=[axis[nearer] for axis in directions],
            lamps=room.lamps_at(rows + r0, columns + c0),
        )
        colour[(slice(None), *place)][:, nearer] = shade
        depth[place] = np.where(nearer, reach, depth[place])
        owner[place] = np.where(nearer, index, owner[place])
    seen = np.bincount(owner.ravel() + 1, minlength=count + 1)[1:]
    visible = np.where(outline > 0, seen / np.maximum(outline, 1), 0.0)

    small = _mean_of_rays(colour, rays)
    picture[top // rays : bottom // rays, left // rays : right // rays] = to_bytes(small)
    return picture, visible, outline / room.side**2


def _shade(
    scene: Scene,
    positions: np.ndarray,
    turned: list[np.ndarray],
    room: _Room,
    index: int,
    *,
    reach: np.ndarray,
    normal: list[np.ndarray],
    directions: list[np.ndarray],
    lamps: list[np.ndarray],
) -> np.ndarray:
    """Colours (3, points) of points on a body: ambient light, the lamp unless it is hidden, and a faint highlight."""
    points = [room.eye[axis] + reach * directions[axis] for axis in range(3)]
    facing = sum(normal[axis] * lamps[axis] for axis in range(3))
    lit = np.maximum(facing, 0)
    for other, body in enumerate(scene.bodies):
        if other != index:
            lit = lit * ~_blocked(body, positions[other], turned[other], points, lamps)
    # Ambient light comes from all sides, less from below and close to the floor.
    ambient = (0.9 + 0.1 * normal[2]) * np.clip(0.84 + 0.5 * points[2], 0, 1)
    albedo = np.array(COLOURS[scene.bodies[index].colour], np.float32)[:, None]
    length = np.sqrt(sum(axis * axis for axis in directions))
    half = [lamps[axis] - directions[axis] / length for axis in range(3)]
    size = np.sqrt(sum(axis * axis for axis in half))
    gloss = np.maximum(sum(normal[axis] * half[axis] for axis in range(3)) / np.maximum(size, TINY), 0) ** 40
    light = scene.light
    return (albedo * (light.ambient * ambient + light.diffuse * lit) + 0.16 * gloss * (lit > 0)).astype(np.float32)


def _intersect(
    body: Body,
    position: np.ndarray,
    rotation: np.ndarray,
    origin: np.ndarray | list[np.ndarray],
    directions: list[np.ndarray],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Where rays enter a body: depth along each (inf where they miss) and the outward normal there.

    `directions` are three arrays of one shape; `origin` three numbers or three arrays.
    """
    rotation = rotation.astype(np.float32)
    offset = [origin[axis] - np.float32(position[axis]) for axis in range(3)]
    o = [sum(rotation[axis, own] * offset[axis] for axis in range(3)) for own in range(3)]
    d = [sum(rotation[axis, own] * directions[axis] for axis in range(3)) for own in range(3)]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if body.shape == "ball":
            reach = _enter_round(o, d, body.size[0], axes=3)
            own = [o[axis] + reach * d[axis] for axis in range(3)]
        elif body.shape == "box":
            reach, own = _enter_slabs(o, d, body.size)
        else:
            reach, own = _enter_cylinder(o, d, body.size[0], body.size[2])
        length = np.sqrt(sum(axis * axis for axis in own))
        normal = [sum(rotation[axis, k] * own[k] for k in range(3)) / np.maximum(length, TINY) for axis in range(3)]
    return reach, normal


def _enter_round(o: list[np.ndarray], d: list[np.ndarray], radius: float, axes: int) -> np.ndarray:
    """Depth at which rays enter a ball (3 axes) or an infinite cylinder along z (2); inf where they miss."""
    a = sum(d[axis] * d[axis] for axis in range(axes))
    b = sum(d[axis] * o[axis] for axis in range(axes))
    c = sum(o[axis] * o[axis] for axis in range(axes)) - radius * radius
    inside = b * b - a * c
    reach = (-b - np.sqrt(np.maximum(inside, 0))) / np.maximum(a, TINY * TINY)
    return np.where((inside > 0) & (reach > 0), reach, np.float32(np.inf))


def _enter_slabs(
    o: list[np.ndarray], d: list[np.ndarray], size: tuple[float, float, float]
) -> tuple[np.ndarray, list[np.ndarray]]:
    near, far = np.array(-np.inf, np.float32), np.array(np.inf, np.float32)
    entries: list[np.ndarray] = []
    for axis in range(3):
        safe = np.where(np.abs(d[axis]) < TINY, np.float32(TINY), d[axis])
        one, two = (-size[axis] - o[axis]) / safe, (size[axis] - o[axis]) / safe
        entries.append(np.minimum(one, two))
        near, far = np.maximum(near, entries[-1]), np.minimum(far, np.maximum(one, two))
    hit = (near < far) & (near > 0)
    normal = [np.where(entries[axis] == near, -np.sign(d[axis]), np.float32(0)) for axis in range(3)]
    return np.where(hit, near, np.float32(np.inf)), normal


def _enter_cylinder(
    o: list[np.ndarray], d: list[np.ndarray], radius: float, half: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    side = _enter_round(o, d, radius, axes=2)
    height = o[2] + side * d[2]
    side = np.where(np.abs(height) <= half, side, np.float32(np.inf))
    safe = np.where(np.abs(d[2]) < TINY, np.float32(TINY), d[2])
    cap = (-np.sign(safe) * half - o[2]) / safe
    on_cap = (o[0] + cap * d[0]) ** 2 + (o[1] + cap * d[1]) ** 2 <= radius * radius
    cap = np.where(on_cap & (cap > 0), cap, np.float32(np.inf))
    reach = np.minimum(side, cap)
    round_part = side <= cap
    normal = [
        np.where(round_part, o[0] + side * d[0], np.float32(0)),
        np.where(round_part, o[1] + side * d[1], np.float32(0)),
        np.where(round_part, np.float32(0), -np.sign(safe)),
    ]
    return reach, normal


def _blocked(
    body: Body, position: np.ndarray, rotation: np.ndarray, points: list[np.ndarray], lamps: list[np.ndarray]
) -> np.ndarray:
    """Whether a body stands between points and the lamp: bool of the points' shape."""
    # Start a little off, so that a body does not shadow a point that lies on its face, as where bodies touch.
    origin = [points[axis] + np.float32(2e-3) * lamps[axis] for axis in range(3)]
    return np.isfinite(_intersect(body, position, rotation, origin, lamps)[0])


def _near_shade(body: Body, position: np.ndarray, floor: list[np.ndarray]) -> np.ndarray:
    """Share of ambient light that a body takes from floor points near it, approximated by a ball of `_half_width`."""
    radius = _half_width(body)
    squared = (floor[0] - np.float32(position[0])) ** 2 + (floor[1] - np.float32(position[1])) ** 2
    height = np.float32(position[2])
    distance = np.sqrt(squared + height * height)
    within = np.clip(1 - np.sqrt(squared) / np.float32(SHADE_REACH * radius), 0, 1)
    return 0.75 * within * height / distance * np.minimum(radius * radius / (distance * distance), 1)


def _half_width(body: Body) -> float:
    """Radius of a ball that takes about as much ambient light as the body."""
    return body.size[0] if not body.tall else 1.2 * body.size[0]


def _bounding_radius(body: Body) -> float:
    if body.shape == "ball":
        return body.size[0]
    if body.shape == "box":
        return math.hypot(*body.size)
    return math.hypot(body.size[0], body.size[2])


def _body_box(scene: Scene, room: _Room, position: np.ndarray, body: Body) -> Box:
    radius = _bounding_radius(body)
    corners = position + radius * _CORNERS
    return _screen_box(scene.camera, room, corners)


def _floor_box(scene: Scene, room: _Room, position: np.ndarray, body: Body) -> Box:
    """The part of the frame that a body's shadow and its shade on the floor can reach."""
    radius, light = _bounding_radius(body), np.array(scene.light.direction)
    corners = position + radius * _CORNERS
    spread = 1 + 3 * LAMP_SPREAD
    shadow = corners - (np.maximum(corners[:, 2:], 0) / light[2]) * light
    middle = shadow.mean(axis=0)
    shadow = middle + (shadow - middle) * spread
    reach = SHADE_REACH * _half_width(body)
    around = np.array([position[0], position[1], 0]) + reach * np.array(
        [[1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]]
    )
    points = np.concatenate([shadow, around])
    points[:, 2] = 0
    return _screen_box(scene.camera, room, points)


_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)


def _screen_box(camera: Camera, room: _Room, points: np.ndarray) -> Box:
    """Rows and columns that contain the projected points, clipped to the frame and widened to whole pixels."""
    projected = camera.project(points, room.seconds, room.side)
    if projected[:, 2].min() < 0.1:
        return 0, room.side, 0, room.side
    low, high = projected[:, :2].min(axis=0), projected[:, :2].max(axis=0)
    low = np.clip(np.floor(low / room.rays) * room.rays, 0, room.side).astype(int)
    high = np.clip(np.ceil(high / room.rays) * room.rays, 0, room.side).astype(int)
    return int(low[1]), int(high[1]), int(low[0]), int(high[0])


def _around(boxes: list[Box], rays: int) -> Box:
    held = [box for box in boxes if box[0] < box[1] and box[2] < box[3]]
    if not held:
        return 0, 0, 0, 0
    return min(b[0] for b in held), max(b[1] for b in held), min(b[2] for b in held), max(b[3] for b in held)


def _mean_of_rays(colour: np.ndarray, rays: int) -> np.ndarray:
    """(3, H * rays, W * rays) -> (3, H, W): the mean of each pixel's rays."""
    total = np.zeros((), np.float32)
    for i in range(rays):
        for j in range(rays):
            total = total + colour[:, i::rays, j::rays]
    return total / np.float32(rays * rays)


def to_bytes(colour: np.ndarray) -> np.ndarray:
    """(3, H, W) floats of 0..1 -> (H, W, 3) uint8."""
    return np.rint(np.clip(colour, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
