"""Compare generated clips with real ones: every number with its spread, its floor and its ceiling.

floor: the score of other real clips against the same real ones, at the same n; a model that reaches it cannot be told
from real data.
ceiling: the score of the same real clips after a round trip through the image tokenizer. It does not share the bias of
small samples, so it can lie below the floor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cogvideo.evaluation.feature_metrics import inception_score, kernel_distance, precision_and_recall
from cogvideo.evaluation.frechet import MIN_TO_EXTRAPOLATE, Moments, extrapolate, frechet_distance
from cogvideo.evaluation.likelihood import TokenScores
from cogvideo.evaluation.lpips import PairNetwork
from cogvideo.evaluation.measure import Choice, ChosenClip, Measured, Meter, choose_clips
from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.evaluation.packaged_networks import PACKAGED
from cogvideo.evaluation.protocols import NETWORK_OF, WITHOUT_REAL, Protocol, Start
from cogvideo.evaluation.sources import ClipSource, ReconstructedClip
from cogvideo.evaluation.statistics import bootstrap_interval
from cogvideo.evaluation.weight_files import INCEPTION_FEATURES, CaptionNetwork
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.tokenizers.quantise import usage_of_counts

ROLE_OF: dict[str, str] = {
    **{str(name): role for name, role in NETWORK_OF.items()},
    **{f"{role}_distance": role for role in PACKAGED},
}
"""The network whose features each measure compares."""
PACKAGED_DISTANCES = {f"{role}_distance": role for role in PACKAGED}
"""Fréchet distances on the features of packaged networks, available in any protocol."""
TOKEN_NLL = "token_nll"
"""The only number measured on other clips: those scored by `cogvideo score`."""
SHOWN_CLIPS = 4
"""Number of best clips, and of worst clips, shown in a report."""


@dataclass(frozen=True)
class Number:
    """One figure of an evaluation."""

    value: float | None
    """The mean over seeds; None if no clip has a value."""
    count: int
    """Clips measured on each side; with several seeds, the smallest count."""
    spread: float | None = None
    """Standard deviation over seeds."""
    interval: tuple[float, float] | None = None
    """95 %, by bootstrap over clips; only for means over clips."""
    floor: float | None = None
    floor_count: int | None = None
    """Clips on each side of the floor; with fewer than `count`, the floor is biased upwards."""
    ceiling: float | None = None
    limit: float | None = None
    """The value extrapolated to infinitely many clips."""
    points: tuple[tuple[int, float], ...] = ()
    """(clips, distance) points from which `limit` is extrapolated."""


@dataclass
class Comparison:
    """The result of an evaluation."""

    protocol: Protocol
    numbers: dict[str, Number] = field(default_factory=dict)
    seam: int | None = None
    """The frame at which `seam` was measured."""
    notes: list[str] = field(default_factory=list)
    """Caveats for readers of the numbers."""
    best: list[tuple[ChosenClip, float]] = field(default_factory=list)
    worst: list[tuple[ChosenClip, float]] = field(default_factory=list)
    """Clips with their distance to the nearest real one in feature space, or in motion if there is no network."""

    def to_json(self) -> dict[str, Any]:
        numbers = {
            name: {
                "protocol": self.protocol.hash,
                **number.__dict__,
                "points": [list(point) for point in number.points],
            }
            for name, number in self.numbers.items()
        }
        clips = {
            name: [{"clip": chosen.clip.name, "distance": distance} for chosen, distance in shown]
            for name, shown in (("best", self.best), ("worst", self.worst))
        }
        about = {"protocol": self.protocol.to_json(), "seam": self.seam}
        return {**about, "numbers": numbers, **clips, "notes": self.notes}


@dataclass
class _Seed:
    """The measured sets of one seed."""

    generated: Measured
    real: Measured | None
    other_real: Measured | None
    reconstructed: Measured | None
    choice: Choice


def compare(
    meter: Meter,
    generated: ClipSource | None,
    real: ClipSource | None,
    tokenizer: ImageTokenizer | None = None,
    seeds: int = 1,
    scores: TokenScores | None = None,
) -> Comparison:
    """Measure both sides once per seed; each seed draws different clips and starts.

    `tokenizer` gives the ceiling; without `generated`, the reconstructed clips are measured instead.
    All processes call this; only rank 0 returns the numbers.
    Raises: ValueError if a side has too few clips, or one that cannot be read.
    """
    if tokenizer is not None:
        check_tokenizer(meter.protocol, tokenizer)
    runs = [_measure(meter, generated, real, tokenizer, seed) for seed in range(seeds)]
    if meter.processes.rank:
        return Comparison(meter.protocol)
    result = Comparison(meter.protocol, notes=_notes(meter, generated, real, runs[0]), seam=meter.seam)
    of_seeds = [
        _feature_numbers(meter.protocol, run) | _caption_numbers(meter, run) | _pixel_numbers(run) for run in runs
    ]
    for name in dict.fromkeys(name for numbers in of_seeds for name in numbers):
        result.numbers[name] = _joined([numbers[name] for numbers in of_seeds if name in numbers])
    if scores is not None:
        result.numbers[TOKEN_NLL] = Number(
            float(scores.losses.mean()), len(scores.losses), interval=bootstrap_interval(scores.losses)
        )
        result.notes.append(f"the token likelihood comes from the clips scored in {scores.origin}")
    result.best, result.worst = _extremes(runs[0])
    return result


def check_tokenizer(protocol: Protocol, tokenizer: ImageTokenizer) -> None:
    """Raises: ValueError if the protocol's frames cannot make the round trip through the image tokenizer."""
    if protocol.side % tokenizer.compress_rate:
        raise ValueError(
            f"{protocol.name} has {protocol.side}-pixel frames, not a multiple of the image tokenizer's compress rate "
            f"{tokenizer.compress_rate}; leave the tokenizer out"
        )


