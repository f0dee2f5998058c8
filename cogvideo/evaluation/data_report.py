"""A page for inspecting prepared data before training: clips, histograms, skipped items, near-duplicates, captions.

Counts of rows and skipped items cover everything; caption statistics cover at most MAX_CAPTIONS captions. Pictures and
measures come from a sample of the videos, which are decoded again, one at a time.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from cogvideo.data.captions import Caption
from cogvideo.data.extract import crop_frames
from cogvideo.data.prepare import Preparation
from cogvideo.data.shards import Shard, read_manifest
from cogvideo.data.statistics import MAX_CAPTIONS, spread
from cogvideo.evaluation.html_report import HtmlReport
from cogvideo.evaluation.pixel_metrics import frame_psnr
from cogvideo.files import read_json
from cogvideo.locks import lock_folder
from cogvideo.logs import progress
from cogvideo.media.contact_sheet import contact_sheet
from cogvideo.media.similarity import clip_distances, motion, thumbnails
from cogvideo.text import LANGUAGES, language

Reconstruct = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Maps frames (N, H, W, 3) to the same frames after a round trip through the image tokenizer."""

FILE = "report.html"
MAX_VIDEOS = 200
MAX_CLIPS_PER_VIDEO = 4
MAX_PICTURED = 16
MAX_EXTREMES = 4
"""Number of least moving clips, and of most similar pairs, shown."""
MAX_REASONS, MAX_EXAMPLES = 30, 3
MAX_SIDE = 96
"""Pixels; larger frames are scaled down for the page."""
PICTURE_WIDTH = 150
"""CSS pixels of a single-frame picture, several of which share a row."""
MAX_CAPTION = 240
"""Characters of a caption, or of a reason for skipping, shown on the page."""
NEAR_STATIC, NEAR_DUPLICATE = 1.0, 1.0
"""Thresholds used for the page's counts, unless the folder was prepared with its own."""


@dataclass(frozen=True)
class _Clip:
    """A clip that was measured."""

    video: str
    caption: str
    seconds: float
    motion: float
    thumbnails: NDArray[np.uint8]
    """(frames, 8, 8, 3)."""
    frames: NDArray[np.uint8]
    """At most MAX_SIDE high and wide."""
    rebuilt: NDArray[np.uint8] | None
    psnr: NDArray[np.float64]
    """(frames,) dB; empty without an image tokenizer."""

    @property
    def title(self) -> str:
        return self.caption if len(self.caption) <= MAX_CAPTION else self.caption[:MAX_CAPTION] + "…"

    @property
    def length(self) -> str:
        return f"{self.seconds:g} s" if self.seconds else "single frame"


@dataclass
class _Sample:
    """Measurements of the sampled videos."""

    clips: list[_Clip] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    fps: list[float] = field(default_factory=list)
    unreadable: int = 0
    videos: int = 0


def write_report(
    preparation: Preparation,
    reconstruct: Reconstruct | None = None,
    encode_text: Callable[[str], list[int]] | None = None,
) -> Path:
    """Write report.html into a prepared folder and return its path. The folder's other files stay as they are.

    Raises: OSError; ValueError if the folder is in use or not finished.
    """
    with lock_folder(preparation.out):
        return _write_report(preparation, reconstruct, encode_text)


def _write_report(
    preparation: Preparation, reconstruct: Reconstruct | None, encode_text: Callable[[str], list[int]] | None
) -> Path:
    manifest, out = read_manifest(preparation.out, preparation.kind), preparation.out
    sample = _measure(preparation, Shard(out, manifest).load("rows.npy"), reconstruct)
    report = HtmlReport("Prepared data")
    report.text(
        f"{manifest['rows']:,} rows from {preparation.num_videos:,} videos and {len(preparation.captions):,} captions; "
        f"{manifest['skipped']:,} captions and records were skipped. Counts cover all rows and skipped "
        f"records unless a sample is mentioned. Pictures and measurements come from {sample.videos:,} of the "
        f"{preparation.num_videos:,} videos, evenly spaced, with at most {MAX_CLIPS_PER_VIDEO} clips each: "
        f"{len(sample.clips):,} clips."
    )
    if sample.unreadable:
        report.text(f"{sample.unreadable:,} of the sampled videos could not be read or yielded no clip.")
    if manifest["tokenizer"] is not None:
        report.text(f"Image tokenizer: {json.dumps(manifest['tokenizer'])}")
    with tempfile.TemporaryDirectory() as temporary:
        pictures = _Pictures(Path(temporary))
        _add_clips(report, sample, pictures)
        _add_histograms(report, sample, manifest)
        _add_captions(report, preparation, encode_text)
        _add_skipped(report, out / "skipped.jsonl")
        if preparation.kind == "tokens":
            clips = preparation.config.clips
            _add_near_static(report, sample, pictures, clips.min_motion)
            _add_near_duplicates(report, sample, pictures, clips.min_distance)
    report.section("Settings")
    report.preformatted(json.dumps(read_json(out / "plan.json"), indent=2, ensure_ascii=False))
    report.write(out / FILE)
    return out / FILE


