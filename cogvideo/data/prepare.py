"""Turns a captions file into a folder of shards, in one process or many, and resumes after being killed.

A shard holds a fixed range of videos and is written whole or not at all. So a run that was killed resumes with the
missing shards, in any number of processes, and produces the same bytes. `extract.py` builds a shard's arrays,
`shards.py` writes them.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cogvideo.config import to_dict
from cogvideo.data.captions import Caption, CaptionsFile
from cogvideo.data.clips import Clip, ClipConfig, plan_clips, plan_frames
from cogvideo.data.extract import Encode, Extractor, Screen, ShardBuilder, VideoJob, map_ahead
from cogvideo.data.readers import open_captions
from cogvideo.data.screen import ClipScreen
from cogvideo.data.shards import (
    FORMATS,
    MAKE_AGAIN,
    VERSION,
    Kind,
    Shard,
    finished_shards,
    read_shard,
    shard_folder,
    write_manifest,
    write_shard,
)
from cogvideo.data.statistics import spread
from cogvideo.distributed import ProcessGroup
from cogvideo.files import atomic_write, is_temporary, read_json, remove_all_leftovers, write_json
from cogvideo.locks import entries, lock_folder
from cogvideo.logs import get_logger, progress
from cogvideo.media.byte_range import FILE_ERRORS
from cogvideo.media.cuts import check_installed

log = get_logger("cogvideo.data.prepare")

MAX_DRAWN = 64
"""Of how many held-out videos it is made sure that they give rows; each is decoded once more for that."""
RESUME = "once all processes have ended, run the same command again, in any number of processes"


@dataclass(frozen=True)
class PrepareConfig:
    """What to make from the videos, and how to do the work (the last four fields)."""

    clips: ClipConfig = field(default_factory=ClipConfig)
    """Which clips are cut from a video."""
    frame_pixels: int = 160
    """Side of a frame in pixels. Frames are scaled, never stretched, and made square as `fit` says."""
    fit: Literal["crop", "pad"] = "crop"
    """crop: scale the shorter edge to frame_pixels, cut off the rest; pad: scale the longer edge, add black borders."""
    crop_place: Literal["center", "top"] = "center"
    """The part that a crop keeps of frames that are taller than wide; wide ones keep their centre."""
    frames_per_video: int = 8
    """Single frames per captioned span, evenly spread, when preparing frames or pairs instead of clips."""
    low_res_pixels: int | None = None
    """Prepare pairs for super-resolution: tokens of single frames at frame_pixels and at this side."""
    crop_pixels: int | None = None
    """With `--frames`: store a square of this side from a random place in each frame instead of the whole frame, so
    that training an image tokenizer on large videos costs no more than on small ones."""
    videos_per_shard: int = 256
    """Videos per shard; a killed run repeats at most the shard it was working on."""
    encode_batch: int = 32
    """Frames per image-tokenizer batch: 32 small ones fit in a CPU's caches; use hundreds on a GPU."""
    strict: bool = False
    """Stop at a video that is damaged or cannot be used, instead of skipping it (or its end) and reporting that. In a
    folder begun without this setting, what was skipped is tried again."""
    workers: int = 2
    """Decoding threads."""
    max_video_mib: int = 1024
    """Limit on the memory that the frames of one video may take; a video that needs more is skipped. If a run resumes
    with another limit, videos skipped because of the old one are tried again."""

    def __post_init__(self) -> None:
        for name in (
            "frame_pixels",
            "frames_per_video",
            "videos_per_shard",
            "encode_batch",
            "workers",
            "max_video_mib",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.fit == "pad" and self.crop_place != "center":
            raise ValueError(f"crop_place={self.crop_place} with fit=pad, which crops nothing; leave out one of them")
        low = self.low_res_pixels
        if low is not None and (low < 1 or self.frame_pixels % low):
            raise ValueError(f"low_res_pixels={low}; expected a divisor of frame_pixels={self.frame_pixels}, or null")
        if self.crop_pixels is not None and not 1 <= self.crop_pixels <= self.frame_pixels:
            raise ValueError(
                f"crop_pixels={self.crop_pixels}; expected 1 to frame_pixels={self.frame_pixels}, or null for no crops"
            )


class Preparation:
    """The work of turning one captions file into one prepared folder."""

    def __init__(
        self,
        captions: str | Path | CaptionsFile,
        out: str | Path,
        kind: Kind,
        config: PrepareConfig,
        videos: Path | None = None,
        processes: ProcessGroup | None = None,
        held_out: dict[str, int] | None = None,
        if_empty: str = "",
    ):
        """Read and check the captions. `videos`: the folder of videos (default: that of the captions).

        `held_out`: what plan.json records of the videos held out from these. `if_empty`: advice if there are no rows.
        Raises: OSError; ValueError for bad captions (if `config.strict`, or if none is good), or for cut detection
        without its package.
        """
        self.out, self.kind, self.config = Path(out), kind, config
        self.processes = processes or ProcessGroup()
        self._held_out, self._if_empty = held_out, if_empty
        cuts = config.clips.cut_threshold if kind == "tokens" else None
        if cuts is not None:
            check_installed()
        if not isinstance(captions, CaptionsFile):
            captions = open_captions(captions, videos=videos, skip_bad=not config.strict)
        self.captions = captions
        self.extractor = Extractor(
            captions.folder,
            config.frame_pixels,
            self._choose_clips,
            config.strict,
            config.max_video_mib << 20,
            cuts,
            config.fit,
            config.crop_place,
            config.clips if kind == "tokens" else None,
        )
        self._indices, self._starts = self.captions.group_by_video()
        self._is_new = False
        """Whether this run, on rank 0, began the folder."""

    @property
    def num_videos(self) -> int:
        return len(self._starts) - 1

    @property
    def num_shards(self) -> int:
        return -(-self.num_videos // self.config.videos_per_shard)

    def survey(self) -> dict[str, Any]:
        """Count what `run` would make, from the videos' timestamps and, with `clips.cut_threshold`, their cuts.

        Runs in this process only. The counts include clips that `run` would leave out by their pixels
        (`clips.min_motion`, `clips.min_distance`).
        """
        counts: dict[float, int] = {}
        skipped, frames = len(self.captions.bad), 0
        with progress(self.num_videos, "surveying videos", "videos") as bar:
            for job in chain.from_iterable(map(self._jobs, range(self.num_shards))):
                bar.update(1)
                try:
                    plan = self.extractor.plan(job)
                except (ValueError, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in FILE_ERRORS:
                        raise
                    skipped += len(job.captions)
                    continue
                skipped += sum(entry["caption"] is not None for entry in plan.skipped)
                frames += len(plan.times)
                for _, clip in plan.rows:
                    counts[clip.seconds] = counts.get(clip.seconds, 0) + 1
        return {
            "captions": len(self.captions) + len(self.captions.bad),
            "videos": self.num_videos,
            "skipped": skipped,
            "frames": frames,
            "rows": sum(counts.values()),
            "rows_by_seconds": {f"{seconds:g}": counts[seconds] for seconds in sorted(counts)},
        }

    def run(
        self,
        encode: Encode,
        tokenizer: dict[str, Any] | None = None,
        high_res_tokenizer: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Make this rank's missing shards. Rank 0 waits for the others, writes the manifest and returns it.

        The manifest records `tokenizer` as the encoder, and `high_res_tokenizer` if the large frames of pairs have
        their own.
        Raises: ValueError if the folder is in use or holds other work, a video cannot be used and `strict` is set,
        there are no rows, or failed processes left shards missing.
        """
        with lock_folder(self.out, self.processes):
            return self._run(encode, self._plan(tokenizer, high_res_tokenizer))

    def _run(self, encode: Encode, plan: dict[str, Any]) -> dict[str, Any] | None:
        missing = self.processes.broadcast_from_rank_0(lambda: self._claim(plan))
        self._check_same_plan(plan)  # this rank may have been given other captions or settings than rank 0
        failure = self._make([missing[index] for index in self.processes.shard(len(missing))], encode)
        if failure is not None and self.processes.size > 1:
            message = "rank %d of %d: %s (the other ranks continue with their shards)"
            log.error(message, self.processes.rank, self.processes.size, failure)
        lost = None
        try:
            self.processes.barrier()  # also after a failure, because launchers stop all processes when one fails
        except ConnectionError as error:
            lost = error
        if self.processes.rank == 0 and lost is None and not finished_shards(self.out):
            self._undo_claim()
        if failure is not None:
            raise failure
        if self.processes.rank == 0:
            return self._finish(plan)
        if lost is not None:
            raise ConnectionError(f"{lost}; {RESUME}")
        return None

    def _make(self, shards: Sequence[int], encode: Encode) -> Exception | None:
        """Make shards until one fails; returns its error, or None."""
        builder = ShardBuilder(
            self.extractor, encode, self.kind, self.config.encode_batch, self.config.workers, self._new_screen
        )
        num_videos = sum(len(self._videos(index)) for index in shards)
        with progress(num_videos, f"preparing {self.kind}", "videos") as bar:
            for index in shards:
                try:
                    arrays, skipped, video_bytes = builder.build(self._jobs(index), bar.update)
                    folder = shard_folder(self.out, index)
                    self._check_replacement(folder, skipped)
                    (self.out / "manifest.json").unlink(missing_ok=True)  # it lists the shard being replaced, if any
                    write_shard(folder, arrays, skipped, video_bytes)
                except Exception as error:
                    return error
        return None

    def _finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        finished = finished_shards(self.out)
        folders = [shard_folder(self.out, index) for index in range(self.num_shards)]
        if missing := sum(folder.name not in finished for folder in folders):
            raise ValueError(
                f"{self.out}: {missing} of {len(folders)} shards are missing, because a process failed or died; "
                f"{RESUME}"
            )
        shards = [read_shard(folder) for folder in folders]
        if not any(shard.num_rows for shard in shards):
            reason = next((entry["reason"] for shard in shards for entry in shard.info["skipped"]), "no clip fits")
            self._undo_claim()
            raise ValueError(
                f"{self.out}: none of the {self.num_videos} videos yielded a row; the first reason: {reason}"
                f"{self._if_empty}"
            )
        bad = [{"caption": None, "video": None, "reason": reason} for reason in self.captions.bad_reasons()]
        manifest = write_manifest(self.out, plan, shards, bad)
        for entry in islice(chain(bad, *(shard.info["skipped"] for shard in shards)), 10):
            log.warning("skipped %s", f"{entry['video']}: {entry['reason']}" if entry["video"] else entry["reason"])
        if skipped := manifest["skipped"]:
            total = len(self.captions) + len(bad)
            log.warning("%d of %d captions skipped; skipped.jsonl lists them", skipped, total)
        return manifest

    def _videos(self, shard: int) -> range:
        """Indices of a shard's videos."""
        size = self.config.videos_per_shard
        return range(shard * size, min((shard + 1) * size, self.num_videos))

    def _jobs(self, shard: int) -> list[VideoJob]:
        """A shard's videos with their captions, read from the captions file."""
        return self._read_jobs(self._videos(shard))

    def sample_jobs(self, most: int) -> Iterator[VideoJob]:
        """All videos, or `most` of them, evenly spaced in the order of the captions file."""
        for video in spread(self.num_videos, most).tolist():
            yield from self._read_jobs(range(video, video + 1))

    def _read_jobs(self, videos: range) -> list[VideoJob]:
        return self._jobs_of(self._indices[self._starts[videos.start] : self._starts[videos.stop]])

    def _jobs_of(self, indices: NDArray[np.int64]) -> list[VideoJob]:
        """The videos of some captions."""
        by_video: dict[str, list[tuple[int, Caption]]] = {}
        for index, caption in zip(indices, self.captions.select(indices), strict=True):
            by_video.setdefault(caption.video, []).append((int(index), caption))
        return [VideoJob(video, tuple(captions)) for video, captions in by_video.items()]

    def _plan(self, tokenizer: dict[str, Any] | None, high_res_tokenizer: dict[str, Any] | None) -> dict[str, Any]:
        """Everything that determines the bytes of the result; the content of plan.json."""
        settings = to_dict(self.config)
        unused = "frames_per_video" if self.kind == "tokens" else "clips"
        for name in ("encode_batch", "strict", "workers", "max_video_mib", unused):
            del settings[name]  # these decide at most which videos are skipped; see `_is_outdated`
        if self.kind != "pairs":
            del settings["low_res_pixels"]
        if self.config.crop_pixels is None:
            del settings["crop_pixels"]  # so that folders begun by versions without the setting can be resumed
        if self.kind == "tokens":
            for name in ("cut_threshold", "min_motion", "min_distance"):  # likewise
                if settings["clips"][name] is None:
                    del settings["clips"][name]
        for name in ("fit", "crop_place"):  # likewise
            if settings[name] == getattr(PrepareConfig(), name):
                del settings[name]
        plan = {
            "format": FORMATS[self.kind],
            "version": VERSION,
            "captions_sha256": self.captions.sha256,
            "config": settings,
            "tokenizer": tokenizer,
        }
        if high_res_tokenizer is not None:  # likewise
            plan["high_res_tokenizer"] = high_res_tokenizer
        if self._held_out is not None:
            plan["validation"] = self._held_out
        return dict(json.loads(json.dumps(plan)))  # as it is read back, with lists for tuples

    def _claim(self, plan: dict[str, Any]) -> list[int]:
        """Write plan.json and captions.jsonl, or check that the same ones are there. Returns the missing shards."""
        self._is_new = not (self.out / "plan.json").is_file()
        if not self._is_new:
            self._check_same_plan(plan)
        elif self.out.exists() and not all(map(is_temporary, entries(self.out))):
            raise ValueError(f"{self.out} holds other files; choose a new folder")
        write_json(self.out / "plan.json", plan)
        with atomic_write(self.out / "captions.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(caption.to_json_line() for caption in self.captions)
        for folder in (self.out, self.out / "shards"):
            remove_all_leftovers(folder)
        finished = {name for name in finished_shards(self.out) if not self._is_outdated(self.out / "shards" / name)}
        if finished:
            log.info("%s: resuming with %d of %d shards finished", self.out, len(finished), self.num_shards)
        return [index for index in range(self.num_shards) if shard_folder(self.out, index).name not in finished]

    def _is_outdated(self, shard: Path) -> bool:
        """Whether a finished shard skipped what this run may use or must not skip, and so has to be made again.

        Raises: ValueError if a video that gave rows has been replaced by another.
        """
        found, limit = read_shard(shard), self.config.max_video_mib
        problems = [entry for entry in found.info["skipped"] if "screened" not in entry]
        outdated = any(entry.get("max_video_mib", limit) != limit or self.config.strict for entry in problems)
        sizes = found.info.get("video_bytes")
        if sizes is None or int(shard.name) >= self.num_shards:
            return outdated
        jobs = self._jobs(int(shard.name))
        if len(sizes) != len(jobs):
            raise ValueError(
                f"{shard / 'shard.json'} is damaged: {len(sizes)} video_bytes, expected {len(jobs)}; {MAKE_AGAIN}"
            )
        for job, before in zip(jobs, sizes, strict=True):
            now = self.extractor.video_bytes(job)
            if now is None or now == before:
                continue
            used = before is not None and all(entry["video"] != job.video for entry in problems)
            if used and _has_rows(found, job):
                raise ValueError(
                    f"{self.out} was begun with another {job.video}, of {before} bytes instead of {now}; give the "
                    "videos that it was begun with, or choose another folder for --out"
                )
            outdated = True
        return outdated

    def _check_replacement(self, shard: Path, skipped: list[dict[str, Any]]) -> None:
        """Raises: ValueError if a finished shard would lose the rows of a video that is no longer there."""
        missing = {entry["caption"]: entry["video"] for entry in skipped if "missing" in entry}
        if not missing or not shard.is_dir():
            return
        rows = read_shard(shard).load("rows.npy")
        lost = next((video for caption, video in missing.items() if caption in rows["caption"]), None)
        if lost is not None:
            raise ValueError(
                f"{self.out} holds rows of {lost}, which is no longer a file in {self.captions.folder}; put the "
                "videos back and run the same command again"
            )

    def _check_same_plan(self, plan: dict[str, Any]) -> None:
        """Raises: ValueError that names what differs from the folder's plan."""
        found = read_json(self.out / "plan.json", dict[str, Any])
        differing = [key for key in (*plan, *(found.keys() - plan.keys())) if found.get(key) != plan.get(key)]
        if differing:
            raise ValueError(
                f"{self.out} was begun with other {differing[0].removesuffix('_sha256')}; choose another folder"
            )

    def _undo_claim(self) -> None:
        """If this run began the folder, remove its files, so that the command can run again with repaired videos."""
        if not self._is_new:
            return
        shutil.rmtree(self.out / "shards", ignore_errors=True)
        for name in ("manifest.json", "skipped.jsonl", "rows.npy", "captions.jsonl", "plan.json"):
            (self.out / name).unlink(missing_ok=True)

    def draw(self, wanted: int, videos: Iterator[NDArray[np.int64]]) -> int:
        """How many `videos`, each given by its captions, to hold out so that `wanted` of those give rows.

        One more that gives rows is left to train on. Of a large number, only MAX_DRAWN are examined. A folder that was
        begun keeps what was drawn for it. Runs on rank 0; all ranks get the result.
        Raises: ValueError if fewer than two videos give rows; OSError and MemoryError as `Extractor.decode`.
        """
        return self.processes.broadcast_from_rank_0(lambda: self._draw(wanted, videos))

    def _draw(self, wanted: int, videos: Iterator[NDArray[np.int64]]) -> int:
        if (self.out / "plan.json").is_file():
            record = read_json(self.out / "plan.json", dict[str, Any]).get("validation")
            same = isinstance(record, dict) and record.get("wanted") == wanted and type(record.get("drawn")) is int
            return int(record["drawn"]) if same and record is not None else wanted
        if self.config.strict:
            return wanted  # a video that gives no rows ends the command
        most, tried, good, reason = min(wanted, MAX_DRAWN), 0, [], ""
        with (
            ThreadPoolExecutor(self.config.workers) as pool,
            progress(most, "drawing held-out videos", "videos") as bar,
        ):
            for problem in map_ahead(pool, self._why_empty, map(self._jobs_of, videos), self.config.workers):
                tried += 1
                if problem is None:
                    good.append(tried)
                    bar.update(len(good) <= most)
                if len(good) > most:
                    return max(wanted, good[most - 1])
                reason = reason or problem or ""
        if len(good) < 2:
            raise ValueError(
                f"--validation needs two videos that give rows, one to hold out and one to train on, but "
                f"{len(good)} of {tried} do; leave it out, or repair the videos; the first reason: {reason}"
            )
        return good[-2]

    def _why_empty(self, jobs: list[VideoJob]) -> str | None:
        """Why a video gives no rows; None if it gives some."""
        reason = "no clip fits"
        for job in jobs:
            plan, _ = self._new_screen()(job.video, *self.extractor.decode(job))
            if plan.rows:
                return None
            reason = next((entry["reason"] for entry in plan.skipped), reason)
        return reason

    def _new_screen(self) -> Screen:
        """The screen of one shard, which leaves out clips by their pixels."""
        clips = self.config.clips if self.kind == "tokens" else ClipConfig()
        return ClipScreen(clips.min_motion, clips.min_distance).screen

    def _choose_clips(self, times: NDArray[np.float64], caption: Caption) -> list[Clip]:
        if self.kind == "tokens":
            return plan_clips(times, self.config.clips, caption.start, caption.end)
        return plan_frames(times, self.config.frames_per_video, caption.start, caption.end)


def open_with_validation(
    captions: CaptionsFile, fraction: float, out: Path, kind: Kind, config: PrepareConfig, processes: ProcessGroup
) -> tuple[Preparation, Preparation]:
    """The folder to train on, and in it that of a fraction of the videos, which are held out: OUT/validation.

    Raises: as `CaptionsFile.split` and `Preparation.draw`.
    """
    whole = Preparation(captions, out, kind, config, processes=processes)
    held_out: dict[str, int] = {}

    def draw(wanted: int, videos: Iterator[NDArray[np.int64]]) -> int:
        if (drawn := whole.draw(wanted, videos)) != wanted:  # so that it is the same when resumed
            held_out.update(wanted=wanted, drawn=drawn)
        return drawn

    training, validation = captions.split(fraction, draw)
    advice = "; choose another folder for --out, for which videos are drawn again, or leave --validation out"
    return (
        Preparation(training, out, kind, config, processes=processes, held_out=held_out or None),
        Preparation(validation, out / "validation", kind, config, processes=processes, if_empty=advice),
    )


def _has_rows(shard: Shard, job: VideoJob) -> bool:
    """Whether a finished shard holds rows of a video."""
    return bool(np.isin(shard.load("rows.npy")["caption"], [index for index, _ in job.captions]).any())
