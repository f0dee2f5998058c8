"""Compares what a clip of bodies shows with what its caption says: positions, speeds, contacts, falls, occlusion.

`probes.py` turns these measurements into results. Inputs are the bodies' tracks and the caption's facts; only
shapes are read from the frames themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cogvideo.worlds.bodies.appearance import recognise_shape
from cogvideo.worlds.bodies.scene import (
    CIRCLE_RADIANS_PER_SECOND,
    GRAVITY,
    REFERENCE_PIXELS,
    ROLL_PX_PER_SECOND,
    SHAPES,
    Camera,
    Direction,
    Event,
    Scene,
    Speed,
)
from cogvideo.worlds.bodies.tracking import COLOUR_NAMES, Track

MOVED_PX = 2.0
"""Pixels that a body must visibly move to count as moving."""
LEAST_STEP_PX = 0.5
"""Pixels that a motion must cover to have a direction."""
LEAST_RATE = 0.06
"""Radians per second that a camera must turn to have a direction."""
STILL_PX = 1.0
"""Pixels that a standing body's centre may stray."""
NEAR_PX = 1.5
"""Gap in pixels between two bodies' boxes up to which one may hide or touch the other."""
HIDDEN_SHARE = 0.8
"""Share of its usual area below which a body counts as partly hidden."""
GONE_SHARE = 0.35
ON_TIME = 0.2
"""Largest relative difference between a ball's mean speed across its occlusion and its speed before it."""
SPEED_TOLERANCE = 0.15
OTHER_AREA = 20
"""Pixels from which a colour that the caption does not name counts as a body: half of the smallest ball."""
FINE_SECONDS = 0.13
"""Longest time between frames at which a fall can be followed."""
PARABOLA_METRES = 0.12
"""How far a falling body may be from the parabola fitted to the frames before."""
NOMINAL_CAMERA = Camera(7.1, 2.4, 1.2, 0.0, 0.0, 0.0)
NOMINAL_CIRCLE = Camera(7.1, 3.1, 0.75, 0.0, 0.0, 0.0)
"""The middle of the ranges from which cameras are drawn; probes are not given a clip's own camera."""
CENTRE_HEIGHT = 0.5
"""Approximate height in metres of a standing body's centre above the floor."""


@dataclass(frozen=True)
class Facts:
    """What a caption says; nothing else of a scene is used here."""

    event: Event
    colours: tuple[str, ...]
    """The acting body first, then its partner, if any, then bystanders."""
    shapes: tuple[str, ...]
    direction: Direction | None
    speed: Speed | None

    @classmethod
    def from_scene(cls, scene: Scene) -> Facts:
        return cls(
            scene.event,
            tuple(body.colour for body in scene.bodies),
            tuple(body.shape for body in scene.bodies),
            scene.direction,
            scene.speed,
        )

    @property
    def movers(self) -> tuple[int, ...]:
        """Indices of the bodies that should move; none if the camera moves."""
        return {"circle": (), "into": (0, 1), "knock": (0, 1)}.get(self.event, (0,))

    @property
    def sign(self) -> int:
        return -1 if self.direction == "left" else 1