def check_count(protocol: Protocol, source: ClipSource, choice: Choice, side: str, count: int) -> None:
    """Raises: ValueError if fewer than `count` clips, or fewer than two, could be chosen."""
    if len(choice.clips) < max(count, 2):
        data = f"; it needs {protocol.data}" if side == "real" else ""
        raise ValueError(
            f"{source.origin} has {len(choice.clips)} {side} clips of {protocol.frames} frames "
            f"({choice.too_short} videos are shorter), {protocol.name} needs {max(count, 2)}{data}"
        )


def _measure(
    meter: Meter, generated: ClipSource | None, real: ClipSource | None, tokenizer: ImageTokenizer | None, seed: int
) -> _Seed:
    protocol = meter.protocol
    count = protocol.clips

    def choose(source: ClipSource, start: Start, wanted: int | None) -> Choice:
        return choose_clips(source, protocol, start, wanted, seed, meter.processes)

    ours = None if generated is None else choose(generated, protocol.generated_start, count)
    theirs = None
    if real is not None:
        # Twice as many: the second half gives the floor.
        theirs = choose(real, protocol.real_start, None if count is None else 2 * count)
        if count is None:
            # without generated clips, reconstruct half of the real ones and leave the other half for the floor
            count = len(theirs.clips) // 2 if ours is None else min(len(ours.clips), len(theirs.clips))
    if count is None:
        count = 0 if ours is None else len(ours.clips)
    if generated is not None and ours is not None:
        check_count(protocol, generated, ours, "generated", count)
    if real is not None and theirs is not None:
        # without a fixed number, reconstructions and the floor each take half of the real clips
        check_count(protocol, real, theirs, "real", 4 if ours is None and protocol.clips is None else count)
    rng = np.random.default_rng((seed, 0xF10A))
    generated_set = None
    if ours is not None:
        ours = _subset(ours, rng.permutation(len(ours.clips))[:count])
        generated_set = meter.measure(ours, "generated clips")
    if theirs is None:
        assert ours is not None and generated_set is not None, "there is nothing to measure"
        return _Seed(generated_set, None, None, None, ours)
    order = rng.permutation(len(theirs.clips))
    first, second = _subset(theirs, order[:count]), _subset(theirs, order[count : 2 * count])
    real_set = meter.measure(first, "real clips")
    other = meter.measure(second, "other real clips") if len(second.clips) == count else None
    reconstructed = None
    if tokenizer is not None:
        copies = [
            ChosenClip(ReconstructedClip(clip, tokenizer, meter.prepare), indices) for clip, indices in first.clips
        ]
        reconstructed = meter.measure(Choice(copies, 0), "reconstructed clips", first.clips)
        if ours is None:
            return _Seed(reconstructed, real_set, other, reconstructed, Choice(copies, 0))
    assert ours is not None and generated_set is not None, "reconstructed clips need a tokenizer"
    return _Seed(generated_set, real_set, other, reconstructed, ours)


def _subset(choice: Choice, rows: NDArray[np.int64]) -> Choice:
    return Choice([choice.clips[row] for row in sorted(rows)], choice.too_short)


