"""Describes a clip of the bodies world in words, English or Chinese, and finds the spans that the words describe.

A clip has at most one caption for each clip length in SPAN_SECONDS, with a span in which its words are true: a fall is
over after a second, so only the clip's beginning shows it. A span is at least as long as its clip length and shorter
than the next longer one, so that `cogvideo prepare` with its default policy, the longest length that fits, cuts clips
of that length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cogvideo.worlds.bodies.physics import States
from cogvideo.worlds.bodies.scene import FPS, Body, Scene

Language = Literal["en", "zh"]

SPAN_SECONDS = (4.0, 2.0, 1.0, 0.5)
ROOM_FRAMES = {4.0: 0, 2.0: 4, 1.0: 4, 0.5: 2}
"""Frames by which a span may exceed its clip length, so that clips may begin a little later."""
CHINESE: dict[str, str] = {
    **{"red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "purple": "紫", "white": "白"},
    **{"ball": "的球", "box": "方块", "cylinder": "圆柱"},
    **{"left": "左", "right": "右"},
}
OPPOSITE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class SpanCaption:
    """A caption for a span of a clip."""

    text: str
    language: Language
    clip_seconds: float
    """The clip length that the span is meant for."""
    start: float
    """Seconds, as in a captions file."""
    end: float


def write_captions(
    scene: Scene, states: States, visible: np.ndarray, rng: np.random.Generator
) -> tuple[SpanCaption, ...]:
    """Draw wording, language and span for each clip length that can show the event.

    `visible` (frames, bodies) as in `render.Rendering`.
    """
    captions = []
    for seconds in SPAN_SECONDS:
        language: Language = "zh" if rng.random() < 0.5 else "en"
        text, span = describe(scene, language, rng), find_span(scene, states, visible, seconds, rng)
        if span is not None:
            captions.append(SpanCaption(text, language, seconds, *span))
    return tuple(captions)


def find_span(
    scene: Scene, states: States, visible: np.ndarray, seconds: float, rng: np.random.Generator
) -> tuple[float, float] | None:
    """Start and end in seconds of a span that shows the event in clips of `seconds`; None if there is none."""
    length, last = round(seconds * FPS), len(visible) - 1
    if length >= last:
        return (0.0, last / FPS) if length == last else None
    shows = _show_event(scene, states, visible)
    starts = [start for start in range(last - length + 1) if shows(start, length)]
    if not starts:
        return None
    first = final = int(rng.choice(starts))
    while final + 1 in starts and final + 1 - first <= ROOM_FRAMES[seconds]:
        final += 1
    return first / FPS, (final + length) / FPS


def _show_event(scene: Scene, states: States, visible: np.ndarray) -> Callable[[int, int], bool]:
    """A function of `start` and `length`, in frames: whether such a clip begins before the event and shows it."""
    num_bodies = len(scene.bodies)
    event = scene.event

    def shows(start: int, length: int) -> bool:
        window = slice(start, start + length + 1)
        if event == "behind":  # begins with the ball in sight
            return visible[start, 0] >= 0.6 and visible[window, 0].min() <= 0.7
        if event == "front":
            return visible[start, 1] >= 0.7 and visible[window, 1].min() <= 0.85
        if event in ("into", "knock"):
            contact = states.first_contact(0, 1)
            latest = 0.7 if event == "into" else 0.3  # a tower needs time to fall
            return contact is not None and start + 0.2 * length <= contact <= start + latest * length
        if event in ("fall", "onto"):
            landing = states.first_contact(0, num_bodies if event == "fall" else 1)
            if landing is None:
                return False
            return start <= 0.35 * landing and (landing <= start + length or length <= FPS // 2)
        if event == "bounce":
            floor = states.contact[:, 0, num_bodies]
            return bool(floor[start + length // 4 : start + length - length // 4 + 1].any()) and not floor[start]
        if event == "topple":
            return start <= 2
        return True

    return shows


def describe(scene: Scene, language: Language, rng: np.random.Generator) -> str:
    """One sentence that says what happens, in one of several wordings."""
    wordings = (_english if language == "en" else _chinese)(scene)
    return wordings[rng.integers(len(wordings))]


def name_body(body: Body, language: Language, article: str = "a") -> str:
    """A body in words: "a tall red box", "高高的红色方块"."""
    if language == "en":
        return f"{article} {'tall ' if body.tall else ''}{body.colour} {body.shape}"
    return f"{'高高的' if body.tall else ''}{CHINESE[body.colour]}色{CHINESE[body.shape]}"


def _side(scene: Scene, other: Body) -> Literal["left", "right"]:
    """The side of the first body on which another stands."""
    return "left" if other.position[0] < scene.bodies[0].position[0] else "right"


def _english(scene: Scene) -> list[str]:
    first, event = name_body(scene.bodies[0], "en"), scene.event
    side, speed = scene.direction or "", scene.speed or ""
    partner = name_body(scene.partner, "en") if scene.partner else ""
    if event == "circle":
        names = [name_body(body, "en") for body in scene.bodies]
        around = f"{', '.join(names[:-1])} and {names[-1]}"
        return [
            f"the camera circles {speed} to the {side} around {around}",
            f"the camera moves {speed} to the {side} around {around}",
        ]
    beside = ""
    if scene.bystanders:
        other = scene.bystanders[0]
        where = _side(scene, other)
        beside = f" to the {OPPOSITE[where]} of {name_body(other, 'en')}"
        if event == "topple":
            beside = f" next to {name_body(other, 'en')}"
        if event == "onto":
            beside = f", {name_body(other, 'en')} stands on the {where}"
    rolls = [f"{first} rolls {speed} to the {side}", f"{first} {speed} rolls {side}"]
    if event == "roll":
        return [*rolls, f"{first} is rolling {speed} to the {side}"]
    if event == "behind":
        return [f"{roll} behind {partner}" for roll in rolls]
    if event == "front":
        return [f"{roll} in front of {partner}" for roll in rolls]
    if event == "into":
        return [
            *(f"{roll} into {partner}" for roll in rolls),
            f"{rolls[0]}, hits {partner} and pushes it away",
        ]
    if event == "knock":
        return [f"{roll} into {partner} and knocks it over" for roll in rolls]
    if event == "fall":
        return [f"{first} falls to the floor{beside}", f"{first} drops to the floor{beside}"]
    if event == "onto":
        return [f"{first} falls onto {partner}{beside}", f"{first} drops onto {partner}{beside}"]
    if event == "bounce":
        return [f"{first} bounces up and down{beside}", f"{first} drops and bounces on the floor{beside}"]
    return [f"{first} topples over to the {side}{beside}", f"{first} falls over to the {side}{beside}"]


def _chinese(scene: Scene) -> list[str]:
    first, event = name_body(scene.bodies[0], "zh"), scene.event
    side = CHINESE[scene.direction] if scene.direction else ""
    speed = {"slowly": "慢慢", "quickly": "快速", None: ""}[scene.speed]
    partner = name_body(scene.partner, "zh") if scene.partner else ""
    if event == "circle":
        names = [name_body(body, "zh") for body in scene.bodies]
        around = f"{'、'.join(names[:-1])}和{names[-1]}"
        return [f"镜头{speed}向{side}绕着{around}转动", f"镜头向{side}{speed}环绕{around}"]
    beside = after = ""
    if scene.bystanders:
        other = scene.bystanders[0]
        where = _side(scene, other)
        beside = f"在{name_body(other, 'zh')}{CHINESE[OPPOSITE[where]]}边"
        if event == "topple":
            beside = f"在{name_body(other, 'zh')}旁边"
        after = f"，{CHINESE[where]}边有一个{name_body(other, 'zh')}"
    one = f"一个{first}"
    if event == "roll":
        return [f"{one}{speed}向{side}滚动", f"{one}向{side}{speed}滚去", f"{first}正在{speed}向{side}滚"]
    if event == "behind":
        return [f"{one}从{partner}后面{speed}向{side}滚过", f"{one}{speed}向{side}滚到{partner}后面"]
    if event == "front":
        return [f"{one}从{partner}前面{speed}向{side}滚过", f"{one}{speed}向{side}滚过{partner}前面"]
    if event == "into":
        return [f"{one}{speed}向{side}滚，撞上{partner}", f"{one}{speed}向{side}滚去，把{partner}撞开"]
    if event == "knock":
        return [f"{one}{speed}向{side}滚，把{partner}撞倒", f"{one}向{side}{speed}滚去，撞倒了{partner}"]
    if event == "fall":
        return [f"{one}{beside}落到地上", f"{one}{beside}掉到地面上"]
    if event == "onto":
        return [f"{one}落到{partner}上{after}", f"{one}掉在{partner}上{after}"]
    if event == "bounce":
        return [f"{one}{beside}上下弹跳", f"{one}{beside}落下来，在地上弹跳"]
    return [f"{one}{beside}向{side}倒下", f"{one}{beside}向{side}边翻倒"]
