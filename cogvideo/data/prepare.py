"""From videos and captions to shards of clip tokens (or of single frames, to train an image tokenizer on).

A shard is made of a fixed run of videos, whole or not at all, so a run that was killed goes on behind its last whole
shard and ends with the same bytes. Each distinct frame that some clip of a video wants is decoded and encoded once.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.config import to_dict
from cogvideo.data.captions import Caption, read_captions
from cogvideo.data.clips import Clip, ClipConfig, plan_clips, plan_frames
from cogvideo.data.extract import Extractor, VideoJob, VideoPlan
from cogvideo.data.shards import FORMATS, ROW, VERSION, Kind, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.files import atomic_write, read_json, write_json
from cogvideo.logs import get_logger, progress

log = get_logger("cogvideo.data.prepare")

Encode = Callable[[NDArray[np.uint8]], NDArray[np.integer]]
"""(frames, H, W, 3) uint8 -> (frames, frame_len) token ids of the type to store; or the frames as they are."""


@dataclass(frozen=True)
class PrepareConfig:
    """What is made of the videos (all but the last four fields), and how the work is done."""

    clips: ClipConfig = field(default_factory=ClipConfig)
    """Which clips are cut from a video."""
    frame_pixels: int = 160
    """Side of a frame in pixels: videos are scaled by their shorter edge and cut to the centre square."""
    frames_per_video: int = 8
    """Single frames taken of each captioned span, evenly spread, when frames or pairs rather than clips are made."""
    low_res_pixels: int | None = None
    """Make pairs for super-resolution: tokens of single frames at frame_pixels, and of the same at this side."""
    videos_per_shard: int = 256
    """Videos a shard: what a killed run has to do again at most."""
    encode_batch: int = 32
    """Frames that the image tokenizer encodes at once: 32 small ones stay in a CPU's caches; give a GPU hundreds."""
    strict: bool = False
    """Whether a bad video is an error; else it is left out and reported."""
    workers: int = 2
    """Threads that decode ahead."""
    max_video_mib: int = 1024
    """Most memory that the frames of one video may take."""

    def __post_init__(self) -> None:
        for name in ("frame_pixels", "frames_per_video", "videos_per_shard", "encode_batch", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        low = self.low_res_pixels
        if low is not None and (low < 1 or self.frame_pixels % low):
            raise ValueError(f"low_res_pixels={low}; expected a divisor of frame_pixels={self.frame_pixels}, or null")


class Preparation:
    """One captions file to be made into one folder."""

    def __init__(
        self, captions: str | Path, out: str | Path, kind: Kind, config: PrepareConfig, videos: Path | None = None
    ):
        self.out, self.kind, self.config = Path(out), kind, config
        folder = Path(videos) if videos is not None else Path(captions).parent
        self.extractor = Extractor(folder, config.frame_pixels, self._choose, config.strict, config.max_video_mib << 20)
        self.captions = read_captions(captions, videos)
        by_video: dict[str, list[tuple[int, Caption]]] = {}
        for index, caption in enumerate(self.captions):
            by_video.setdefault(caption.video, []).append((index, caption))
        self.jobs = [VideoJob(video, tuple(found)) for video, found in by_video.items()]

    def survey(self) -> dict[str, Any]:
        """What a run would make, from the videos' timestamps alone: a dry run."""
        counts: dict[float, int] = {}
        skipped = frames = 0
        for job in progress(self.jobs, "looking at videos", "videos"):
            try:
                plan = self.extractor.plan(job)
            except ValueError:
                skipped += len(job.captions)
                continue
            skipped, frames = skipped + len(plan.skipped), frames + len(plan.times)
            for _, clip in plan.rows:
                counts[clip.seconds] = counts.get(clip.seconds, 0) + 1
        return {
            "captions": len(self.captions),
            "videos": len(self.jobs),
            "skipped": skipped,
            "frames": frames,
            "rows": sum(counts.values()),
            "rows_by_seconds": {f"{seconds:g}": counts[seconds] for seconds in sorted(counts)},
        }

    def run(self, encode: Encode, tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make what is not yet made, and the manifest; returns it. `tokenizer` describes what encodes, for the record.

        Raises: ValueError if the folder holds other work, a video is bad and `strict` is set, or no row comes out.
        """
        plan = self._claim(tokenizer)
        size = self.config.videos_per_shard
        parts = [self.jobs[first : first + size] for first in range(0, len(self.jobs), size)]
        done = [shard_folder(self.out, index).is_dir() for index in range(len(parts))]
        if any(done):
            log.info("%s: %d of %d shards are there already", self.out, sum(done), len(parts))
        ready = sum(len(part) for part, is_done in zip(parts, done, strict=True) if is_done)
        with progress(len(self.jobs), f"preparing {self.kind}", "videos", initial=ready) as bar:
            for index, part in enumerate(parts):
                if not done[index]:
                    try:
                        write_shard(shard_folder(self.out, index), *self._make_shard(part, encode, bar.update))
                    except ValueError:
                        if not any(done) and index == 0:
                            self._take_back()
                        raise
        shards = [read_shard(shard_folder(self.out, index)) for index in range(len(parts))]
        if not any(shard.num_rows for shard in shards):
            reason = next((entry["reason"] for shard in shards for entry in shard.info["skipped"]), "no clip fits")
            self._take_back()
            raise ValueError(f"{self.out}: none of the {len(self.jobs)} videos gave a row; the first: {reason}")
        manifest = write_manifest(self.out, plan, shards)
        for entry in manifest["skipped"][:10]:
            log.warning("skipped %s: %s", entry["video"], entry["reason"])
        if manifest["skipped"]:
            log.warning(
                "%d of %d captions skipped; manifest.json lists them", len(manifest["skipped"]), len(self.captions)
            )
        return manifest

    def _claim(self, tokenizer: dict[str, Any] | None) -> dict[str, Any]:
        """Write plan.json and captions.jsonl, or check that those there are the same."""
        captions = "".join(json.dumps(asdict(caption), ensure_ascii=False) + "\n" for caption in self.captions)
        settings = to_dict(self.config)
        unused = "frames_per_video" if self.kind == "tokens" else "clips"
        for name in ("encode_batch", "strict", "workers", "max_video_mib", unused):
            del settings[name]  # they change no byte of what is made
        if self.kind != "pairs":
            del settings["low_res_pixels"]
        plan = {
            "format": FORMATS[self.kind],
            "version": VERSION,
            "captions_sha256": hashlib.sha256(captions.encode()).hexdigest(),
            "config": settings,
            "tokenizer": tokenizer,
        }
        plan = json.loads(json.dumps(plan))  # as it reads back: lists for tuples
        path = self.out / "plan.json"
        if path.is_file():
            found = read_json(path)
            differing = [key for key in plan if found.get(key) != plan[key]]
            if differing:
                raise ValueError(
                    f"{self.out} was begun with other {differing[0].removesuffix('_sha256')}; choose another folder, "
                    "or remove it"
                )
        elif self.out.exists() and any(entry for entry in self.out.iterdir() if not _is_left_over(entry)):
            raise ValueError(f"{self.out} holds other files; choose a new folder")
        write_json(path, plan)
        with atomic_write(self.out / "captions.jsonl") as part:
            part.write_text(captions, encoding="utf-8")
        for entry in [*self.out.iterdir(), *self.out.glob("shards/*")]:
            if _is_left_over(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return plan

    def _take_back(self) -> None:
        """Remove what was made, so that the command does its work once the videos are mended."""
        shutil.rmtree(self.out / "shards", ignore_errors=True)
        for name in ("plan.json", "captions.jsonl"):
            (self.out / name).unlink()
        if not any(self.out.iterdir()):
            self.out.rmdir()

    def _make_shard(
        self, jobs: Sequence[VideoJob], encode: Encode, advance: Callable[[int], Any]
    ) -> tuple[dict[str, NDArray], list[dict[str, Any]]]:
        rows: list[tuple[int, float, float]] = []
        clips: list[NDArray] = []
        skipped: list[dict[str, Any]] = []
        for plan, codes in self._encoded(jobs, encode):
            skipped += plan.skipped
            for caption, clip in plan.rows:
                rows.append((caption, clip.seconds, float(plan.times[clip.frames[0]])))
                clips.append(codes[list(clip.frames)] if self.kind == "tokens" else codes[clip.frames[0]])
            advance(1)
        name = f"{self.kind}.npy"
        return {"rows.npy": np.array(rows, ROW), name: np.stack(clips) if clips else np.zeros((0,))}, skipped

    def _encoded(self, jobs: Sequence[VideoJob], encode: Encode) -> Iterator[tuple[VideoPlan, NDArray]]:
        """Decode ahead in threads, encode across videos, and give each back in order with its frames' codes."""
        waiting: list[tuple[VideoPlan, NDArray[np.uint8]]] = []
        with ThreadPoolExecutor(self.config.workers) as pool:
            for plan, frames in _map_ahead(pool, self.extractor.decode, jobs, 4 * self.config.workers):
                waiting.append((plan, frames))
                # Four batches at once, so that most are full.
                if sum(len(frames) for _, frames in waiting) >= 4 * self.config.encode_batch:
                    yield from self._flush(waiting, encode)
                    waiting = []
            yield from self._flush(waiting, encode)

    def _flush(
        self, videos: list[tuple[VideoPlan, NDArray[np.uint8]]], encode: Encode
    ) -> Iterator[tuple[VideoPlan, NDArray]]:
        codes = np.zeros((0,))
        if any(len(frames) for _, frames in videos):
            pixels = np.concatenate([frames for _, frames in videos])
            batches = np.array_split(pixels, -(-len(pixels) // self.config.encode_batch))
            codes = np.concatenate([encode(batch) for batch in batches])
        first = 0
        for plan, frames in videos:
            yield plan, codes[first : first + len(frames)]
            first += len(frames)

    def _choose(self, times: NDArray[np.float64], caption: Caption) -> list[Clip]:
        if self.kind == "tokens":
            return plan_clips(times, self.config.clips, caption.start, caption.end)
        return plan_frames(times, self.config.frames_per_video, caption.start, caption.end)


def _is_left_over(path: Path) -> bool:
    """Whether a run that was killed while it wrote left this temporary file or folder."""
    return path.name.startswith(".") and ".tmp" in path.name


def _map_ahead(pool: ThreadPoolExecutor, work: Callable, items: Sequence, ahead: int) -> Iterator[Any]:
    """Like pool.map, in order, with at most `ahead` results waiting: memory stays bounded."""
    iterator = iter(items)
    pending: list[Future] = [pool.submit(work, item) for item in islice(iterator, ahead)]
    while pending:
        result = pending.pop(0).result()
        pending += [pool.submit(work, item) for item in islice(iterator, 1)]
        yield result
