"""A comparison as a text table, and as an HTML page with curves and the best and worst clips."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from cogvideo.evaluation.compare import TOKEN_NLL, Comparison, Number
from cogvideo.evaluation.html_report import HtmlReport
from cogvideo.evaluation.measure import ChosenClip, Meter
from cogvideo.evaluation.pixel_metrics import DRIFT_FRAMES
from cogvideo.evaluation.protocols import check_comparable
from cogvideo.evaluation.statistics import Mean, Proportion
from cogvideo.files import Count, checked, read_json
from cogvideo.media.contact_sheet import contact_sheet

HEADER = ("measure", "value", "spread", "n", "floor", "ceiling", "at infinite n", "protocol")
BENCHMARKS = ("digits", "bodies")
"""Worlds whose results are tables of probes."""
SOURCES = ("generated", "reconstructed", "original")
"""Whose clips a benchmark measures; the first that two results have in common is compared."""
FRAMES_SHOWN = 8
SHEET_WIDTH = 640
"""Pixels; a clip's frames are subsampled and enlarged to about this width in total."""

TITLES = {
    "fvd": "FVD (lower is better)",
    "kvd": "KVD (lower is better)",
    "appearance_distance": "appearance distance (lower is better)",
    "motion_distance": "motion distance (lower is better)",
    "precision": "precision (higher is better)",
    "recall": "recall (higher is better)",
    "fid": "FID of frames (lower is better)",
    "kid": "KID of frames (lower is better)",
    "frame_precision": "precision of frames (higher is better)",
    "frame_recall": "recall of frames (higher is better)",
    "clipsim": "CLIPSIM (higher is better)",
    "clipsim_shuffled": "CLIPSIM with captions of other clips (the baseline)",
    "is": "Inception Score (higher is better)",
    "motion": "motion per frame, of 255 (as real)",
    "motion_at_fps": "motion at a fixed rate, of 255 (as real)",
    "frozen": "share of frozen clips (lower is better)",
    "flicker": "flicker relative to motion (as real)",
    **{f"drift_{distance}": f"drift over {distance} frames, of 255 (as real)" for distance in DRIFT_FRAMES},
    "warp_residual": "residual after warping by flow, relative to motion (as real)",
    "seam": "step at the seam, of the usual one (1 is best)",
    "reconstructed_psnr": "PSNR of reconstructed clips, dB",
    "reconstructed_ssim": "SSIM of reconstructed clips",
    "reconstructed_lpips_alex": "LPIPS (AlexNet, input -1 to 1) of reconstructed clips",
    "reconstructed_lpips_vgg": "LPIPS (VGG, input -1 to 1) of reconstructed clips",
    "codebook_used": "share of the codebook used by reconstructed clips",
    "codebook_perplexity": "perplexity of the codebook's use",
    TOKEN_NLL: "negative log-likelihood per token, nats (lower is better)",
}


def rows_of(result: Comparison) -> list[tuple[str, ...]]:
    """The table, its header first. Each row carries the protocol's hash."""
    rows: list[tuple[str, ...]] = [HEADER]
    for name, number in result.numbers.items():
        rows.append(
            (
                TITLES.get(name, name),
                _figure(number.value),
                _spread(number),
                str(number.count),
                _figure(number.floor)
                + ("" if number.floor_count in (None, number.count) else f" ({number.floor_count})"),
                _figure(number.ceiling),
                _figure(number.limit),
                result.protocol.hash,
            )
        )
    return rows


def format_comparison(result: Comparison) -> str:
    """The table as text, followed by the notes."""
    rows = rows_of(result)
    head = f"{result.protocol.name}, protocol {result.protocol.hash}"
    return "\n".join([head, *_aligned(rows), *(f"note: {note}" for note in result.notes)])


class NumberRecord(TypedDict):
    """A number in a results file."""

    count: int
    protocol: str
    value: float | None


class ProtocolRecord(TypedDict):
    hash: str
    name: str


