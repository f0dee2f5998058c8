"""Draws random scenes of the bodies world from (seed, split, index).

Everything that moves is in view in the first frame, which shows what is about to happen: a body that falls hangs in
the air, one that topples leans, a ball that rolls behind a box starts beside it. Rolling speeds are set in pixels per
second on the screen and stay constant until a contact. Sizes and distances are chosen so that bodies stay in view and
apart at 64 pixels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from cogvideo.worlds.bodies.scene import (
    CIRCLE_RADIANS_PER_SECOND,
    COLOURS,
    EVENTS,
    FLOORS,
    PATTERNS,
    REFERENCE_PIXELS,
    ROLL_PX_PER_SECOND,
    ROLLING,
    SECONDS,
    SHAPES,
    STREAMS,
    WALLS,
    Body,
    Camera,
    Direction,
    Event,
    Light,
    Quaternion,
    Scene,
    Shape,
    Speed,
    Split,
    Surroundings,
    held_out_bodies,
)


def draw_scene(seed: int, split: Split, index: int) -> Scene:
    """Draw scene `index` of a split; the same arguments give the same scene.

    train and test contain no held-out combinations and differ in their streams of random numbers; each scene of unseen
    has at least one held-out combination. Raises: ValueError for an unknown split or a negative number.
    """
    if split not in STREAMS:
        raise ValueError(f"split={split!r} is not a split of the bodies world; choose one of {', '.join(STREAMS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed}, index={index}: expected numbers of 0 or more")
    rng = np.random.default_rng([seed, STREAMS[split], index])
    while True:
        scene = _draw(rng)
        if bool(held_out_bodies(scene)) == (split == "unseen"):
            return scene


def _draw(rng: np.random.Generator) -> Scene:
    event: Event = EVENTS[rng.choice(len(EVENTS), p=_event_weights())]
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    direction: Direction = "left" if rng.random() < 0.5 else "right"
    speed: Speed = "slowly" if rng.random() < 0.5 else "quickly"
    camera = _draw_camera(rng, event, direction, speed)
    bodies = _DRAW[event](rng, camera, colours, event, direction, speed)
    azimuth, elevation = rng.uniform(-1.1, 1.1), rng.uniform(0.8, 1.15)
    towards = (
        math.sin(azimuth) * math.cos(elevation),
        -math.cos(azimuth) * math.cos(elevation),
        math.sin(elevation),
    )
    strength = rng.uniform(0.94, 1.06)
    floors = list(FLOORS)
    moves = event == "circle"  # plain floors do not show that the camera moves
    return Scene(
        event=event,
        bodies=bodies,
        direction=direction if event in (*ROLLING, "topple", "circle") else None,
        speed=speed if event in (*ROLLING, "circle") else None,
        camera=camera,
        light=Light(towards, 0.66 * strength, 0.42 * strength),
        surroundings=Surroundings(
            floor=floors[rng.integers(len(floors))],
            pattern=PATTERNS[rng.integers(1 if moves else 0, len(PATTERNS))],
            wall=WALLS[rng.integers(len(WALLS))],
        ),
    )


def _event_weights() -> list[float]:
    """Probabilities of EVENTS: rolling, which has directions, speeds and partners to learn, is more frequent."""
    weights = [1.5 if event in ROLLING else 1.0 for event in EVENTS]
    return [weight / sum(weights) for weight in weights]


def _draw_camera(rng: np.random.Generator, event: Event, direction: Direction, speed: Speed) -> Camera:
    circles = event == "circle"
    rate = CIRCLE_RADIANS_PER_SECOND[speed] * (1 if direction == "right" else -1) if circles else 0.0
    return Camera(
        distance=rng.uniform(6.9, 7.3),
        height=rng.uniform(2.9, 3.3) if circles else rng.uniform(2.2, 2.6),
        target_height=rng.uniform(0.7, 0.8) if circles else rng.uniform(1.15, 1.25),
        shift=0.0 if circles else rng.uniform(-0.15, 0.15),
        angle=rng.uniform(-math.pi, math.pi) if circles else 0.0,
        radians_per_second=rate,
    )


def _yaw(angle: float) -> Quaternion:
    return 0.0, 0.0, math.sin(angle / 2), math.cos(angle / 2)


def _standing(
    rng: np.random.Generator, shape: Shape, colour: str, x: float, y: float, half: float, turn: float = 0.35
) -> Body:
    """A heavy body at rest on the floor, turned a little about its vertical axis."""
    return Body(shape, colour, (half, half, half), (x, y, half), _yaw(rng.uniform(-turn, turn)), mass=5.0)


def _shape(rng: np.random.Generator, *shapes: Shape) -> Shape:
    return shapes[rng.integers(len(shapes))]


def _rolling_ball(
    camera: Camera, colour: str, radius: float, x_px: float, y: float, sign: int, speed: str, mass: float = 1.0
) -> Body:
    """A ball on the floor that rolls without slipping; `x_px` is its horizontal position on the screen."""
    scale = camera.metres_per_pixel((0.0, y, radius))
    x = camera.shift + (x_px - REFERENCE_PIXELS / 2) * scale
    velocity = sign * ROLL_PX_PER_SECOND[speed] * scale
    return Body(
        *("ball", colour, (radius,) * 3, (x, y, radius)),
        velocity=(velocity, 0.0, 0.0),
        spin=(0.0, velocity / radius, 0.0),
        mass=mass,
    )


def _start_px(rng: np.random.Generator, sign: int, travel: float, radius_px: float) -> float:
    """A start, in pixels, from which a ball that travels this far stays in view."""
    low, high = radius_px + 1, REFERENCE_PIXELS - radius_px - 1
    start = rng.uniform(low, max(low, high - travel))
    return float(start if sign > 0 else REFERENCE_PIXELS - start)


def _draw_roll(
    rng: np.random.Generator, camera: Camera, colours: list[str], event: Event, direction: Direction, speed: Speed
) -> tuple[Body, ...]:
    sign, radius, y = (1 if direction == "right" else -1), rng.uniform(0.44, 0.52), rng.uniform(-0.4, 0.4)
    radius_px = radius / camera.metres_per_pixel((0.0, y, radius))
    start = _start_px(rng, sign, ROLL_PX_PER_SECOND[speed] * SECONDS, radius_px)
    return (_rolling_ball(camera, colours[0], radius, start, y, sign, speed),)


def _draw_pass(
    rng: np.random.Generator, camera: Camera, colours: list[str], event: Event, direction: Direction, speed: Speed
) -> tuple[Body, ...]:
    """A ball that passes behind or in front of a standing body and comes out on its other side."""
    sign, rate = (1 if direction == "right" else -1), ROLL_PX_PER_SECOND[speed]
    shape = _shape(rng, "box", "cylinder")
    half = rng.uniform(0.46, 0.50)
    if event == "behind":
        radius, y, partner_y = rng.uniform(0.34, 0.37), rng.uniform(0.95, 1.05), rng.uniform(-0.1, 0.0)
    else:
        radius, y, partner_y = rng.uniform(0.32, 0.35), rng.uniform(-0.85, -0.75), rng.uniform(0.3, 0.4)
    passes = rng.uniform(1.95, 2.05) if speed == "slowly" else rng.uniform(1.75, 2.25)  # when it passes, in seconds
    middle = REFERENCE_PIXELS / 2 + rng.uniform(-2, 2) * (1 if speed == "quickly" else 4)
    start = middle - sign * rate * passes
    edge = radius / camera.metres_per_pixel((0.0, y, radius)) + 1
    start = float(np.clip(start, edge, REFERENCE_PIXELS - edge))
    ball = _rolling_ball(camera, colours[0], radius, start, y, sign, speed)
    x = camera.shift + (middle - REFERENCE_PIXELS / 2) * camera.metres_per_pixel((0.0, partner_y, half))
    return ball, _standing(rng, shape, colours[1], x, partner_y, half, turn=0.2)


def _draw_hit(
    rng: np.random.Generator, camera: Camera, colours: list[str], event: Event, direction: Direction, speed: Speed
) -> tuple[Body, ...]:
    """A ball that rolls into a body, which slides or rolls away, or into a tower, which falls over."""
    sign, rate = (1 if direction == "right" else -1), ROLL_PX_PER_SECOND[speed]
    seconds = rng.uniform(1.1, 1.5) if speed == "slowly" else rng.uniform(0.9, 1.3)
    radius, y = rng.uniform(0.44, 0.50), rng.uniform(-0.2, 0.2)
    scale = camera.metres_per_pixel((0.0, y, radius))
    if event == "knock":
        shape = _shape(rng, "box", "cylinder")
        half = rng.uniform(0.22, 0.24) if speed == "slowly" else rng.uniform(0.26, 0.29)  # slow: only slim towers tip
        size = (half, half, rng.uniform(0.72, 0.78))
    else:
        shape, half = _shape(rng, *SHAPES), rng.uniform(0.44, 0.50)
        size = (half, half, half)
    gap_px = rate * seconds + (radius + size[0]) / scale
    room = REFERENCE_PIXELS - gap_px - 2 * (radius / scale + 1)
    start = radius / scale + 1 + rng.uniform(0.0, max(0.0, min(room - 24, 10)))
    start = start if sign > 0 else REFERENCE_PIXELS - start
    mass = 1.0 if shape == "ball" else 4.0  # two balls weigh the same, as in billiards; else the ball keeps pushing
    ball = _rolling_ball(camera, colours[0], radius, start, y, sign, speed, mass)
    x = ball.position[0] + sign * gap_px * scale
    turn = _yaw(rng.uniform(-0.1, 0.1)) if shape == "box" else (0.0, 0.0, 0.0, 1.0)
    if event == "knock":
        target = Body(shape, colours[1], size, (x, y, size[2]), turn, mass=0.5, friction=1.2)
    elif shape == "ball":
        target = Body(shape, colours[1], size, (x, y, size[2]), turn, mass=1.0, friction=0.3, restitution=0.95)
    else:
        target = Body(
            shape, colours[1], size, (x, y, size[2]), turn, mass=0.4, friction=0.15 if speed == "slowly" else 0.5
        )
    if event == "knock":
        ball = replace(ball, friction=0.1)  # otherwise the tower would slow its rolling
    elif shape == "ball":
        ball = replace(ball, friction=0.3, restitution=0.95)
    return ball, target


def _draw_fall(
    rng: np.random.Generator, camera: Camera, colours: list[str], event: Event, direction: Direction, speed: Speed
) -> tuple[Body, ...]:
    """A body in the air, above the floor or above a standing body; sometimes another stands beside it."""
    y = rng.uniform(-0.15, 0.15)
    beside = rng.random() < (0.35 if event == "onto" else 0.5)
    side = -1 if rng.random() < 0.5 else 1
    x = -side * rng.uniform(0.8, 1.05) if beside else rng.uniform(-1.1, 1.1)
    half, bodies = rng.uniform(0.46, 0.54), []
    if event == "onto":
        support = _standing(rng, _shape(rng, "box", "cylinder"), colours[1], x, y, rng.uniform(0.52, 0.58), 0.3)
        bodies.append(support)
        bottom, x = 2 * support.size[2] + rng.uniform(1.2, 1.45), x + rng.uniform(-0.06, 0.06)
    else:
        bottom = rng.uniform(1.5, 2.1)
    shape = _shape(rng, *SHAPES) if event != "bounce" else "ball"
    turn = _yaw(rng.uniform(-0.35, 0.35)) if shape == "box" else (0.0, 0.0, 0.0, 1.0)
    restitution = 0.95 if event == "bounce" else 0.25 if shape == "ball" else 0.0
    bodies.insert(
        0, Body(shape, colours[0], (half,) * 3, (x, y, bottom + half), turn, mass=1.0, restitution=restitution)
    )
    if beside:
        other_x = side * rng.uniform(0.9, 1.2)
        bodies.append(_standing(rng, _shape(rng, *SHAPES), colours[2], other_x, y, rng.uniform(0.44, 0.50)))
    return tuple(bodies)


def _draw_topple(
    rng: np.random.Generator, camera: Camera, colours: list[str], event: Event, direction: Direction, speed: Speed
) -> tuple[Body, ...]:
    """A tower that leans on its lower edge, past the point of balance, towards the side it falls to."""
    sign, shape, lean = (1 if direction == "right" else -1), _shape(rng, "box", "cylinder"), rng.uniform(0.50, 0.56)
    half, tall = rng.uniform(0.26, 0.29), rng.uniform(0.72, 0.78)
    x, y = -sign * rng.uniform(0.2, 0.8), rng.uniform(-0.2, 0.2)
    beside = rng.random() < 0.4
    centre = (x + sign * (tall * math.sin(lean) - half * math.cos(lean)), y)
    height = tall * math.cos(lean) + half * math.sin(lean)
    tower = Body(
        *(shape, colours[0], (half, half, tall), (*centre, height)),
        orientation=(0.0, math.sin(sign * lean / 2), 0.0, math.cos(lean / 2)),
        spin=(0.0, sign * 0.8, 0.0),
        friction=1.2,
        restitution=0.05,
    )
    if not beside:
        return (tower,)
    other = _standing(
        rng, _shape(rng, *SHAPES), colours[1], x - sign * rng.uniform(1.25, 1.5), y, rng.uniform(0.38, 0.44)
    )
    return tower, other


def _draw_circle(
    rng: np.random.Generator, camera: Camera, colours: list[str], event: Event, direction: Direction, speed: Speed
) -> tuple[Body, ...]:
    """Two or three bodies around the camera's axis, apart from each other in the first frame."""
    count, turn = (3 if rng.random() < 0.5 else 2), math.pi * float(rng.integers(2))
    bearing = camera.angle + turn + (rng.uniform(-0.35, 0.35) if count == 2 else math.pi / 2 + rng.uniform(-0.12, 0.12))
    radius = rng.uniform(0.95, 1.1) if count == 2 else rng.uniform(1.35, 1.45)
    bodies = []
    for number in range(count):
        angle = bearing + 2 * math.pi * number / count
        x, y = radius * math.cos(angle), radius * math.sin(angle)
        bodies.append(_standing(rng, _shape(rng, *SHAPES), colours[number], x, y, rng.uniform(0.50, 0.56), math.pi))
    return tuple(bodies)


_DRAW = {
    "roll": _draw_roll,
    "behind": _draw_pass,
    "front": _draw_pass,
    "into": _draw_hit,
    "knock": _draw_hit,
    "fall": _draw_fall,
    "onto": _draw_fall,
    "bounce": _draw_fall,
    "topple": _draw_topple,
    "circle": _draw_circle,
}