def _feature_numbers(protocol: Protocol, run: _Seed) -> dict[str, Number]:
    """One seed's measures that need networks."""
    numbers: dict[str, Number] = {}
    n, real, generated = len(run.generated), run.real, run.generated
    if "is" in protocol.metrics:
        sets = (generated, real, run.reconstructed)
        value, floor, ceiling = (None if part is None else _inception(protocol, part) for part in sets)
        numbers["is"] = Number(value, n, floor=floor, floor_count=None if real is None else n, ceiling=ceiling)
    if real is None:
        return numbers
    # Without enough other real clips, the floor compares the two halves of the real ones.
    halves = (real.part(slice(0, n // 2)), real.part(slice(n // 2, 2 * (n // 2))))
    left, right = (real, run.other_real) if run.other_real is not None else halves
    floor_count = len(left)
    distances = [name for name, role in PACKAGED_DISTANCES.items() if role in real.features]
    for metric in (*protocol.metrics, *distances):
        if metric in WITHOUT_REAL:
            continue
        values = [
            _distances(protocol, metric, *pair)
            for pair in ((real, generated), (left, right), (real, run.reconstructed))
        ]
        for name in values[0] or {}:
            value, floor, ceiling = (None if part is None else part[name] for part in values)
            limit, points = None, ()
            if name == "fvd" and n >= MIN_TO_EXTRAPOLATE:
                limit, found = extrapolate(real.features["i3d"], generated.features["i3d"], protocol.divisor)
                points = tuple(found)  # type: ignore[assignment]
            numbers[name] = Number(
                value, n, floor=floor, floor_count=floor_count, ceiling=ceiling, limit=limit, points=points
            )
    return numbers


def _distances(protocol: Protocol, metric: str, real: Measured, other: Measured | None) -> dict[str, float] | None:
    """A measure's values by name; None if there is nothing to compare, or too few clips."""
    if other is None or min(len(real), len(other)) < 2:
        return None
    role = ROLE_OF[metric]
    x, y = real.features[role], other.features[role]
    if role == "inception":  # one row of features per frame, not per clip
        x, y = (values.reshape(-1, INCEPTION_FEATURES) for values in (x, y))
    if metric in ("fvd", "fid") or metric in PACKAGED_DISTANCES:
        return {metric: frechet_distance(Moments.of(x), Moments.of(y), protocol.divisor)}
    if metric in ("kvd", "kid"):
        return {metric: kernel_distance(x, y)}
    if min(len(x), len(y)) <= 3:
        return None
    precision, recall = precision_and_recall(x, y)
    prefix = "frame_" if role == "inception" else ""
    return {f"{prefix}precision": precision, f"{prefix}recall": recall}


def _caption_numbers(meter: Meter, run: _Seed) -> dict[str, Number]:
    """One seed's CLIPSIM, and its baseline with the captions of other clips in place of each clip's own."""
    network = meter.networks.get("clip")
    if "clipsim" not in meter.protocol.metrics or not isinstance(network, CaptionNetwork):
        return {}
    sets = [
        None if part is None or None in part.captions else caption_similarities(network, part)
        for part in (run.generated, run.real, run.reconstructed)
    ]
    if sets[0] is None:
        missing = run.generated.names[run.generated.captions.index(None)]
        raise ValueError(f"CLIPSIM needs captions, and {missing} has none; give --captions FILE")
    numbers = {}
    for row, name in enumerate(("clipsim", "clipsim_shuffled")):
        values = [None if one is None or one[row] is None else one[row] for one in sets]
        clips, floor, ceiling = values
        if clips is not None:
            numbers[name] = Number(
                float(clips.mean()),
                len(clips),
                interval=bootstrap_interval(clips),
                floor=None if floor is None else float(floor.mean()),
                floor_count=None if floor is None else len(floor),
                ceiling=None if ceiling is None else float(ceiling.mean()),
            )
    return numbers


def caption_similarities(
    network: CaptionNetwork, clips: Measured
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Per clip, the mean cosine of its frames with its caption, and with those of all clips whose captions differ.

    The latter is the mean over all ways to shuffle captions; None if all captions are equal.
    """
    captions = [caption or "" for caption in clips.captions]
    texts = sorted(set(captions))
    places = {text: row for row, text in enumerate(texts)}
    rows = np.array([places[caption] for caption in captions])
    known = network.caption_features(texts).astype(np.float64)
    features = clips.features["clip"].astype(np.float64)
    own = (features * known[rows]).sum(axis=1)
    counts = np.bincount(rows, minlength=len(texts))
    others = len(rows) - counts[rows]
    if not others.all():
        return own, None
    return own, (features @ (counts @ known) - counts[rows] * own) / others


def _inception(protocol: Protocol, clips: Measured) -> float:
    splits = protocol.splits if len(clips) >= 10 * protocol.splits else 1
    return inception_score(clips.features["c3d"], splits, protocol.shuffle_seed)[0]


def _pixel_numbers(run: _Seed) -> dict[str, Number]:
    """One seed's means over clips; the floor is the value of real clips, the ceiling that of reconstructed ones."""
    numbers: dict[str, Number] = {}
    real, reconstructed = run.real, run.reconstructed
    real_names = (run.generated if real is None else real).pixels  # measures of pairs follow below
    for name, values in run.generated.pixels.items():
        if name not in real_names:
            continue
        finite = values[np.isfinite(values)]
        numbers[name] = Number(
            _mean(values),
            len(finite),
            interval=bootstrap_interval(finite),
            floor=None if real is None else _mean(real.pixels[name]),
            floor_count=None if real is None else int(np.isfinite(real.pixels[name]).sum()),
            ceiling=None if reconstructed is None else _mean(reconstructed.pixels[name]),
        )
    if reconstructed is None:
        return numbers
    for name in (name for name in reconstructed.pixels if name not in real_names):
        clips = reconstructed.pixels[name]
        finite = clips[np.isfinite(clips)]  # the PSNR of an exactly reconstructed clip is infinite
        numbers[f"reconstructed_{name}"] = Number(_mean(clips), len(finite), interval=bootstrap_interval(finite))
    if reconstructed.codes is not None:
        used, perplexity = usage_of_counts(torch.from_numpy(reconstructed.codes))
        numbers["codebook_used"] = Number(float(used), len(reconstructed))
        numbers["codebook_perplexity"] = Number(float(perplexity), len(reconstructed))
    return numbers


def _mean(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _joined(numbers: list[Number]) -> Number:
    """Combine a number's values of all seeds: means, with the spread over seeds instead of one seed's interval."""
    first, *others = numbers
    if not others:
        return first

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    values = [number.value for number in numbers if number.value is not None]
    floor_counts = [number.floor_count for number in numbers if number.floor_count is not None]
    points = [
        (count, float(np.mean([number.points[row][1] for number in numbers])))
        for row, (count, _) in enumerate(first.points)
    ]
    return Number(
        mean([number.value for number in numbers]),
        min(number.count for number in numbers),
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
        None,
        mean([number.floor for number in numbers]),
        min(floor_counts, default=None),
        mean([number.ceiling for number in numbers]),
        mean([number.limit for number in numbers]),
        tuple(points),
    )


def _extremes(run: _Seed) -> tuple[list[tuple[ChosenClip, float]], list[tuple[ChosenClip, float]]]:
    """The generated clips nearest to any real clip, and those farthest from all real clips."""
    if run.real is None:
        return [], []
    role = next(iter(run.generated.features), None)
    ours, theirs = (
        part.pixels["motion"][:, None] if role is None else part.features[role].astype(np.float64)
        for part in (run.generated, run.real)
    )
    nearest = np.array([np.sqrt(((theirs - row) ** 2).sum(axis=1).min()) for row in ours])
    order = np.argsort(nearest, kind="stable")
    shown = [(run.choice.clips[row], float(nearest[row])) for row in order]
    return shown[:SHOWN_CLIPS], shown[SHOWN_CLIPS:][-SHOWN_CLIPS:][::-1]


def _notes(meter: Meter, generated: ClipSource | None, real: ClipSource | None, run: _Seed) -> list[str]:
    notes = []
    if generated is None:
        notes.append("no generated clips were given: all values are those of the reconstructed real clips")
    elif generated.lossy:
        notes.append("the generated clips are video files: lossy coding shifts every number; use tokens or pictures")
    if real is not None and generated is not None and real.origin == generated.origin:
        notes.append("the real and the generated clips come from the same folder, so these numbers are meaningless")
    used: list[FeatureNetwork | PairNetwork] = [*meter.networks.values(), *meter.pair_networks.values()]
    for network in used:
        if network.trusted:
            notes.append(f"the {network.role} network is not a known one (SHA-256 {network.sha256})")
    if real is not None and run.other_real is None and meter.networks:
        n = len(run.generated)
        notes.append(f"there are fewer than {2 * n} real clips, so the floor compares {n // 2} with {n // 2}")
    if run.real is not None and run.real.pixels["frozen"].mean() < 0.5 <= run.generated.pixels["frozen"].mean():
        notes.append("half or more of the generated clips do not move")
    return notes
