"""The embedded benchmark: test captions, the clips to judge, their ceilings, the targets, and the table.

Three sources are judged alike: clips generated from the captions, the captions' real clips after the tokenizer's round
trip (what a perfect generator could reach), and the real clips themselves (what the probes can see). Who generates is
not known here: frames come from a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cogvideo.evaluation.statistics import Mean, Proportion
from cogvideo.worlds.digits.probes import Summary, score_clips, summarise
from cogvideo.worlds.digits.render import SECONDS, SPEEDS, DigitClip, draw_clip, draw_language, frame_times, render

if TYPE_CHECKING:
    from cogvideo.tokenizers.image import ImageTokenizer

NUM_KEY_FRAMES = 5
NUM_ROUNDS = 3  # of interpolation: 5 -> 9 -> 17 -> 33 frames
CLIP_SECONDS = (4.0, 2.0, 1.0)
WHOLE = "whole"
SOURCES = ("generated", "reconstructed", "original")
Frames = np.ndarray  # (clips, frames, CANVAS, CANVAS, 3) uint8


@dataclass(frozen=True)
class DigitBenchmarkConfig:
    """What to judge."""

    num_prompts: int = 200  # test captions, half Chinese, half English
    seed: int = 0  # of the captions drawn
    clip_seconds: tuple[float, ...] = CLIP_SECONDS  # clip lengths asked of stage 1

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} leaves nothing to judge; give 1 or more")
        if self.seed < 0:
            raise ValueError(f"the captions' seed={self.seed} is negative; give 0 or more")
        if any(not 0 < seconds <= SECONDS for seconds in self.clip_seconds):
            raise ValueError(f"clip_seconds={list(self.clip_seconds)} must lie in (0, {SECONDS:g}]")


@dataclass(frozen=True)
class Caption:
    """A test caption and the real clip behind it."""

    text: str
    clip: DigitClip


def draw_captions(num: int, seed: int) -> list[Caption]:
    """Captions of clips of test digits, the same for the same seed; fewer are the first of more."""
    rng = np.random.default_rng((seed, 0x7E57))  # not the stream of any training set
    captions = []
    for _ in range(num):
        clip = draw_clip(rng, "test")
        captions.append(Caption(clip.caption(draw_language(rng)), clip))
    return captions


def set_name(seconds: float) -> str:
    """The name of the set of key frames over a clip length, e.g. "4 s"."""
    return f"{seconds:g} s"


def seconds_of(name: str) -> float:
    """The inverse of `set_name`."""
    return float(name.removesuffix(" s"))


def times_of(config: DigitBenchmarkConfig) -> dict[str, np.ndarray]:
    """The frame times in seconds of every set: key frames at each clip length, then whole clips."""
    key = {set_name(seconds): np.linspace(0.0, seconds, NUM_KEY_FRAMES) for seconds in config.clip_seconds}
    return {**key, WHOLE: frame_times()}


def real_frames(captions: Sequence[Caption], times: np.ndarray) -> Frames:
    """The real clips behind the captions at `times` (frames,) seconds."""
    return np.stack([render(caption.clip, times) for caption in captions])


def reconstruct(tokenizer: ImageTokenizer, frames: Frames, batch: int = 256) -> Frames:
    """Encode and decode every frame: what the tokenizer alone does to the clips."""
    import torch
    from einops import rearrange

    images = torch.from_numpy(rearrange(frames, "clips frames h w c -> (clips frames) c h w"))
    decoded = []
    with torch.inference_mode():
        for part in images.split(batch):
            pixels = tokenizer.decode(tokenizer.encode(part.float() / 255))
            decoded.append((pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy(force=True))
    return rearrange(np.concatenate(decoded), "(clips frames) c h w -> clips frames h w c", clips=len(frames))


@dataclass(frozen=True)
class Target:
    """A figure to reach; `of_ceiling` makes the limit a share of the reconstructed clips' figure."""

    measure: str
    set_name: str
    limit: float
    at_least: bool
    of_ceiling: bool = False


def targets_of(config: DigitBenchmarkConfig) -> list[Target]:
    """What the bundled weights are held to."""
    return [
        Target("digit", WHOLE, 0.80, True, of_ceiling=True),
        Target("colour", WHOLE, 0.95, True),
        Target("direction", WHOLE, 0.92, True),
        Target("midpoint", WHOLE, 1.5, False),
        *(Target("step_error", set_name(seconds), 0.75, False) for seconds in config.clip_seconds),
    ]


