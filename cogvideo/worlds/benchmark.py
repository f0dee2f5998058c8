"""Shared code of the synthetic-world benchmarks: clip sets, sampling, results, targets, tables and the report.

A world supplies captions, the real clip of each, and probes (`Benchmark`). Clips from three sources are scored in the
same way: clips generated from the captions; the real clips after a round trip through the tokenizer, the ceiling for
any generator; and the real clips themselves, which show what the probes can detect.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.evaluation.packaged_networks import clip_moments, moment_distances
from cogvideo.evaluation.protocols import HASH_DIGITS
from cogvideo.evaluation.statistics import Mean, Proportion

if TYPE_CHECKING:
    from torch import Tensor

    from cogvideo.inference.engine import Progress
    from cogvideo.sampling.config import SampleConfig
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.tokenizers.image import ImageTokenizer

NUM_KEY_FRAMES = 5
NUM_ROUNDS = 3  # rounds of interpolation: 5 -> 9 -> 17 -> 33 frames
WHOLE_SECONDS = 4.0
WHOLE = "whole"
SOURCES = ("generated", "reconstructed", "original")
SHOWN = 16
"""Clips of each set that a report shows."""
FRAMES_SHOWN = 9

Frames = NDArray[np.uint8]  # (clips, frames, side, side, 3)
Figure = Proportion | Mean


@dataclass(frozen=True)
class ClipSet:
    """Captions, with the length and the frame times of their clips."""

    name: str
    captions: tuple[str, ...]
    seconds: float
    """The requested clip length."""
    rounds: int = 0
    """Rounds of interpolation; 0: key frames only."""
    continuations: int = 0
    """How many times each clip is continued, by `seconds` each time."""

    @property
    def times(self) -> NDArray[np.float64]:
        """(frames,) seconds."""
        parts = 1 + self.continuations
        return np.linspace(0.0, parts * self.seconds, parts * (NUM_KEY_FRAMES - 1) * 2**self.rounds + 1)

    @property
    def title(self) -> str:
        kind = "continued clips" if self.continuations else "whole clips" if self.rounds else ""
        frames = f"{kind}, {len(self.times)} frames" if kind else f"{NUM_KEY_FRAMES} key frames"
        return f"{frames} over {self.times[-1]:g} s"


Generate = Callable[[ClipSet], Frames | None]
"""Maps a set to its clips, or to None if the model cannot make them."""


@dataclass(frozen=True)
class Target:
    """A value that a measure of the generated clips should reach."""

    measure: str
    """A key of `Summary.figures`."""
    set_name: str
    limit: float
    at_least: bool
    """Whether the figure must be at least `limit`; otherwise at most."""
    of_ceiling: bool = False
    """Whether `limit` is a fraction of the reconstructed clips' figure."""


class Summary(Protocol):
    """Scores of a set of clips, each with its uncertainty."""

    @property
    def figures(self) -> Mapping[str, Figure | None]:
        """The scores by measure."""
        ...

    @property
    def failed(self) -> Sequence[str]:
        """For each clip, the names of the probes that it fails, separated by commas; empty if none."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Benchmark(ABC):
    """A world's captions, their real clips, and its probes. The fields determine every number."""

    name: ClassVar[str]
    side: ClassVar[int]
    """Side of a frame in pixels."""
    rules: ClassVar[int]
    """Version of the probes and sets; raised when a change to them changes the numbers."""
    measures: ClassVar[Sequence[tuple[str, str]]]
    """Keys of `Summary.figures`, and their titles in the table."""

    num_prompts: int = 200
    """Test captions, about half Chinese and half English."""
    seed: int = 0
    """Seed for drawing the captions."""

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} leaves nothing to score; give 1 or more")
        if self.seed < 0:
            raise ValueError(f"the captions' seed={self.seed} is negative; give 0 or more")

    @property
    def hash(self) -> str:
        """Hash, in hex, of everything that affects a number; compare numbers only if their hashes are equal."""
        values = {**asdict(self), "rules": self.rules}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]

    @property
    @abstractmethod
    def sets(self) -> dict[str, ClipSet]:
        """The clip sets by name: key frames at each clip length, then whole clips."""

    @property
    @abstractmethod
    def targets(self) -> Sequence[Target]:
        """What weights trained on this world are expected to reach."""

    @abstractmethod
    def real(self, clips: ClipSet) -> Frames:
        """The real clips of the set's captions."""

    @abstractmethod
    def others(self) -> Frames:
        """Whole real clips of other captions."""

    @abstractmethod
    def summarise(self, clips: ClipSet, frames: Frames) -> Summary:
        """Score clips of a set."""

    def motion_rows(self, results: Results, sources: Sequence[str]) -> list[list[str]]:
        """An additional last table, header row first; empty if there is none."""
        return []