def _measure(preparation: Preparation, stored: NDArray[Any], reconstruct: Reconstruct | None) -> _Sample:
    """Decode the clips of the sampled videos again. `stored`: the folder's rows, which say which clips were kept."""
    sample, crop_pixels = _Sample(), preparation.config.crop_pixels
    total = min(MAX_VIDEOS, preparation.num_videos)
    to_rebuild = -(-total // MAX_PICTURED)  # one clip of every `to_rebuild`-th video is reconstructed
    with progress(total, "sampling for the report", "videos") as bar:
        for number, job in enumerate(preparation.sample_jobs(MAX_VIDEOS)):
            bar.update(1)
            sample.videos += 1
            try:
                info = preparation.extractor.probe(job)
                plan, frames = preparation.extractor.decode(job)
            except ValueError:
                sample.unreadable += 1
                continue
            sample.seconds.append(info.duration)
            sample.sizes.append(f"{info.width}x{info.height}")
            if info.duration:
                sample.fps.append((len(info.seconds) - 1) / info.duration)
            captions = dict(job.captions)
            kept = set(stored[np.isin(stored["caption"], list(captions))].tolist())
            rows = [row for row, entry in zip(plan.rows, plan.entries(), strict=True) if entry in kept]
            sample.unreadable += not rows
            chosen = spread(len(rows), MAX_CLIPS_PER_VIDEO)
            for place, row in enumerate(chosen.tolist()):
                caption, clip = rows[row]
                pixels = crop_frames(frames[list(clip.frames)], crop_pixels)
                wanted = reconstruct is not None and place == number % len(chosen) and number % to_rebuild == 0
                rebuilt = reconstruct(pixels) if reconstruct is not None and wanted else None
                sample.clips.append(_measured(job.video, captions[caption], clip.seconds, pixels, rebuilt))
    return sample


def _measured(
    video: str, caption: Caption, seconds: float, frames: NDArray[np.uint8], rebuilt: NDArray[np.uint8] | None
) -> _Clip:
    psnr = np.zeros(0) if rebuilt is None else frame_psnr(frames, rebuilt)
    moves = motion(frames)
    small = None if rebuilt is None else _small(rebuilt)
    return _Clip(video, caption.text, seconds, moves, thumbnails(frames), _small(frames), small, psnr)


def _small(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if max(frames.shape[1:3]) <= MAX_SIDE:
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).resize((MAX_SIDE, MAX_SIDE))) for frame in frames])


