"""The benchmark of the bodies world: captions of test scenes or unseen combinations, real clips, probes and targets.

Scenes are simulated and rendered here, from (seed, split, index) alone; no data set is read. They are those that
`cogvideo worlds bodies --pixels 64` writes, before video compression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np

from cogvideo.logs import progress
from cogvideo.worlds.benchmark import (
    NUM_ROUNDS,
    WHOLE,
    WHOLE_SECONDS,
    Benchmark,
    ClipSet,
    Frames,
    Target,
    set_name,
)
from cogvideo.worlds.bodies.captions import SPAN_SECONDS, SpanCaption
from cogvideo.worlds.bodies.files import RAYS, Settings, make_clip
from cogvideo.worlds.bodies.measure import Facts
from cogvideo.worlds.bodies.physics import load_pybullet, simulate
from cogvideo.worlds.bodies.probes import ClipScore, Summary, score_clip, summarise
from cogvideo.worlds.bodies.render import render
from cogvideo.worlds.bodies.scene import FPS, REFERENCE_PIXELS, ROLLING, Scene, Split

CONTINUED = "continued"
CONTINUATIONS = 2  # 12 s
UNSEEN_POINTS = 0.10
"""How much lower the targets for unseen combinations are than for test captions; for errors, how much higher."""


class CaptionedClip(NamedTuple):
    """A caption, the number of its scene, and the frame of the scene's clip at which its span begins."""

    text: str
    number: int
    first_frame: int


@dataclass(frozen=True)
class BodiesBenchmark(Benchmark):
    """Clips of bodies that roll, fall and collide: `num_prompts` scenes, with up to one caption per clip length."""

    name: ClassVar[str] = "bodies"
    side: ClassVar[int] = REFERENCE_PIXELS
    rules: ClassVar[int] = 1
    measures: ClassVar[Sequence[tuple[str, str]]] = (
        ("colours", "colours right"),
        ("shapes", "shapes right"),
        ("mover", "the right bodies move"),
        ("direction", "direction right"),
        ("speed", "speed within 15 %"),
        ("speed_ratio", "speed / caption's speed"),
        ("speed_error", "speed error"),
        ("depth", "depth order right"),
        ("contact", "contact right"),
        ("toppled", "topples"),
        ("landed", "lands"),
        ("bounced", "bounces"),
        ("gravity", "gravity within 15 %"),
        ("gravity_ratio", "gravity / world's gravity"),
        ("gravity_error", "gravity error"),
        ("permanence", "reappears from behind a body"),
        ("still", "standing bodies stand still"),
        ("stray", "drift of standing bodies, px"),
        ("late_colours", "colours right in the last third"),
        ("late_shapes", "shapes right in the last third"),
    )

    split: Split = "test"
    """test, or unseen: combinations of colour, shape and event that do not occur in training."""
    continued: bool = False
    """Also score clips that are continued twice, of scenes in which no body rolls out of view."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split == "train":
            raise ValueError("split=train: models have seen these captions; choose test or unseen")

    @property
    def sets(self) -> dict[str, ClipSet]:
        texts = {seconds: tuple(clip.text for clip in self._captions(seconds)) for seconds in SPAN_SECONDS}
        sets = {set_name(seconds): ClipSet(set_name(seconds), words, seconds) for seconds, words in texts.items()}
        sets[WHOLE] = ClipSet(WHOLE, texts[WHOLE_SECONDS], WHOLE_SECONDS, NUM_ROUNDS)
        if self.continued:
            words = tuple(clip.text for clip in self._captions(WHOLE_SECONDS, staying=True))
            sets[CONTINUED] = ClipSet(CONTINUED, words, WHOLE_SECONDS, NUM_ROUNDS, CONTINUATIONS)
        return {name: clips for name, clips in sets.items() if clips.captions}

    @property
    def targets(self) -> Sequence[Target]:
        less = UNSEEN_POINTS if self.split == "unseen" else 0.0
        return [
            *(Target(measure, WHOLE, 0.95 - less, True) for measure in ("colours", "shapes", "direction")),
            *(Target("speed_error", name, 0.15 + less, False) for name in (*map(set_name, SPAN_SECONDS), WHOLE)),
            Target("gravity_error", WHOLE, 0.15 + less, False),
            Target("permanence", WHOLE, 0.80 - less, True),
        ]

    def real(self, clips: ClipSet) -> Frames:
        chosen, made = self._chosen(clips), self._made
        if clips.continuations:
            scenes = [made.scenes[clip.number] for clip in chosen]
            with progress(len(scenes), "rendering", "clips") as bar:
                return np.stack([_render(scene, len(clips.times), bar.update) for scene in scenes])
        length = round(clips.seconds * FPS)
        places = np.linspace(0, length, len(clips.times)).round().astype(int)
        return np.stack([made.frames[clip.number][clip.first_frame + places] for clip in chosen])

    def others(self) -> Frames:
        return _make(self.split, self.seed, self.num_prompts, self.num_prompts).frames

    def summarise(self, clips: ClipSet, frames: Frames) -> Summary:
        made = self._made
        facts = [Facts.from_scene(made.scenes[clip.number]) for clip in self._chosen(clips)]

        def scores(part: slice) -> list[ClipScore]:
            shown = zip(frames[:, part], facts, strict=True)
            return [score_clip(clip, about, clips.times[part]) for clip, about in shown]

        summary = summarise(scores(slice(None)))
        if not clips.continuations:
            return summary
        late = summarise(scores(slice(-(len(clips.times) // (1 + clips.continuations)), None))).proportions
        added = {f"late_{name}": late[name] for name in ("colours", "shapes")}
        return replace(summary, proportions={**summary.proportions, **added})

    def _chosen(self, clips: ClipSet) -> list[CaptionedClip]:
        return self._captions(clips.seconds, staying=clips.continuations > 0)

    def _captions(self, seconds: float, staying: bool = False) -> list[CaptionedClip]:
        """The captions for clips of `seconds`; `staying`: only of scenes in which nothing rolls out of view."""
        made = self._made
        return [
            CaptionedClip(caption.text, index, round(caption.start * FPS))
            for index, (scene, captions) in enumerate(zip(made.scenes, made.captions, strict=True))
            for caption in captions
            if caption.clip_seconds == seconds and not (staying and scene.event in ROLLING)
        ]

    @property
    def _made(self) -> _Made:
        return _make(self.split, self.seed, 0, self.num_prompts)


class _Made(NamedTuple):
    frames: Frames
    """(scenes, 33, 64, 64, 3)"""
    scenes: tuple[Scene, ...]
    captions: tuple[tuple[SpanCaption, ...], ...]


@lru_cache(maxsize=2)
def _make(split: Split, seed: int, first: int, count: int) -> _Made:
    """Simulate and render `count` scenes, from number `first` on. Raises: ValueError if PyBullet is not installed."""
    load_pybullet()
    settings, made = Settings(split, seed, REFERENCE_PIXELS), []
    with progress(count, "rendering", "clips") as bar:
        for index in range(first, first + count):
            made.append(make_clip(settings, index))
            bar.update(1)
    frames = np.stack([clip for clip, _ in made])
    return _Made(frames, tuple(truth.scene for _, truth in made), tuple(truth.captions for _, truth in made))


def _render(scene: Scene, num_frames: int, update: Callable[[int], object]) -> Frames:
    """Render more frames of a scene than its clip has: (num_frames, 64, 64, 3)."""
    frames = render(scene, simulate(scene, num_frames), REFERENCE_PIXELS, RAYS[REFERENCE_PIXELS]).frames
    update(1)
    return frames