class ClipMeasurements:
    """A clip's track, reduced to the bodies that the caption names: arrays are over (frames, bodies)."""

    def __init__(self, found: Track, facts: Facts, times: np.ndarray):
        self.found, self.facts, self.times = found, facts, times
        columns = [COLOUR_NAMES.index(colour) for colour in facts.colours]
        self.columns = columns
        self.present, self.area = found.present[:, columns], found.area[:, columns]
        self.centre, self.box = found.centroid[:, columns], found.box[:, columns]
        # A body's usual area is its area when whole; anything above it is mixed pixels of a neighbour.
        self.usual = np.quantile(self.area, 0.8, axis=0)
        share = self.area / np.maximum(self.usual, 1)
        near = self._near()
        at_edge = (np.nan_to_num(self.box[..., :2], nan=0).min(axis=-1) <= 0) | (
            np.nan_to_num(self.box[..., 2:], nan=0).max(axis=-1) >= REFERENCE_PIXELS
        )
        self.share = share
        self.clear = self.present & ~near & ~at_edge
        """Frames that show a body whole: apart from the others and from the frame's edge."""
        if facts.event == "front":  # nothing hides the ball, so its area alone tells where it is whole
            self.clear[:, 0] = self.present[:, 0] & ~at_edge[:, 0] & (share[:, 0] >= 0.9)
        self.whole = self.present & ~at_edge & (share >= HIDDEN_SHARE)
        """Frames that show most of a body."""

    def _near(self) -> np.ndarray:
        """(frames, bodies) bool: another body's box is next to it or overlaps it."""
        count = self.box.shape[1]
        near = np.zeros(self.present.shape, bool)
        for one in range(count):
            for two in range(count):
                if one != two:
                    near[:, one] |= self._gap(one, two) <= NEAR_PX
        return near

    def _gap(self, one: int, two: int) -> np.ndarray:
        """(frames,) pixels between two boxes, the larger of horizontal and vertical; inf if one is missing."""
        a, b = self.box[:, one], self.box[:, two]
        gap = np.maximum(b[:, :2] - a[:, 2:], a[:, :2] - b[:, 2:]).max(axis=-1)
        return np.where(np.isnan(gap), np.inf, gap)

    def _path(self, body: int, seen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Times (n,) and centres (n, 2) of a body in the frames `seen`, by default those in which it is clear."""
        chosen = self.clear[:, body] if seen is None else seen
        return self.times[chosen], self.centre[chosen, body]

    def _before_contact(self) -> np.ndarray:
        """(frames,) bool: the frames before the ball reaches its partner or the partner moves."""
        if self.facts.event not in ("into", "knock"):
            return np.ones(len(self.times), bool)
        reached = self._gap(0, 1) <= NEAR_PX
        seen = np.flatnonzero(self.present[:, 1])
        if len(seen):
            shift = np.linalg.norm(self.centre[:, 1] - self.centre[seen[0], 1], axis=-1)
            reached |= np.nan_to_num(shift) > STILL_PX
        return ~np.logical_or.accumulate(reached)

    def colours_right(self) -> bool:
        seen = self.found.present.mean(axis=0)
        wanted = np.zeros(len(COLOUR_NAMES), bool)
        wanted[self.columns] = True
        # A ball behind a box is hidden for a while, in a short clip perhaps in all later frames.
        least = np.where(wanted, 0.2 if self.facts.event == "behind" else 0.6, 0)
        more = (self.found.area >= OTHER_AREA).mean(axis=0)
        return bool((seen[wanted] >= least[wanted]).all() and (more[~wanted] < 0.3).all())

    def shapes_right(self, frames: np.ndarray) -> bool | None:
        """Judged on the bodies that are clear in some frame; None if there are none, False if a body is missing."""
        right = []
        for body, column in enumerate(self.columns):
            if not self.present[:, body].any():
                return False
            if self.clear[:, body].any():
                found = recognise_shape(frames, column, np.flatnonzero(self.clear[:, body]))
                right.append(SHAPES[found] == self.facts.shapes[body])
        return all(right) if right else None

    def _moved(self, body: int) -> float | None:
        """Distance in pixels of a body's later positions from its first, 80th percentile; None if seen only once.

        Where the body is not clear, for example beside another that may hide part of it, its edges away from that one
        are followed instead.
        """
        seen = np.flatnonzero(self.present[:, body])
        if len(seen) < 2:
            return None
        first, steps = seen[0], []
        for frame in seen[1:]:
            if self.clear[first, body] and self.clear[frame, body]:
                step = float(np.linalg.norm(self.centre[frame, body] - self.centre[first, body]))
            else:
                step = self._edge_step(first, frame, body)
            steps.append(step)
        return float(np.quantile(steps, 0.8))

    def _edge_step(self, first: int, frame: int, body: int) -> float:
        """Pixels that the edges away from the nearest other body move; the larger of horizontal and vertical."""
        others = [other for other in range(len(self.columns)) if other != body and self.present[frame, other]]
        here, sides = self.box[frame, body], (0, 1)
        if others:
            nearest = self.box[frame, min(others, key=lambda other: float(self._gap(body, other)[frame]))]
            sides = (
                0 if here[0] + here[2] < nearest[0] + nearest[2] else 2,
                1 if here[1] + here[3] < nearest[1] + nearest[3] else 3,
            )
        return max(abs(float(here[side] - self.box[first, body, side])) for side in sides)

    def movers_right(self) -> bool | None:
        """Judged on the bodies that are seen twice and, if they should move, have time to; False if one is missing."""
        right = []
        for body in range(len(self.columns)):
            if not self.present[:, body].any():
                return False
            moved, travel = self._moved(body), self._expected_travel(body)
            if moved is None:
                continue
            if body not in self.facts.movers:
                right.append(moved < MOVED_PX)
            elif travel >= MOVED_PX:
                right.append(moved >= min(MOVED_PX, 0.3 * travel))
        return all(right) if right else None

    def _expected_travel(self, body: int) -> float:
        """Pixels that a mover should travel: a slow ball travels 3 in half a second, what it hits less."""
        if self.facts.speed is None or self.facts.event == "circle":
            return 2 * MOVED_PX
        return ROLL_PX_PER_SECOND[self.facts.speed] * float(self.times[-1]) * (1.0 if body == 0 else 0.3)

    def direction_right(self) -> bool | None:
        if self.facts.direction is None:
            return None
        if not self._shows_motion():
            return False
        if self.facts.event == "circle":
            rate = self._camera_rate()
            return None if rate is None else rate * self.facts.sign > LEAST_RATE
        chosen = self.clear[:, 0] if self.clear[:, 0].sum() >= 2 else self.present[:, 0]
        centres = self.centre[chosen, 0]
        if len(centres) < 2:
            return None
        return bool((centres[-1, 0] - centres[0, 0]) * self.facts.sign > LEAST_STEP_PX)

    def speed_ratio(self) -> float | None:
        """None if there is no speed or too little to measure; 0 if what should move is missing."""
        speed = self.facts.speed
        if speed is None:
            return None
        if not self._shows_motion():
            return 0.0
        if self.facts.event == "circle":
            rate = self._camera_rate() if self.times[-1] >= 1.9 else None  # in shorter clips it turns too little
            return None if rate is None else abs(rate) / CIRCLE_RADIANS_PER_SECOND[speed]
        times, centres = self._path(0, self.clear[:, 0] & self._before_contact())
        if len(times) < 2 or times[-1] - times[0] < 0.3:
            return None
        slope = np.polyfit(times, centres[:, 0], 1)[0]
        return float(slope * self.facts.sign / ROLL_PX_PER_SECOND[speed])

    def _shows_motion(self) -> bool:
        """Whether the acting body ever appears or, if the camera circles, at least two bodies."""
        if self.facts.event == "circle":
            return bool(self.present.any(axis=0).sum() >= 2)
        return bool(self.present[:, 0].any())

    def _camera_rate(self) -> float | None:
        """Radians per second at which the camera circles, positive to its right.

        Relative to the camera, the positions of two bodies on the floor turn about each other as fast as it circles.
        None if no two are seen together at least twice.
        """
        rates = []
        count = len(self.columns)
        for one in range(count):
            for two in range(one + 1, count):
                chosen = self.clear[:, one] & self.clear[:, two]
                if chosen.sum() < 2:
                    chosen = self.present[:, one] & self.present[:, two]
                if chosen.sum() < 2:
                    continue
                across = _floor_places(self.centre[chosen, two]) - _floor_places(self.centre[chosen, one])
                angle = np.unwrap(np.arctan2(across[:, 1], across[:, 0]))
                rates.append((float(chosen.sum()), -float(np.polyfit(self.times[chosen], angle, 1)[0])))
        if not rates:
            return None
        weights, values = np.array(rates).T
        return float((weights * values).sum() / weights.sum())

    def depth_right(self) -> bool | None:
        if self.facts.event not in ("behind", "front"):
            return None
        if not self.present[:, :2].any(axis=0).all():
            return False
        least = self.share[:, :2].min(axis=0)
        if least.min() > HIDDEN_SHARE:
            return None if self.times[-1] < 3 else False  # a short clip may end before one hides the other
        return bool((least[0] < least[1]) == (self.facts.event == "behind"))

    def contact_right(self) -> bool | None:
        """Whether the partner moves in the ball's direction, with the ball close enough in the frame before."""
        if self.facts.event not in ("into", "knock"):
            return None
        if not self.present[:, :2].any(axis=0).all():
            return False
        seen = np.flatnonzero(self.present[:, 1])
        shift = (self.centre[seen, 1, 0] - self.centre[seen[0], 1, 0]) * self.facts.sign
        least = min(MOVED_PX, 0.5 * self._expected_travel(1))
        moved = np.flatnonzero(shift >= least)
        if not len(moved):
            return False
        first = seen[moved[0]]
        before = first - 1
        speed = ROLL_PX_PER_SECOND[self.facts.speed or "quickly"]
        gap = self._gap(0, 1)[before]
        return bool(gap <= NEAR_PX + 1.3 * speed * (self.times[first] - self.times[before]))

    def toppled(self) -> bool | None:
        if self.facts.event not in ("topple", "knock") or self.times[-1] < 2:
            return None
        body = 1 if self.facts.event == "knock" else 0
        if not self.present[-1, body] or not self.present[:, body].any():
            return False
        width = self.box[:, body, 2] - self.box[:, body, 0]
        height = self.box[:, body, 3] - self.box[:, body, 1]
        slant = width / np.maximum(height, 1)
        first = slant[np.flatnonzero(self.present[:, body])[0]]
        return bool(slant[-1] > 1.15 and slant[-1] > 1.3 * first)

    def landed(self) -> bool | None:
        """Needs a clip that outlasts the fall."""
        if self.facts.event not in ("fall", "onto") or self.times[-1] < 1.5:
            return None
        if not (self.present[0, 0] and self.present[-1, 0]):
            return False
        late = self.times >= max(1.2, self.times[-1] - 1)
        bottom = self.box[:, 0, 3]
        came_down = bottom[-1] - bottom[0] >= 6
        rests = np.nanmax(bottom[late]) - np.nanmin(bottom[late]) <= STILL_PX
        if self.facts.event == "fall":
            return bool(came_down and rests)
        if not self.present[-1, 1]:
            return False
        apart = np.abs(self.centre[-1, 0, 0] - self.centre[-1, 1, 0])
        touching = np.abs(bottom[-1] - self.box[-1, 1, 1]) <= 3
        return bool(came_down and rests and apart <= 6 and touching)

    def bounced(self) -> bool | None:
        """Needs a clip of at least 1.5 s, with frames close enough to follow a bounce."""
        if self.facts.event != "bounce" or self.times[-1] < 1.5 or self._coarse():
            return None
        if self.present[:, 0].mean() < 0.6:
            return False
        y = self.centre[self.present[:, 0], 0, 1]
        lowest = int(y.argmax())
        rises = y[lowest:].max() - y[lowest:].min()
        return bool(y[: lowest + 1].max() - y[: lowest + 1].min() >= MOVED_PX and rises >= MOVED_PX)

    def _coarse(self) -> bool:
        return float(np.diff(self.times).max()) > FINE_SECONDS

    def gravity_ratio(self) -> float | None:
        """Acceleration of a falling body divided by GRAVITY; 0 if the body is missing, None if no fall can be measured.

        Heights are those that the nominal camera implies for a body straight above the middle of the floor.
        """
        if self.facts.event not in ("fall", "onto", "bounce") or self._coarse():
            return None
        if not self.present[:, 0].any():
            return 0.0
        seen = np.flatnonzero(self.present[:, 0] & (self.box[:, 0, 1] > 0))
        if len(seen) < 3 or seen[0] > 1:
            return None
        rows, times = self.centre[seen, 0, 1], self.times[seen]
        # The fall ends before the lowest frame, which may be past a contact, or where heights leave the parabola.
        lowest = int(rows.argmax())
        while lowest > 0 and rows[lowest - 1] > rows.max() - STILL_PX:
            lowest -= 1
        height, count = _heights(rows), min(3, lowest)
        while count < lowest:
            expected = np.polyval(np.polyfit(times[:count], height[:count], 2), times[count])
            if count > 3 and abs(expected - height[count]) > PARABOLA_METRES:
                count -= 1 if count > 4 else 0  # the frame before a contact may be slowed a little
                break
            count += 1
        if count < 3 or height[count - 1] > height[0] - 0.1:
            return None
        return float(-2 * np.polyfit(times[:count], height[:count], 2)[0] / GRAVITY)

    def gravity_right(self, ratio: float | None) -> bool | None:
        if ratio is not None:
            return abs(ratio - 1) <= SPEED_TOLERANCE
        falls = self.facts.event in ("fall", "onto", "bounce")
        return False if falls and not self._coarse() and self.times[-1] >= 1.5 else None

    def permanence_right(self) -> bool | None:
        if self.facts.event != "behind" or self.times[-1] < 3 or len(self.times) < 9:
            return None
        if not self.present[0, 0] or not self.present[:, 1].any():
            return False
        gone = np.flatnonzero(self.share[:, 0] <= GONE_SHARE)
        if not len(gone):
            return False
        before = np.flatnonzero(self.clear[: gone[0], 0])
        after = gone[-1] + 1 + np.flatnonzero(self.whole[gone[-1] + 1 :, 0])
        if not len(after):
            return False
        if not len(before):
            return None
        sign, partner = self.facts.sign, np.nanmedian(self.box[:, 1], axis=0)
        edge = partner[2] if sign > 0 else partner[0]
        came = self.centre[after[-1], 0, 0]
        speed = (came - self.centre[before[0], 0, 0]) / (self.times[after[-1]] - self.times[before[0]])
        if self.times[before[-1]] - self.times[before[0]] >= 0.5:
            usual = np.polyfit(self.times[before], self.centre[before, 0, 0], 1)[0]
        else:  # too short to measure
            usual = sign * ROLL_PX_PER_SECOND[self.facts.speed or "slowly"]
        return bool((came - edge) * sign > 0 and abs(speed / usual - 1) <= ON_TIME)

    def stray(self) -> float | None:
        """Largest distance of a body that should stand still from its median position, in frames in which it is clear.

        The side of the frame if such a body is missing.
        """
        strays = []
        before = self._before_contact()
        for body in range(len(self.columns)):
            chosen = self.clear[:, body].copy()
            if body in self.facts.movers:
                if body == 0 or self.facts.event not in ("into", "knock"):
                    continue
                chosen &= before
            centres = self.centre[chosen, body]
            if not self.present[:, body].any():
                strays.append(float(REFERENCE_PIXELS))
            elif len(centres) >= 2:
                strays.append(float(np.linalg.norm(centres - np.median(centres, axis=0), axis=-1).max()))
        return max(strays) if strays else None


def _floor_places(centres: np.ndarray) -> np.ndarray:
    """Positions of standing bodies from their centres on the screen: (n, 2) pixels -> (n, 2) metres to the right, away.

    In the coordinates of NOMINAL_CIRCLE, which turn with the camera: positions turn as the camera circles.
    """
    camera = NOMINAL_CIRCLE
    axes, eye = camera.axes(0.0), np.array(camera.eye(0.0))
    slope = math.tan(camera.field_of_view / 2) / (REFERENCE_PIXELS / 2)
    across, up = (centres[:, 0] - REFERENCE_PIXELS / 2) * slope, (REFERENCE_PIXELS / 2 - centres[:, 1]) * slope
    directions = axes[2] + across[:, None] * axes[0] + up[:, None] * axes[1]
    reach = (CENTRE_HEIGHT - eye[2]) / np.minimum(directions[:, 2], -1e-3)
    return (eye + reach[:, None] * directions)[:, :2]


def _heights(rows: np.ndarray) -> np.ndarray:
    """Heights in metres of points above the middle of the floor, from their rows (n,) in pixels."""
    camera = NOMINAL_CAMERA
    axes, eye = camera.axes(0.0), np.array(camera.eye(0.0))
    slope = math.tan(camera.field_of_view / 2) / (REFERENCE_PIXELS / 2)
    directions = axes[2] + ((REFERENCE_PIXELS / 2 - rows) * slope)[:, None] * axes[1]
    return eye[2] + directions[:, 2] * (-eye[1] / directions[:, 1])
