"""From videos and captions to a folder of shards: who makes which, and going on. `make_shard.py` makes one.

A shard is made of a fixed run of videos, whole or not at all, so a run that was killed, of one process or many, goes on
with the shards that are missing, in any number of processes, and ends with the same bytes.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.config import to_dict
from cogvideo.data.captions import Caption, CaptionsFile
from cogvideo.data.clips import Clip, ClipConfig, plan_clips, plan_frames
from cogvideo.data.extract import Extractor, VideoJob
from cogvideo.data.make_shard import Encode, ShardMaker
from cogvideo.data.shards import (
    FORMATS,
    VERSION,
    Kind,
    read_shard,
    shard_folder,
    shards_made,
    write_manifest,
    write_shard,
)
from cogvideo.distributed import ProcessGroup
from cogvideo.files import atomic_write, read_json, write_json
from cogvideo.logs import get_logger, progress
from cogvideo.media.cuts import check_installed

log = get_logger("cogvideo.data.prepare")

GO_ON = "when none is at work any more, run the same command again, in as many processes as you like"


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
    """One captions file to be made into one folder, by one process or many."""

    def __init__(
        self,
        captions: str | Path,
        out: str | Path,
        kind: Kind,
        config: PrepareConfig,
        videos: Path | None = None,
        processes: ProcessGroup | None = None,
    ):
        self.out, self.kind, self.config = Path(out), kind, config
        self.processes = processes or ProcessGroup()
        folder = Path(videos) if videos is not None else Path(captions).parent
        cuts = config.clips.cut_threshold if kind == "tokens" else None
        if cuts is not None:
            check_installed()
        self.extractor = Extractor(
            folder, config.frame_pixels, self._choose, config.strict, config.max_video_mib << 20, cuts
        )
        self.captions = CaptionsFile(captions)
        self._numbers, self._starts = self.captions.by_video()

    @property
    def num_videos(self) -> int:
        return len(self._starts) - 1

    @property
    def num_shards(self) -> int:
        return -(-self.num_videos // self.config.videos_per_shard)

    def survey(self) -> dict[str, Any]:
        """What a run would make, from the videos' timestamps alone: a dry run, by this process."""
        counts: dict[float, int] = {}
        skipped = frames = 0
        with progress(self.num_videos, "looking at videos", "videos") as bar:
            for job in chain.from_iterable(map(self._jobs, range(self.num_shards))):
                bar.update(1)
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
            "videos": self.num_videos,
            "skipped": skipped,
            "frames": frames,
            "rows": sum(counts.values()),
            "rows_by_seconds": {f"{seconds:g}": counts[seconds] for seconds in sorted(counts)},
        }

    def run(self, encode: Encode, tokenizer: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Make this process's part of what is not yet made; the first one waits for all, and writes the manifest.

        `tokenizer` describes what encodes, for the record. Returns the manifest, in the first process.
        Raises: ValueError if the folder holds other work, a video is bad and `strict` is set, no row comes out, or
        processes failed and left shards to make.
        """
        plan = self._plan(tokenizer)
        missing = self.processes.broadcast_from_rank_0(lambda: self._claim(plan))
        self._check_same(plan)  # where the first process has other files or settings than this one
        failure = self._make([missing[place] for place in self.processes.shard(len(missing))], encode)
        if failure is not None and self.processes.size > 1:
            say = "process %d of %d: %s (the others go on with their shards)"
            log.error(say, self.processes.rank, self.processes.size, failure)
        lost = None
        try:
            self.processes.barrier()  # also after a failure: launchers end all processes when one ends badly
        except ConnectionError as error:
            lost = error
        if self.processes.rank == 0 and lost is None and not shards_made(self.out):
            self._take_back()
        if failure is not None:
            raise failure
        if self.processes.rank == 0:
            return self._finish(plan)
        if lost is not None:
            raise ConnectionError(f"{lost}; {GO_ON}")
        return None

    def _make(self, shards: Sequence[int], encode: Encode) -> Exception | None:
        """Make shards, up to the first that fails: the error is returned."""
        maker = ShardMaker(self.extractor, encode, self.kind, self.config.encode_batch, self.config.workers)
        ours = sum(len(self._part(index)) for index in shards)
        with progress(ours, f"preparing {self.kind}", "videos") as bar:
            for index in shards:
                try:
                    write_shard(shard_folder(self.out, index), *maker.make(self._jobs(index), bar.update))
                except Exception as error:
                    return error
        return None

    def _finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        made = shards_made(self.out)
        places = [shard_folder(self.out, index) for index in range(self.num_shards)]
        if missing := sum(place.name not in made for place in places):
            raise ValueError(
                f"{self.out}: {missing} of {len(places)} shards are not made, for a process failed or died; {GO_ON}"
            )
        shards = [read_shard(place) for place in places]
        if not any(shard.num_rows for shard in shards):
            reason = next((entry["reason"] for shard in shards for entry in shard.info["skipped"]), "no clip fits")
            self._take_back()
            raise ValueError(f"{self.out}: none of the {self.num_videos} videos gave a row; the first: {reason}")
        manifest = write_manifest(self.out, plan, shards)
        for entry in islice((entry for shard in shards for entry in shard.info["skipped"]), 10):
            log.warning("skipped %s: %s", entry["video"], entry["reason"])
        if skipped := manifest["skipped"]:
            log.warning("%d of %d captions skipped; skipped.jsonl lists them", skipped, len(self.captions))
        return manifest

    def _part(self, shard: int) -> range:
        """The videos of a shard."""
        size = self.config.videos_per_shard
        return range(shard * size, min((shard + 1) * size, self.num_videos))

    def _jobs(self, shard: int) -> list[VideoJob]:
        """A shard's videos with their captions, read from the captions file."""
        part = self._part(shard)
        numbers = self._numbers[self._starts[part.start] : self._starts[part.stop]]
        by_video: dict[str, list[tuple[int, Caption]]] = {}
        for number, caption in zip(numbers, self.captions.at(numbers), strict=True):
            by_video.setdefault(caption.video, []).append((int(number), caption))
        return [VideoJob(video, tuple(found)) for video, found in by_video.items()]

    def _plan(self, tokenizer: dict[str, Any] | None) -> dict[str, Any]:
        """All that decides the bytes of the result."""
        settings = to_dict(self.config)
        unused = "frames_per_video" if self.kind == "tokens" else "clips"
        for name in ("encode_batch", "strict", "workers", "max_video_mib", unused):
            del settings[name]  # they change no byte of what is made
        if self.kind != "pairs":
            del settings["low_res_pixels"]
        if self.kind == "tokens" and self.config.clips.cut_threshold is None:
            del settings["clips"]["cut_threshold"]  # as in folders that were begun before there was one
        plan = {
            "format": FORMATS[self.kind],
            "version": VERSION,
            "captions_sha256": self.captions.sha256,
            "config": settings,
            "tokenizer": tokenizer,
        }
        return json.loads(json.dumps(plan))  # as it reads back: lists for tuples

    def _claim(self, plan: dict[str, Any]) -> list[int]:
        """Write plan.json and captions.jsonl, or check that those there are the same. Returns the shards to make."""
        if (self.out / "plan.json").is_file():
            self._check_same(plan)
        elif self.out.exists() and any(entry for entry in self.out.iterdir() if not _is_left_over(entry)):
            raise ValueError(f"{self.out} holds other files; choose a new folder")
        write_json(self.out / "plan.json", plan)
        with atomic_write(self.out / "captions.jsonl") as part, open(part, "w", encoding="utf-8") as file:
            file.writelines(caption.line for caption in self.captions)
        for entry in [*self.out.iterdir(), *self.out.glob("shards/*")]:
            if _is_left_over(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        made = shards_made(self.out)
        if made:
            log.info("%s: %d of %d shards are there already", self.out, len(made), self.num_shards)
        return [index for index in range(self.num_shards) if shard_folder(self.out, index).name not in made]

    def _check_same(self, plan: dict[str, Any]) -> None:
        """Raises: ValueError that names what differs from the folder's plan."""
        found = read_json(self.out / "plan.json")
        differing = [key for key in plan if not isinstance(found, dict) or found.get(key) != plan[key]]
        if differing:
            raise ValueError(
                f"{self.out} was begun with other {differing[0].removesuffix('_sha256')}; choose another folder, "
                "or remove it"
            )

    def _take_back(self) -> None:
        """Remove what was made, so that the command does its work once the videos are mended."""
        shutil.rmtree(self.out / "shards", ignore_errors=True)
        for name in ("plan.json", "captions.jsonl"):
            (self.out / name).unlink()
        if not any(self.out.iterdir()):
            self.out.rmdir()

    def _choose(self, times: NDArray[np.float64], caption: Caption) -> list[Clip]:
        if self.kind == "tokens":
            return plan_clips(times, self.config.clips, caption.start, caption.end)
        return plan_frames(times, self.config.frames_per_video, caption.start, caption.end)


def _is_left_over(path: Path) -> bool:
    """Whether a run that was killed while it wrote left this temporary file or folder."""
    return path.name.startswith(".") and ".tmp" in path.name
