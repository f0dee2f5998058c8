"""The moving-digits benchmark: test captions, sets of clips to score, targets, and the table of results.

Three sources are scored alike: clips generated from the captions; the captions' real clips after the tokenizer's round
trip, which is the ceiling for any generator; and the real clips themselves, which show what the probes can detect.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.evaluation.packaged_networks import clip_moments, moment_distances
from cogvideo.evaluation.protocols import HASH_DIGITS
from cogvideo.evaluation.statistics import Mean, Proportion
from cogvideo.logs import progress
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

if TYPE_CHECKING:
    from cogvideo.sampling.config import SampleConfig
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.tokenizers.image import ImageTokenizer

NUM_KEY_FRAMES = 5
NUM_ROUNDS = 3  # of interpolation: 5 -> 9 -> 17 -> 33 frames
CLIP_SECONDS = (4.0, 2.0, 1.0)
WHOLE = "whole"
RULES = 1
"""Version of the probes and sets; raised when a change of them moves numbers."""
SOURCES = ("generated", "reconstructed", "original")
Frames = NDArray[np.uint8]  # (clips, frames, CANVAS, CANVAS, 3)
Generate = Callable[[list[str], str], Frames | None]
"""(captions, set name) -> their clips; None for a set that the model cannot make."""


@dataclass(frozen=True)
class DigitBenchmarkConfig:
    """What to score."""

    num_prompts: int = 200
    """Test captions, about half Chinese and half English."""
    seed: int = 0
    """Seed of the captions drawn."""
    clip_seconds: tuple[float, ...] = CLIP_SECONDS
    """Clip lengths requested from stage 1."""
    palette: Palette = "basic"
    """Colours of the captions."""

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} leaves nothing to score; give 1 or more")
        if self.seed < 0:
            raise ValueError(f"the captions' seed={self.seed} is negative; give 0 or more")
        if any(not 0 < seconds <= SECONDS for seconds in self.clip_seconds):
            raise ValueError(f"clip_seconds={list(self.clip_seconds)} must lie in (0, {SECONDS:g}]")

    @property
    def hash(self) -> str:
        """Hex digits over all that moves a number; compare numbers of one hash only."""
        values = {**asdict(self), "rules": RULES}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]

    @property
    def frame_times(self) -> dict[str, NDArray[np.float64]]:
        """Frame times in seconds of each set, by name: key frames at each clip length, then whole clips."""
        sets = {set_name(seconds): np.linspace(0.0, seconds, NUM_KEY_FRAMES) for seconds in self.clip_seconds}
        return {**sets, WHOLE: frame_times()}

    @property
    def targets(self) -> list[Target]:
        """What the bundled weights are expected to reach."""
        return [
            Target("digit", WHOLE, 0.80, True, of_ceiling=True),
            Target("colour", WHOLE, 0.95, True),
            Target("direction", WHOLE, 0.92, True),
            Target("midpoint", WHOLE, 1.5, False),
            *(Target("step_error", set_name(seconds), 0.75, False) for seconds in self.clip_seconds),
        ]


@dataclass(frozen=True)
class Target:
    """A figure to reach."""

    measure: str
    """A field of `Summary`."""
    set_name: str
    limit: float
    at_least: bool
    """Whether the figure must be at least `limit`; otherwise at most."""
    of_ceiling: bool = False
    """Whether `limit` is a fraction of the reconstructed clips' figure."""


def set_name(seconds: float) -> str:
    """The name of the set of key frames over a clip length, such as "4 s"."""
    return f"{seconds:g} s"


def set_seconds(name: str) -> float:
    """The inverse of `set_name`."""
    return float(name.removesuffix(" s"))


@dataclass(frozen=True)
class CaptionedClip:
    """A caption and the real clip that it describes."""

    text: str
    clip: DigitClip


def draw_captions(count: int, seed: int, palette: Palette = "basic") -> list[CaptionedClip]:
    """Captions of clips of test digits. The same seed gives the same captions, and a larger count extends them."""
    rng = np.random.default_rng((seed, 0x7E57))  # not the stream of any training set
    captions = []
    for _ in range(count):
        clip = draw_clip(rng, "test", palette)
        captions.append(CaptionedClip(clip.caption(draw_language(rng)), clip))
    return captions