def set_name(seconds: float) -> str:
    """The name of the set of key frames over a clip length, such as "4 s"."""
    return f"{seconds:g} s"


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


def generate_with(
    pipeline: Pipeline, config: SampleConfig, side: int, *, weights: str = "", cache: Path | None = None
) -> Generate:
    """Make a function that samples a set with a pipeline. Whole clips need stage 2; without it they are None.

    `weights`: the bundle's fingerprint, under which sampled tokens are cached in the folder `cache`.
    Raises: ValueError if the side of the pipeline's frames is not `side` pixels, or if it does not make
    NUM_KEY_FRAMES key frames.
    """
    from cogvideo.evaluation.generation import sample_groups
    from cogvideo.sampling.prompts import prompt_keys

    own = pipeline.sequential.config.frame_side * pipeline.image_tokenizer.compress_rate
    if own != side:
        raise ValueError(
            f"the model makes frames of {own}x{own} pixels, this world's are {side}x{side}; "
            "give a model that was trained on this world"
        )
    if pipeline.sequential.config.num_frames != NUM_KEY_FRAMES:
        raise ValueError(
            f"the model makes {pipeline.sequential.config.num_frames} key frames per clip, but the benchmark scores "
            f"{NUM_KEY_FRAMES}; give a model that makes {NUM_KEY_FRAMES}"
        )

    def generate(clips: ClipSet) -> Frames | None:
        if clips.rounds and pipeline.interpolation is None:
            return None
        settings = replace(config, seconds=clips.seconds, rounds=clips.rounds, samples_per_prompt=1)
        keys = prompt_keys(settings.seed, clips.captions, 1)
        encoded = pipeline.encode_prompts([key.caption for key in keys], settings)

        def draw(rows: slice, update: Progress) -> Tensor:
            tokens: Tensor | None = None
            while tokens is None or tokens.shape[1] < len(clips.times):
                *_, last = pipeline.stages(keys[rows], encoded[rows], settings, previous_frames=tokens, progress=update)
                tokens = last.tokens
            return tokens[:, : len(clips.times)]

        about = {"continuations": clips.continuations} if clips.continuations else None
        tokens = sample_groups(
            pipeline, settings, keys, len(clips.times), draw, weights=weights, about=lambda rows: about, cache=cache
        )
        return pipeline.decode(tokens)

    return generate


@dataclass
class Results:
    """Summaries by source and set, filled as clips are scored."""

    benchmark: Benchmark
    summaries: dict[str, dict[str, Summary]] = field(default_factory=dict)
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    """By measure and source: distances of whole clips from the real ones. For "original", other real clips are compared
    with them, which gives the floor."""
    shown: dict[str, dict[str, Frames]] = field(default_factory=dict)
    """By source and set: the first clips, for the report."""

    def add(self, source: str, clips: ClipSet, frames: Frames) -> None:
        """Score one set of clips and keep its summary."""
        self.summaries.setdefault(source, {})[clips.name] = self.benchmark.summarise(clips, frames)
        self.shown.setdefault(source, {})[clips.name] = frames[:SHOWN].copy()

    def figure(self, source: str, set_name: str, measure: str) -> Figure | None:
        summary = self.summaries.get(source, {}).get(set_name)
        found = None if summary is None else summary.figures.get(measure)
        return found if found is not None and found.total else None

    @property
    def sources(self) -> list[str]:
        return [source for source in SOURCES if source in self.summaries]

    def check(self, target: Target) -> tuple[float, bool] | None:
        """The target's limit and whether the generated clips reach it; None if they, or the ceiling, are missing.

        A target whose measure applies to real clips but to no generated clip is not reached; if it applies to neither,
        the result is None.
        """
        got, real, ceiling = (
            self.figure(source, target.set_name, target.measure)
            for source in ("generated", "original", "reconstructed")
        )
        made = target.set_name in self.summaries.get("generated", {})
        if not made or (got is None and real is None) or (target.of_ceiling and ceiling is None):
            return None
        limit = target.limit * (ceiling.value if target.of_ceiling and ceiling is not None else 1.0)
        return limit, got is not None and (got.value >= limit if target.at_least else got.value <= limit)

    def to_json(self) -> dict[str, object]:
        checks = []
        for target in self.benchmark.targets:
            check = self.check(target)
            if check is not None:
                checks.append({**asdict(target), "limit": check[0], "met": check[1]})
        by_source = {
            source: {name: summary.to_json() for name, summary in sets.items()}
            for source, sets in self.summaries.items()
        }
        protocol = {"hash": self.benchmark.hash, "name": self.benchmark.name}
        config = asdict(self.benchmark)
        return {"protocol": protocol, "config": config, **by_source, "distances": self.distances, "targets": checks}