class ResultRecord(TypedDict):
    """The parts read from a file written by `--json`."""

    protocol: ProtocolRecord
    numbers: dict[str, NumberRecord]
    seam: NotRequired[int | None]


class BenchmarkRecord(TypedDict):
    """The part that the results of every benchmark have."""

    protocol: ProtocolRecord


class ProportionRecord(TypedDict):
    right: Count
    total: Count


class MeanRecord(TypedDict):
    value: float | None
    standard_error: float | None
    total: Count


def format_files(left: Path, right: Path) -> str:
    """Two results files side by side, of a protocol or of a benchmark.

    Raises: OSError; ValueError if one is not a results file, or if their protocols, clip counts or seams differ.
    """
    records = [read_json(path, dict[str, Any]) for path in (left, right)]
    if any(map(_is_of_benchmark, records)):
        return _format_benchmarks((left, right), records)
    first, second = (checked(record, ResultRecord, path) for record, path in zip(records, (left, right), strict=True))
    check_comparable(first["protocol"]["hash"], second["protocol"]["hash"])
    clips = [
        max((number["count"] for name, number in one["numbers"].items() if name != TOKEN_NLL), default=0)
        for one in (first, second)
    ]
    if clips[0] != clips[1]:
        raise ValueError(
            f"{left} has numbers from {clips[0]} clips, {right} from {clips[1]}; measure both with the same --clips"
        )
    seams = [one.get("seam") for one in (first, second)]
    if seams[0] != seams[1]:
        words = ["no --seam" if seam is None else f"--seam {seam}" for seam in seams]
        raise ValueError(f"{left} was measured with {words[0]}, {right} with {words[1]}; measure both the same way")
    rows = [("measure", str(left), str(right), "protocol")]
    for name, number in first["numbers"].items():
        if name in second["numbers"]:
            other = second["numbers"][name]
            check_comparable(number["protocol"], other["protocol"])
            title = TITLES.get(name, name)
            rows.append((title, _figure(number["value"]), _figure(other["value"]), number["protocol"]))
    return "\n".join(_aligned(rows))


def _is_of_benchmark(record: dict[str, Any]) -> bool:
    """Whether a file holds the results of a benchmark, not those of a protocol or something else."""
    protocol = record.get("protocol")
    return "numbers" not in record and isinstance(protocol, dict) and protocol.get("name") in BENCHMARKS


def _format_benchmarks(paths: Sequence[Path], records: Sequence[dict[str, Any]]) -> str:
    """The figures of two results of one benchmark, set by set. Raises: ValueError if they cannot be compared."""
    for path, record in zip(paths, records, strict=True):
        if not _is_of_benchmark(record):
            raise ValueError(f"{path} does not hold results of a benchmark; compare two of the same kind")
    hashes = [
        checked(record, BenchmarkRecord, path)["protocol"]["hash"] for path, record in zip(paths, records, strict=True)
    ]
    check_comparable(*hashes)
    source = next((source for source in SOURCES if all(source in record for record in records)), None)
    if source is None:
        raise ValueError(f"{paths[0]} and {paths[1]} have no clips of the same source; measure both alike")
    first, second = (
        checked(record[source], dict[str, dict[str, Any]], path) for path, record in zip(paths, records, strict=True)
    )
    rows = [(f"{source} clips", *map(str, paths), "protocol")]
    for name, figures in first.items():
        others = dict(_figures(second.get(name, {}), paths[1]))
        for measure, figure in _figures(figures, paths[0]):
            if measure in others and (figure.total or others[measure].total):
                rows.append((f"{name}: {measure}", str(figure), str(others[measure]), hashes[0]))
    return "\n".join(_aligned(rows))