def real_frames(captions: Sequence[CaptionedClip], times: NDArray[np.float64]) -> Frames:
    """Render the captions' real clips at `times` (frames,) seconds."""
    return np.stack([render(caption.clip, times) for caption in captions])


def reconstruct(tokenizer: ImageTokenizer, frames: Frames, batch: int = 256) -> Frames:
    """Encode and decode every frame, to see what the tokenizer alone does to the clips."""
    import torch
    from einops import rearrange

    images = torch.from_numpy(rearrange(frames, "clips frames h w c -> (clips frames) c h w"))
    decoded = []
    with torch.inference_mode():
        for part in images.split(batch):
            pixels = tokenizer.decode(tokenizer.encode(part.float() / 255))
            decoded.append((pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy(force=True))
    return rearrange(np.concatenate(decoded), "(clips frames) c h w -> clips frames h w c", clips=len(frames))


def generate_with(pipeline: Pipeline, config: SampleConfig) -> Generate:
    """Sample each set with a pipeline. Whole clips need stage 2; without it that set is None.

    Raises: ValueError if the pipeline's frames have another size than the digits' canvas.
    """
    side = pipeline.sequential.config.frame_side * pipeline.image_tokenizer.compress_rate
    if side != CANVAS:
        raise ValueError(
            f"the model makes frames of {side}x{side} pixels, the moving digits are {CANVAS}x{CANVAS}; "
            "give a model that was trained on them"
        )

    def generate(captions: list[str], name: str) -> Frames | None:
        if name == WHOLE and pipeline.interpolation is None:
            return None
        seconds, rounds = (SECONDS, NUM_ROUNDS) if name == WHOLE else (set_seconds(name), 0)
        settings = replace(config, seconds=seconds, rounds=rounds, samples_per_prompt=1)
        with progress(pipeline.num_tokens(settings, len(captions)), "sampling", "tokens") as bar:
            return pipeline.decode(pipeline.sample(captions, settings, bar.update))

    return generate


@dataclass
class Results:
    """Summaries by source and set, filled as clips are scored."""

    config: DigitBenchmarkConfig
    summaries: dict[str, dict[str, Summary]] = field(default_factory=dict)
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    """By measure and source, of whole clips from the real ones; those of "original" are of other real clips: the floor.
    """

    def add(self, source: str, set_name: str, frames: Frames, captions: Sequence[CaptionedClip]) -> Summary:
        """Score one set of clips and store its summary."""
        key_frames = NUM_KEY_FRAMES if set_name == WHOLE else None
        times = self.config.frame_times[set_name]
        scores = probe_clips(frames, [caption.clip for caption in captions], times, key_frames)
        self.summaries.setdefault(source, {})[set_name] = summarise(scores)
        return self.summaries[source][set_name]

    def check(self, target: Target) -> tuple[float, bool] | None:
        """The target's limit and whether the generated clips reach it; None if they, or the ceiling, are missing."""
        got = self._value("generated", target)
        ceiling = self._value("reconstructed", target) if target.of_ceiling else 1.0
        if got is None or ceiling is None:
            return None
        limit = target.limit * ceiling
        return limit, got >= limit if target.at_least else got <= limit

    def to_json(self) -> dict[str, object]:
        checks = []
        for target in self.config.targets:
            check = self.check(target)
            if check is not None:
                checks.append({**target.__dict__, "limit": check[0], "met": check[1]})
        by_source = {
            source: {name: summary.to_json() for name, summary in sets.items()}
            for source, sets in self.summaries.items()
        }
        config = {**self.config.__dict__}
        protocol = {"hash": self.config.hash, "name": "digits"}
        return {"protocol": protocol, "config": config, **by_source, "distances": self.distances, "targets": checks}

    def _value(self, source: str, target: Target) -> float | None:
        summary = self.summaries.get(source, {}).get(target.set_name)
        figure = getattr(summary, target.measure, None)
        return None if figure is None else figure.value


def run_benchmark(
    config: DigitBenchmarkConfig,
    tokenizer: ImageTokenizer | None,
    generate: Generate | None,
    log: Callable[[str], None] = lambda line: None,
    *,
    networks: Mapping[str, FeatureNetwork] | None = None,
    batch: int = 8,
) -> Results:
    """Score generated, reconstructed and real clips of the same captions.

    Without `tokenizer` there are no reconstructed clips, without `generate` no generated ones. `networks`, by role,
    measure distances between whole clips, `batch` of them at once, if there are two or more. `log` gets one line per
    set.
    """
    drawn, results = draw_captions(2 * config.num_prompts, config.seed, config.palette), Results(config)
    captions, others = drawn[: config.num_prompts], drawn[config.num_prompts :]
    for name, times in config.frame_times.items():
        log(f"{config.num_prompts} clips, {_title(name)}")
        real = real_frames(captions, times)
        results.add("original", name, real, captions)
        sets = {}
        if tokenizer is not None:
            sets["reconstructed"] = reconstruct(tokenizer, real)
            results.add("reconstructed", name, sets["reconstructed"], captions)
        frames = generate([caption.text for caption in captions], name) if generate is not None else None
        if frames is not None:
            sets["generated"] = frames
            results.add("generated", name, frames, captions)
        if networks and name == WHOLE and len(captions) > 1:
            sets["original"] = real_frames(others, times)
            of_real = clip_moments(networks, real, batch)
            for source, clips in sets.items():
                for measure, value in moment_distances(of_real, clip_moments(networks, clips, batch)).items():
                    results.distances.setdefault(measure, {})[source] = value
    return results


MEASURES = (
    ("complete", "one digit in every frame"),
    ("digit", "digit right, vote of the frames"),
    ("digit_frames", "digit right, single frames"),
    ("colour", "colour right"),
    ("direction", "direction right"),
    ("all_right", "digit, colour and direction right"),
    ("step_error", "displacement error per frame, px"),
    ("midpoint", "interpolated frames from midpoint path, px"),
)
"""Fields of `Summary`, and their titles in the table."""


def format_table(results: Results) -> str:
    """The results as text: one block per set, one column per source, then the target and whether it is met."""
    sources = [source for source in SOURCES if source in results.summaries]
    targets = {(target.set_name, target.measure): target for target in results.config.targets}
    lines = [f"digits, protocol {results.config.hash}", ""]
    for name in results.config.frame_times:
        summaries = [results.summaries[source].get(name) for source in sources]
        rows = [[_title(name), *sources, "target" if "generated" in sources else ""]]
        for measure, title in MEASURES:
            figures = [getattr(summary, measure, None) for summary in summaries]
            if any(figures):
                target = _format_target(results, targets.get((name, measure)))
                rows.append([f"  {title}", *map(_format_figure, figures), target])
        for index in range(NUM_ROUNDS if name == WHOLE else 0):
            rounds = [None if summary is None else summary.midpoint_by_round[index] for summary in summaries]
            rows.append([f"    round {index + 1}", *map(_format_figure, rounds)])
        for measure, values in results.distances.items() if name == WHOLE else ():
            cells = [f"{values[source]:.4g}" if source in values else "-" for source in sources]
            rows.append([f"  {measure.replace('_', ' ')}; original: of other real clips", *cells])
        lines += [*_aligned(rows), ""]
    return "\n".join([*lines, *_aligned(_speed_rows(results, sources))])


def _speed_rows(results: Results, sources: list[str]) -> list[list[str]]:
    """Measured against requested steps: whether the frame-rate text controls the motion."""
    rows = [["mean step in the requested direction, px per frame", "requested", *sources]]
    for name, times in results.config.frame_times.items():
        summaries = [results.summaries[source].get(name) for source in sources]
        for speed, pixels_per_second in SPEEDS.items():
            figures = [None if summary is None else summary.step_by_speed[speed] for summary in summaries]
            requested = pixels_per_second * (times[1] - times[0])
            rows.append([f"  {_title(name)}, {speed}", f"{requested:.2f}", *map(_format_figure, figures)])
    return rows


def _title(name: str) -> str:
    if name == WHOLE:
        return f"whole clips, {len(frame_times())} frames over {SECONDS:g} s"
    return f"{NUM_KEY_FRAMES} key frames over {name}"


def _format_figure(figure: Proportion | Mean | None) -> str:
    return "-" if figure is None else str(figure)


def _format_target(results: Results, target: Target | None) -> str:
    check = results.check(target) if target else None
    if target is None or check is None:
        return ""
    limit, met = check
    number = f"{100 * limit:.1f} %" if target.at_least else f"{limit:g}"
    return f"{'>=' if target.at_least else '<='} {number}: {'met' if met else 'NOT met'}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