def run_benchmark(
    benchmark: Benchmark,
    tokenizer: ImageTokenizer | None,
    generate: Generate | None,
    log: Callable[[str], None] = lambda line: None,
    *,
    networks: Mapping[str, FeatureNetwork] | None = None,
    batch: int = 8,
) -> Results:
    """Score generated, reconstructed and real clips of the same captions.

    Without `tokenizer` there are no reconstructed clips, without `generate` no generated ones. `networks`, by role,
    measure distances between whole clips, `batch` clips at a time, if there are two or more clips. `log` is called with
    one line per set.
    """
    results = Results(benchmark)
    for clips in benchmark.sets.values():
        log(f"{len(clips.captions)} clips, {clips.title}")
        real = benchmark.real(clips)
        results.add("original", clips, real)
        made = {}
        if tokenizer is not None:
            made["reconstructed"] = reconstruct(tokenizer, real)
        frames = generate(clips) if generate is not None else None
        if frames is not None:
            made["generated"] = frames
        for source, found in made.items():
            results.add(source, clips, found)
        if networks and clips.name == WHOLE and len(clips.captions) > 1:
            made["original"] = benchmark.others()
            of_real = clip_moments(networks, real, batch)
            for source, found in made.items():
                for measure, value in moment_distances(of_real, clip_moments(networks, found, batch)).items():
                    results.distances.setdefault(measure, {})[source] = value
    return results


def tables(results: Results) -> list[list[list[str]]]:
    """The results as tables of cells, one per set: a column per source, then the target and whether it is met."""
    benchmark, sources = results.benchmark, results.sources
    targets = {(target.set_name, target.measure): target for target in benchmark.targets}
    blocks = []
    for name, clips in benchmark.sets.items():
        count = len(clips.captions)
        title = clips.title if count == benchmark.num_prompts else f"{clips.title}, {count} clips"
        rows = [[title, *sources, "target" if "generated" in sources else ""]]
        for measure, label in benchmark.measures:
            figures = [results.figure(source, name, measure) for source in sources]
            if any(figures):
                target = _format_target(results, targets.get((name, measure)))
                rows.append([f"  {label}", *(format_figure(figure, count) for figure in figures), target])
        for measure, values in results.distances.items() if name == WHOLE else ():
            cells = [f"{values[source]:.4g}" if source in values else "-" for source in sources]
            rows.append([f"  {measure.replace('_', ' ')}; original: other real clips", *cells, ""])
        blocks.append(rows)
    motion = benchmark.motion_rows(results, sources)
    return [*blocks, motion] if motion else blocks


def format_table(results: Results) -> str:
    """The results as text."""
    lines = [f"{results.benchmark.name}, protocol {results.benchmark.hash}"]
    for rows in tables(results):
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


def write_report(path: Path, results: Results) -> None:
    """Write an HTML page with the tables, and the first clips of each set by source. Raises: OSError."""
    from cogvideo.evaluation.html_report import HtmlReport
    from cogvideo.media.contact_sheet import contact_sheet

    benchmark = results.benchmark
    page = HtmlReport(f"{benchmark.name}: clips of {benchmark.num_prompts} test captions")
    page.text(f"Protocol {benchmark.hash}; compare only numbers with the same hash. In brackets: 95 % intervals.")
    for rows in tables(results):
        page.table([[cell.strip() for cell in row] for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        for clips in benchmark.sets.values():
            page.section(f"Clips: {clips.title}")
            for source in results.sources:
                if clips.name not in results.shown[source]:
                    continue
                shown = results.shown[source][clips.name]
                places = np.linspace(0, shown.shape[1] - 1, min(FRAMES_SHOWN, shown.shape[1])).round().astype(int)
                failed = results.summaries[source][clips.name].failed
                words = [
                    f"{caption}{f'   FAILED: {wrong}' if wrong else ''}"
                    for caption, wrong in zip(clips.captions, failed, strict=True)
                ]
                sheet = Path(folder) / f"{clips.name}-{source}.png".replace(" ", "")
                contact_sheet(sheet, list(shown[:, places]), words[: len(shown)], scale=max(1, 128 // benchmark.side))
                page.pictures([(sheet, source)])
        page.write(path)


def format_figure(figure: Figure | None, num_clips: int = 0) -> str:
    """Format a figure, with its number of trials if that is below `num_clips`, since probes leave some clips out."""
    if figure is None:
        return "-"
    return f"{figure}, n = {figure.total}" if 0 < figure.total < num_clips else str(figure)


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
