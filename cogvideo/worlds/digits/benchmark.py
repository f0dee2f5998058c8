"""The moving-digits benchmark: test captions, their real clips, probes and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cogvideo.worlds.benchmark import (
    NUM_KEY_FRAMES,
    NUM_ROUNDS,
    WHOLE,
    Benchmark,
    ClipSet,
    Frames,
    Results,
    Target,
    format_figure,
    set_name,
)
from cogvideo.worlds.digits.probes import Summary, probe_clips, summarise
from cogvideo.worlds.digits.render import (
    CANVAS,
    SECONDS,
    SPEEDS,
    DigitClip,
    Palette,
    draw_clip,
    draw_language,
    frame_times,
    render,
)

CLIP_SECONDS = (4.0, 2.0, 1.0)


@dataclass(frozen=True)
class DigitsBenchmark(Benchmark):
    """Clips of handwritten digits that no training clip shows."""

    name: ClassVar[str] = "digits"
    side: ClassVar[int] = CANVAS
    rules: ClassVar[int] = 1
    measures: ClassVar[Sequence[tuple[str, str]]] = (
        ("complete", "one digit in every frame"),
        ("digit", "digit right, vote of the frames"),
        ("digit_frames", "digit right, single frames"),
        ("colour", "colour right"),
        ("direction", "direction right"),
        ("all_right", "digit, colour and direction right"),
        ("step_error", "displacement error per frame, px"),
        ("midpoint", "interpolated frames from midpoint path, px"),
        *((f"midpoint_{number}", f"  round {number}") for number in range(1, NUM_ROUNDS + 1)),
    )

    clip_seconds: tuple[float, ...] = CLIP_SECONDS
    """Clip lengths requested from stage 1."""
    palette: Palette = "basic"
    """Colours of the captions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 < seconds <= SECONDS for seconds in self.clip_seconds):
            raise ValueError(f"clip_seconds={list(self.clip_seconds)} must lie in (0, {SECONDS:g}]")

    @property
    def sets(self) -> dict[str, ClipSet]:
        texts = tuple(caption.text for caption in self._captions)
        lengths = {set_name(seconds): ClipSet(set_name(seconds), texts, seconds) for seconds in self.clip_seconds}
        return {**lengths, WHOLE: ClipSet(WHOLE, texts, SECONDS, NUM_ROUNDS)}

    @property
    def targets(self) -> Sequence[Target]:
        return [
            Target("digit", WHOLE, 0.80, True, of_ceiling=True),
            Target("colour", WHOLE, 0.95, True),
            Target("direction", WHOLE, 0.92, True),
            Target("midpoint", WHOLE, 1.5, False),
            *(Target("step_error", set_name(seconds), 0.75, False) for seconds in self.clip_seconds),
        ]

    def real(self, clips: ClipSet) -> Frames:
        return real_frames(self._captions, clips.times)

    def others(self) -> Frames:
        return real_frames(self._drawn[self.num_prompts :], frame_times())

    def summarise(self, clips: ClipSet, frames: Frames) -> Summary:
        key_frames = NUM_KEY_FRAMES if clips.rounds else None
        return summarise(probe_clips(frames, [caption.clip for caption in self._captions], clips.times, key_frames))

    def motion_rows(self, results: Results, sources: Sequence[str]) -> list[list[str]]:
        """Measured steps beside the requested ones, to show whether the frame-rate text controls the motion."""
        rows = [["mean step in the requested direction, px per frame", "requested", *sources]]
        for name, clips in self.sets.items():
            for speed, pixels_per_second in SPEEDS.items():
                figures = [results.figure(source, name, f"step_{speed}") for source in sources]
                requested = pixels_per_second * (clips.times[1] - clips.times[0])
                rows.append([f"  {clips.title}, {speed}", f"{requested:.2f}", *map(format_figure, figures)])
        return rows

    @property
    def _captions(self) -> Sequence[CaptionedClip]:
        return self._drawn[: self.num_prompts]

    @property
    def _drawn(self) -> Sequence[CaptionedClip]:
        return draw_captions(2 * self.num_prompts, self.seed, self.palette)


@dataclass(frozen=True)
class CaptionedClip:
    """A caption and the real clip that it describes."""

    text: str
    clip: DigitClip


@lru_cache(maxsize=4)
def draw_captions(count: int, seed: int, palette: Palette = "basic") -> tuple[CaptionedClip, ...]:
    """Draw captioned clips of test digits. The same seed gives the same clips, and a larger count extends them."""
    rng = np.random.default_rng((seed, 0x7E57))  # a stream that no training set uses
    captions = []
    for _ in range(count):
        clip = draw_clip(rng, "test", palette)
        captions.append(CaptionedClip(clip.caption(draw_language(rng)), clip))
    return tuple(captions)


def real_frames(captions: Sequence[CaptionedClip], times: NDArray[np.float64]) -> Frames:
    """Render the captions' real clips at `times` (frames,) seconds."""
    return np.stack([render(caption.clip, times) for caption in captions])