class _Pictures:
    """Contact sheets of clips, as files in a temporary folder."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0

    def sheet(self, rows: Sequence[NDArray[np.uint8]]) -> Path:
        self._count += 1
        path = self._folder / f"{self._count}.png"
        contact_sheet(path, rows, scale=max(1, MAX_SIDE // rows[0].shape[2]))
        return path


def _add_clips(report: HtmlReport, sample: _Sample, pictures: _Pictures) -> None:
    report.section("Clips as training sees them")
    rebuilt = [clip for clip in sample.clips if clip.rebuilt is not None]
    clips = _evenly(rebuilt or sample.clips, MAX_PICTURED)
    if not clips:
        return report.text("No sampled video could be read.")
    shown = f"{len(clips)} clips."
    if clips[0].frames.shape[1] == MAX_SIDE:
        shown += f" Frames above {MAX_SIDE} pixels are shown at that size."
    if rebuilt:
        psnr = np.concatenate([clip.psnr for clip in rebuilt])
        shown += (
            " Above, the frames cut from the video; below, the same after the image tokenizer, which is what training "
            f"sees. PSNR over {len(psnr)} frames: mean {psnr.mean():.1f} dB, from {psnr.min():.1f} to {psnr.max():.1f}."
        )
    report.text(shown)
    width = PICTURE_WIDTH if all(len(clip.frames) == 1 for clip in clips) else None
    report.pictures([(_sheet(pictures, clip), _describe(clip)) for clip in clips], width)


def _sheet(pictures: _Pictures, clip: _Clip) -> Path:
    return pictures.sheet([clip.frames] if clip.rebuilt is None else [clip.frames, clip.rebuilt])


def _describe(clip: _Clip) -> str:
    psnr = f", PSNR {clip.psnr.mean():.1f} dB" if len(clip.psnr) else ""
    return f"{clip.title} — {clip.video}, {clip.length}{psnr}"


def _add_histograms(report: HtmlReport, sample: _Sample, manifest: dict[str, Any]) -> None:
    report.section("Clip lengths chosen")
    lengths = sorted(manifest["rows_by_seconds"].items(), key=lambda item: float(item[0]))
    names = [("single frame" if seconds == "0" else f"{seconds} s", count) for seconds, count in lengths]
    report.histogram("clip length", names)
    report.section("Source videos")
    report.text(f"From the {len(sample.seconds):,} sampled videos that could be read.")
    report.histogram("length in seconds", _binned(sample.seconds))
    report.histogram("size", [(size, count) for size, count in Counter(sample.sizes).most_common(12)])
    report.histogram("frames per second", _binned(sample.fps))


def _add_captions(report: HtmlReport, preparation: Preparation, encode_text: Callable[[str], list[int]] | None) -> None:
    captions, total = preparation.captions, len(preparation.captions)
    chosen = spread(total, MAX_CAPTIONS)
    texts = [caption.text for caption in captions.select(chosen)]
    report.section("Captions")
    report.text(
        f"{len(texts):,} of {total:,} captions. The language is guessed from the letters: Chinese if any of them is "
        "Chinese, else English if all are Latin without accents, else other. Repeated captions are those whose text "
        "occurred earlier."
    )
    rows = [["language", "captions", "repeated", "letters: mean", "longest", "text tokens: mean", "longest"]]
    lengths = None if encode_text is None else np.array([len(encode_text(text)) for text in texts])
    languages = np.array([language(text) for text in texts])
    for name in LANGUAGES:
        which = np.flatnonzero(languages == name)
        if not len(which):
            continue
        letters, repeated = [len(texts[index]) for index in which], len(which) - len({texts[i] for i in which})
        tokens = ["-", "-"] if lengths is None else [f"{lengths[which].mean():.1f}", f"{lengths[which].max():,}"]
        mean, longest = f"{np.mean(letters):.1f}", f"{max(letters):,}"
        rows.append([name, f"{len(which):,}", f"{repeated:,}", mean, longest, *tokens])
    report.table(rows)
    if lengths is None:
        report.histogram("letters per caption", _binned([len(text) for text in texts]))
        report.text("Give --text-tokenizer to count text tokens.")
    else:
        report.histogram("text tokens per caption", _binned(lengths))


def _add_skipped(report: HtmlReport, path: Path) -> None:
    report.section("What was skipped, and why")
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            kind = kind_of_reason(entry["reason"], entry["video"])
            counts[kind] += 1
            if len(found := examples.setdefault(kind, [])) < MAX_EXAMPLES:
                found.append(f"{entry['video']}: {entry['reason']}" if entry["video"] else entry["reason"])
    if not counts:
        return report.text("Nothing was skipped.")
    report.text("Lines of skipped.jsonl by reason, with numbers and names left out, and examples of each.")
    report.histogram("reason", counts.most_common(MAX_REASONS))
    report.preformatted("\n".join(example for kind, _ in counts.most_common(MAX_REASONS) for example in examples[kind]))
    if len(counts) > MAX_REASONS:
        report.text(f"... and {len(counts) - MAX_REASONS:,} rarer reasons.")


def kind_of_reason(reason: str, video: str | None) -> str:
    """A reason without the names and numbers that differ from video to video."""
    if video:
        reason = reason.replace(video, "VIDEO")
    reason = re.sub(r"near-duplicate of .*?, (?=distance [\d.]+ of 255)", "near-duplicate of VIDEO, ", reason)
    reason = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "...", reason)
    return re.sub(r"\d+(?:\.\d+)?", "N", reason)[:MAX_CAPTION]


def _add_near_static(report: HtmlReport, sample: _Sample, pictures: _Pictures, threshold: float | None) -> None:
    report.section("Near-static clips")
    report.text(
        "Motion is the mean absolute difference of a clip's consecutive frames, out of 255. clips.min_motion=X leaves "
        "out clips below X; " + _setting("clips.min_motion", threshold)
    )
    moves = np.array([clip.motion for clip in sample.clips])
    if not len(moves):
        return
    limit = NEAR_STATIC if threshold is None else threshold
    report.text(
        f"{(moves < limit).sum():,} of {len(moves):,} sampled clips are below {limit:g}. Those that move least:"
    )
    report.histogram("motion", _by_edges(moves, (0.25, 0.5, 1, 2, 4, 8, 16, 32)))
    least = [sample.clips[index] for index in np.argsort(moves, kind="stable")[:MAX_EXTREMES]]
    report.pictures(
        [(pictures.sheet([clip.frames]), f"motion {clip.motion:.2f} — {_describe(clip)}") for clip in least]
    )


def _add_near_duplicates(report: HtmlReport, sample: _Sample, pictures: _Pictures, threshold: float | None) -> None:
    report.section("Near-duplicates")
    report.text(
        "The distance of two clips is the mean absolute difference, out of 255, of their frames averaged to 8x8 "
        "pixels. Sampled clips are compared with those of other videos. clips.min_distance=X leaves out a clip "
        "closer than X to a clip of an earlier video in its shard; " + _setting("clips.min_distance", threshold)
    )
    if len({clip.video for clip in sample.clips}) < 2:
        return report.text("Fewer than two sampled videos have clips to compare.")
    videos = np.unique([clip.video for clip in sample.clips], return_inverse=True)[1]
    small = np.stack([clip.thumbnails for clip in sample.clips])
    distances = np.stack([clip_distances(clip, small) for clip in small])
    distances[videos[:, None] == videos] = np.inf
    nearest, partners = distances.min(axis=1), distances.argmin(axis=1)
    limit = NEAR_DUPLICATE if threshold is None else threshold
    report.text(
        f"{(nearest < limit).sum():,} of {len(nearest):,} sampled clips are closer than {limit:g} to a clip of "
        "another video. The most similar pairs:"
    )
    report.histogram("distance to the nearest clip", _by_edges(nearest, (0.5, 1, 2, 4, 8, 16, 32, 64)))
    pairs = dict.fromkeys(
        (min(a, b), max(a, b)) for a in np.argsort(nearest, kind="stable").tolist() for b in [int(partners[a])]
    )
    shown = []
    for first, second in list(pairs)[:MAX_EXTREMES]:
        one, two = sample.clips[first], sample.clips[second]
        title = f"{distances[first, second]:.2f} apart — above: {_describe(one)}; below: {_describe(two)}"
        shown.append((pictures.sheet([one.frames, two.frames]), title))
    report.pictures(shown)


def _setting(name: str, threshold: float | None) -> str:
    if threshold is None:
        return "this folder was made without it."
    return f"this folder was made with {name}={threshold:g}, and the clips here are those that were kept."


def _binned(values: ArrayLike, bins: int = 12) -> list[tuple[str, int]]:
    """Counts in bins of equal, round width."""
    data = np.asarray(values, np.float64)
    if not len(data):
        return []
    low, high = float(data.min()), float(data.max())
    width = _round_up((high - low) / bins) if high > low else 1.0
    first = np.floor(low / width)
    which = (np.floor(data / width) - first).astype(int)
    counts = np.bincount(which)
    return [(f"{(first + i) * width:g} to {(first + i + 1) * width:g}", int(n)) for i, n in enumerate(counts)]


def _by_edges(values: NDArray[np.float64], edges: Sequence[float]) -> list[tuple[str, int]]:
    """Counts between the given edges."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).tolist()
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return list(zip([f"below {edges[0]:g}", *inner, f"{edges[-1]:g} or more"], counts, strict=True))


def _round_up(width: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `width`."""
    power = 10.0 ** np.floor(np.log10(width))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= width * (1 - 1e-9)))


def _evenly(clips: Sequence[_Clip], most: int) -> list[_Clip]:
    return [clips[i] for i in spread(len(clips), most)]