@dataclass
class Results:
    """Summaries by source and set, filled as clips are judged."""

    config: DigitBenchmarkConfig
    summaries: dict[str, dict[str, Summary]] = field(default_factory=dict)

    def judge(self, source: str, set_name: str, frames: Frames, captions: Sequence[Caption]) -> Summary:
        """Score one set of clips and keep its summary."""
        key_frames = NUM_KEY_FRAMES if set_name == WHOLE else None
        times = times_of(self.config)[set_name]
        scores = score_clips(frames, [caption.clip for caption in captions], times, key_frames)
        self.summaries.setdefault(source, {})[set_name] = summarise(scores)
        return self.summaries[source][set_name]

    def check(self, target: Target) -> tuple[float, bool] | None:
        """The target's limit and whether the generated clips reach it; None where they (or the ceiling) are missing."""
        got = self._figure("generated", target)
        ceiling = self._figure("reconstructed", target) if target.of_ceiling else 1.0
        if got is None or ceiling is None:
            return None
        limit = target.limit * ceiling
        return limit, got >= limit if target.at_least else got <= limit

    def _figure(self, source: str, target: Target) -> float | None:
        summary = self.summaries.get(source, {}).get(target.set_name)
        figure = getattr(summary, target.measure, None)
        return None if figure is None else figure.value

    def to_json(self) -> dict[str, object]:
        checks = []
        for target in targets_of(self.config):
            check = self.check(target)
            if check is not None:
                checks.append({**target.__dict__, "limit": check[0], "met": check[1]})
        by_source = {
            source: {name: summary.to_json() for name, summary in sets.items()}
            for source, sets in self.summaries.items()
        }
        return {"config": {**self.config.__dict__}, **by_source, "targets": checks}


def run_benchmark(
    config: DigitBenchmarkConfig,
    tokenizer: ImageTokenizer | None,
    generate: Callable[[list[str], str], Frames | None] | None,
    announce: Callable[[str], None] = lambda line: None,
) -> Results:
    """Judge generated, reconstructed and real clips of the same captions.

    tokenizer: None leaves the reconstructed column out. generate: from (captions, set name) to frames, where the set is
    `set_name(seconds)` for the key frames of stage 1 or WHOLE for all frames, or to None for a set that it cannot make;
    None instead of a function judges real clips alone.
    announce: told what begins.
    """
    captions, results = draw_captions(config.num_prompts, config.seed), Results(config)
    for name, times in times_of(config).items():
        announce(f"{config.num_prompts} clips, {_title(name)}")
        real = real_frames(captions, times)
        results.judge("original", name, real, captions)
        if tokenizer is not None:
            results.judge("reconstructed", name, reconstruct(tokenizer, real), captions)
        frames = generate([caption.text for caption in captions], name) if generate is not None else None
        if frames is not None:
            results.judge("generated", name, frames, captions)
    return results


ROWS = (
    ("complete", "one digit in every frame"),
    ("digit", "digit right, vote of the frames"),
    ("digit_frames", "digit right, single frames"),
    ("colour", "colour right"),
    ("direction", "direction right"),
    ("all_right", "digit, colour and direction right"),
    ("step_error", "displacement error a frame, px"),
    ("midpoint", "interpolated frames from midpoint path, px"),
)


def table(results: Results) -> str:
    """The results for people: a block a set, a column a source, the target and whether it is met."""
    sources = [source for source in SOURCES if source in results.summaries]
    targets = {(target.set_name, target.measure): target for target in targets_of(results.config)}
    lines = []
    for name in times_of(results.config):
        summaries = [results.summaries[source].get(name) for source in sources]
        rows = [[_title(name), *sources, "target" if "generated" in sources else ""]]
        for measure, title in ROWS:
            figures = [getattr(summary, measure, None) for summary in summaries]
            if any(figures):
                target = _target_text(results, targets.get((name, measure)))
                rows.append([f"  {title}", *map(_figure_text, figures), target])
        for index in range(NUM_ROUNDS if name == WHOLE else 0):
            rounds = [None if summary is None else summary.midpoint_by_round[index] for summary in summaries]
            rows.append([f"    round {index + 1}", *map(_figure_text, rounds)])
        lines += [*_aligned(rows), ""]
    return "\n".join([*lines, *_aligned(_speed_rows(results, sources))])


def _speed_rows(results: Results, sources: list[str]) -> list[list[str]]:
    """Does the frame-rate text rule the motion? The step measured against the step asked for."""
    rows = [["mean step in the asked direction, px a frame", "asked", *sources]]
    for name, times in times_of(results.config).items():
        summaries = [results.summaries[source].get(name) for source in sources]
        for speed, pixels_a_second in SPEEDS.items():
            figures = [None if summary is None else summary.step_by_speed[speed] for summary in summaries]
            asked = pixels_a_second * (times[1] - times[0])
            rows.append([f"  {_title(name)}, {speed}", f"{asked:.2f}", *map(_figure_text, figures)])
    return rows


def _title(name: str) -> str:
    if name == WHOLE:
        return f"whole clips, {len(frame_times())} frames over {SECONDS:g} s"
    return f"{NUM_KEY_FRAMES} key frames over {name}"


def _figure_text(figure: Proportion | Mean | None) -> str:
    if figure is None or figure.total == 0:
        return "-"
    if isinstance(figure, Proportion):
        low, high = figure.interval
        return f"{100 * figure.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    spread = f" ± {figure.standard_error:.3f}" if figure.total > 1 else ""
    return f"{figure.value:.3f}{spread}"


def _target_text(results: Results, target: Target | None) -> str:
    check = results.check(target) if target else None
    if target is None or check is None:
        return ""
    limit, met = check
    number = f"{100 * limit:.1f} %" if target.at_least else f"{limit:g}"
    return f"{'>=' if target.at_least else '<='} {number}: {'met' if met else 'NOT met'}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