def _figures(found: dict[str, Any], path: Path) -> Iterator[tuple[str, Proportion | Mean]]:
    """The figures of one set by measure; those of groups, such as speeds, by measure and group. Raises: ValueError."""
    for name, entry in found.items():
        title = name.replace("_", " ")
        if not isinstance(entry, dict):
            continue
        if "total" not in entry:
            yield from ((f"{title}, {group}", figure) for group, figure in _figures(entry, path))
        elif "right" in entry:
            proportion = checked(entry, ProportionRecord, path)
            right, total = proportion["right"], proportion["total"]
            if right > total:
                raise ValueError(f"{path}: {name} is right {right} of {total} times; expected at most {total}")
            yield title, Proportion(right, total)
        else:
            mean = checked(entry, MeanRecord, path)
            value, error = (math.nan if x is None else x for x in (mean["value"], mean["standard_error"]))
            yield title, Mean(value, error, mean["total"])


def write_report(path: Path, result: Comparison, meter: Meter) -> None:
    """Write the HTML page. Raises: OSError; ValueError for a clip that can no longer be read."""
    page = HtmlReport(f"{result.protocol.name}: generated against real clips")
    page.text(f"{result.protocol.about}. Protocol {result.protocol.hash}; compare only numbers with the same hash.")
    for note in result.notes:
        page.text(f"Note: {note}.")
    page.table(rows_of(result))
    page.text(
        "floor: other real clips against the same real ones, or the real clips' own value. ceiling: the real clips "
        "after a round trip through the image tokenizer. spread: standard deviation over seeds, or the 95 % interval "
        "of a mean over clips."
    )
    with tempfile.TemporaryDirectory() as folder:
        curves = _curves(Path(folder), result)
        if curves:
            page.section("Curves")
            page.pictures(curves)
        for title, clips in (("Worst clips", result.worst), ("Best clips", result.best)):
            if clips:
                page.section(title)
                page.text("By the distance to the nearest real clip.")
                page.pictures(_sheets(Path(folder), title, clips, meter))
        page.section("Protocol")
        page.preformatted("\n".join(f"{key} = {value}" for key, value in result.protocol.to_json().items()))
        page.write(path)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _sheets(
    folder: Path, title: str, clips: Sequence[tuple[ChosenClip, float]], meter: Meter
) -> list[tuple[Path, str]]:
    pictures = []
    for number, (chosen, distance) in enumerate(clips):
        path = folder / f"{title[:5]}-{number}.png"
        frames = meter.frames(chosen)
        shown = frames[:: max(1, -(-len(frames) // FRAMES_SHOWN))]
        contact_sheet(path, [shown], scale=max(1, SHEET_WIDTH // (len(shown) * shown.shape[2])))
        pictures.append((path, f"{chosen.clip.name}, {distance:.4g}"))
    return pictures


def _curves(folder: Path, result: Comparison) -> list[tuple[Path, str]]:
    """Plots of drift over distance and of FVD over 1 / n, where available."""
    pictures = []
    drifts = [(k, result.numbers[name]) for k in DRIFT_FRAMES if (name := f"drift_{k}") in result.numbers]
    lines: dict[str, list[tuple[float, float]]] = {
        label: [
            (float(distance), value) for distance, number in drifts if (value := getattr(number, attribute)) is not None
        ]
        for label, attribute in (("generated", "value"), ("real", "floor"), ("reconstructed", "ceiling"))
    }
    if any(lines.values()):
        pictures.append((_plot(folder / "drift.png", lines, "frames apart"), "drift: mean difference of thumbnails"))
    fvd = result.numbers.get("fvd")
    if fvd is not None and fvd.limit is not None:
        points = [(0.0, fvd.limit), *((1 / n, distance) for n, distance in reversed(fvd.points))]
        pictures.append((_plot(folder / "fvd.png", {"FVD": points}, "1 / clips"), "FVD, extrapolated to infinite n"))
    return pictures


def _plot(path: Path, lines: dict[str, list[tuple[float, float]]], x_title: str) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
    axes.set_xlabel(x_title)
    axes.legend()
    figure.savefig(path)
    return path


def _spread(number: Number) -> str:
    if number.interval is not None:
        return f"[{number.interval[0]:.4g}, {number.interval[1]:.4g}]"
    return "" if number.spread is None else f"± {number.spread:.3g}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
