"""Turns videos and their captions into the rows of one shard: plans clips, decodes and encodes frames. Writes no files.

Each distinct frame that a video's clips use is decoded and encoded once. Frames of many videos share an encoder batch.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cogvideo.data.captions import Caption, plain_path
from cogvideo.data.clips import Clip, ClipConfig, rate_problem
from cogvideo.data.shards import ROW, Kind
from cogvideo.logs import one_line
from cogvideo.media.byte_range import FILE_ERRORS, MediaPath, file_size, is_file
from cogvideo.media.container import DamagedVideoError
from cogvideo.media.cuts import find_cuts
from cogvideo.media.frame_index import VideoInfo
from cogvideo.media.pixels import Fit, Place
from cogvideo.media.video import SAME_TIME, DecodedTooLargeError, probe_video, read_video

T = TypeVar("T")
R = TypeVar("R")

ChooseClips = Callable[[NDArray[np.float64], Caption], list[Clip]]
"""(frame times of a video, caption) -> the clips of the caption's span."""
Encode = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""Frames (N, H, W, 3) uint8 -> what is stored per frame: token ids (N, frame_len), or the frames themselves."""


@dataclass(frozen=True)
class VideoJob:
    """One video and its captions, each with its index in the captions file."""

    video: str
    captions: tuple[tuple[int, Caption], ...]


@dataclass(frozen=True)
class VideoPlan:
    """The frames that a video's clips need."""

    times: NDArray[np.float64]
    """(N,) times of the distinct frames, ascending."""
    rows: list[tuple[int, Clip]]
    """Caption index and clip; the clip's frames are indices into `times`."""
    skipped: list[dict[str, Any]]
    """Captions without clips, each with the reason. An entry without a caption index is an unused part of a video."""
    video_bytes: int | None = None
    """Size of the video; None: there was no such file, or it was not looked for."""

    def entries(self) -> list[tuple[int, float, float]]:
        """The rows as prepared data stores them (`shards.ROW`), rounded to its precision."""
        rows = [(caption, clip.seconds, float(self.times[clip.frames[0]])) for caption, clip in self.rows]
        entries: list[tuple[int, float, float]] = np.array(rows, ROW).tolist()
        return entries


Screen = Callable[[str, VideoPlan, NDArray[np.uint8]], tuple[VideoPlan, NDArray[np.uint8]]]
"""(video, its plan, its frames) -> plan and frames without the clips left out. Called for each video, in order."""


@dataclass(frozen=True)
class Extractor:
    """Plans and decodes the videos of one folder."""

    folder: Path
    side: int
    """Height and width of a frame in pixels."""
    choose_clips: ChooseClips
    strict: bool
    """Whether a video that cannot be used is an error; otherwise it is skipped, or used up to where it is damaged."""
    max_bytes: int
    """Limit on one video's decoded frames."""
    cut_threshold: float | None = None
    """See `ClipConfig`."""
    fit: Fit = "crop"
    """See `Framing`."""
    place: Place = "center"
    """See `Framing`."""
    clips: ClipConfig | None = None
    """The config behind `choose_clips`, to explain why a caption has no clips; None: single frames."""

    def plan(self, job: VideoJob) -> VideoPlan:
        """Choose a video's clips by its frame times.

        Raises: ValueError if the video cannot be read or, if `strict`, a caption yields no clip; OSError where that is
        not its fault.
        """
        return self._plan(job, self._probe_spans(job))

    def probe(self, job: VideoJob, *, exact: bool = False) -> VideoInfo:
        """A video's size and frame times. A damaged one yields those before the damage; if `strict`, it is an error."""
        return probe_video(self._locate(job), partial=not self.strict, exact=exact)

    def _probe_spans(self, job: VideoJob) -> VideoInfo:
        """`probe`, but only the frames that the captions' spans need are guaranteed to be found."""
        spans = tuple((caption.start, caption.end) for _, caption in job.captions)
        anywhere = self.cut_threshold is not None  # cuts are looked for in the whole video
        return probe_video(self._locate(job), spans=None if anywhere else spans, partial=not self.strict)

    def _plan(self, job: VideoJob, info: VideoInfo) -> VideoPlan:
        times = info.seconds
        shots = [times]
        if self.cut_threshold is not None:
            cuts = find_cuts(self._locate(job), self.cut_threshold, info)
            shots = np.split(times, np.searchsorted(times, cuts - SAME_TIME))
        damage = "" if info.damage is None else f", which is cut short or damaged: {info.damage}"
        rows: list[tuple[int, Clip]] = []
        skipped: list[dict[str, Any]] = []
        for index, caption in job.captions:
            spans = [caption] if len(shots) == 1 else [part for shot in shots for part in _within_shot(caption, shot)]
            clips = [clip for span in spans for clip in self.choose_clips(times, span)]
            rows += [(index, clip) for clip in clips]
            if not clips:
                end = float(times[-1]) if caption.end is None else caption.end
                reason = f"no clip fits between {caption.start:g} s and {end:g} s of {job.video}{damage}"
                problems = (rate_problem(times, self.clips, s.start, s.end) for s in spans) if self.clips else ()
                if problem := next(filter(None, problems), None):
                    reason += f": {problem}"
                if self.strict:
                    raise ValueError(reason)
                skipped.append({"caption": index, "video": job.video, "reason": reason})
        if damage and rows:
            reason = f"everything after {times[-1]:.2f} s of {job.video}{damage}"
            skipped.append({"caption": None, "video": job.video, "reason": reason})
        # Renumber frames: make clips index into the distinct frames to decode instead of all frames of the video.
        used, rows = select_rows(rows)
        return VideoPlan(times[used], rows, skipped)

    def decode(self, job: VideoJob) -> tuple[VideoPlan, NDArray[np.uint8]]:
        """Plan a video and decode the frames it needs: (N, side, side, 3).

        Raises: if `strict`, ValueError or OSError for a video that cannot be used; OSError and MemoryError that the
        video did not cause.
        """
        video_bytes = self.video_bytes(job)
        plan, frames = self._decode_or_skip(job, missing=video_bytes is None)
        return replace(plan, video_bytes=video_bytes), frames

    def video_bytes(self, job: VideoJob) -> int | None:
        """Size of a video; None if there is no such file. Raises: OSError where that is not its fault."""
        if (source := job.captions[0][1].source) is not None:
            return source.size
        sizes = (file_size(path) for path in _spellings(self.folder, job.video))
        return next((size for size in sizes if size is not None), None)

    def _decode_or_skip(self, job: VideoJob, missing: bool) -> tuple[VideoPlan, NDArray[np.uint8]]:
        try:
            try:
                return self._decode(job, self._probe_spans(job))
            except DamagedVideoError:
                if self.strict:
                    raise
                return self._decode(job, self.probe(job, exact=True))  # damage that shows only in decoding
        except (ValueError, OSError) as error:
            if self.strict or (isinstance(error, OSError) and error.errno not in FILE_ERRORS):
                raise
            reason = str(error).replace(f"{self.folder}/", "")  # prepared data holds no paths of this machine
            kind: dict[str, Any] = {"missing": True} if missing else {}
            if isinstance(error, DecodedTooLargeError):
                kind = {"max_video_mib": self.max_bytes >> 20}
            skipped = [{"caption": index, "video": job.video, "reason": reason} | kind for index, _ in job.captions]
            return VideoPlan(np.zeros(0), [], skipped), np.zeros((0, self.side, self.side, 3), np.uint8)

    def _decode(self, job: VideoJob, info: VideoInfo) -> tuple[VideoPlan, NDArray[np.uint8]]:
        plan = self._plan(job, info)
        if not len(plan.times):
            return plan, np.zeros((0, self.side, self.side, 3), np.uint8)
        try:
            frames, _ = read_video(
                self._locate(job),
                side=self.side,
                fit=self.fit,
                place=self.place,
                only=plan.times,
                info=info,
                max_bytes=self.max_bytes,
            )
        except DecodedTooLargeError:
            raise DecodedTooLargeError(
                f"{job.video} has {len(plan.times)} frames that clips need, more than max_video_mib="
                f"{self.max_bytes >> 20} holds; raise it, or lower clips.max_clips_per_length or frame_pixels"
            ) from None
        return plan, frames

    def _locate(self, job: VideoJob) -> MediaPath:
        """The file of a video, or its bytes in a tar.

        Raises: ValueError if a link leads out of the folder; OSError where it is not the file's fault.
        """
        if (source := job.captions[0][1].source) is not None:
            return source
        path = _find(self.folder, job.video)
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError) as error:  # links in a loop, overlong names
            if isinstance(error, OSError) and error.errno not in FILE_ERRORS:
                raise
            raise ValueError(f"{path} cannot be opened ({one_line(error)})") from None
        if not inside:
            raise ValueError(f"{path} is a link that leads out of {self.folder}; give a path inside it")
        return path


def _find(folder: Path, video: str) -> Path:
    """The file of a video, by its name as written or else as another system would write it.

    Raises: ValueError if there is none and the name is a URL or a path of another machine.
    """
    found = next(filter(is_file, _spellings(folder, video)), None)
    if found is None and "://" in video:
        raise ValueError(f"{video} is an address; download the video and give its path")
    if found is None and re.match(r"[A-Za-z]:[\\/]|\\\\", video):
        raise ValueError(f"{video} is a path on another machine; give one relative to the folder of videos")
    return found or folder / video


def _spellings(folder: Path, video: str) -> tuple[Path, ...]:
    """Where a video may lie: by its name as written, or else as another system would write it."""
    plain = plain_path(video)
    return folder / video, folder / plain, folder / unicodedata.normalize("NFD", plain)


def select_rows(rows: list[tuple[int, Clip]]) -> tuple[NDArray[np.int64], list[tuple[int, Clip]]]:
    """The distinct frames that rows use, ascending, and the rows with their frames as indices into these."""
    used = np.array(sorted({frame for _, clip in rows for frame in clip.frames}), np.int64)
    new_index = {int(frame): index for index, frame in enumerate(used)}
    return used, [(index, Clip(clip.seconds, tuple(new_index[frame] for frame in clip.frames))) for index, clip in rows]


def _within_shot(caption: Caption, shot: NDArray[np.float64]) -> list[Caption]:
    """The part of a caption's span between a shot's first and last frame; empty if there is none."""
    start, end = max(caption.start, float(shot[0])), min(float("inf") if caption.end is None else caption.end, shot[-1])
    return [replace(caption, start=start, end=float(end))] if start < end else []


def _keep_all(video: str, plan: VideoPlan, frames: NDArray[np.uint8]) -> tuple[VideoPlan, NDArray[np.uint8]]:
    return plan, frames


@dataclass(frozen=True)
class ShardBuilder:
    """Builds the arrays of a shard in memory."""

    extractor: Extractor
    encode: Encode
    kind: Kind
    encode_batch: int
    """Frames per call of `encode`."""
    workers: int
    """Decoding threads."""
    new_screen: Callable[[], Screen] = lambda: _keep_all
    """Makes a shard's screen, which leaves out clips by their pixels."""

    def build(
        self, jobs: Sequence[VideoJob], advance: Callable[[int], Any]
    ) -> tuple[dict[str, NDArray[Any]], list[dict[str, Any]], list[int | None]]:
        """Returns a shard's arrays by file name, the skipped captions, and the sizes of the videos in bytes.

        Calls `advance(1)` after each video.

        Raises: ValueError for a video that cannot be used, if the extractor is strict.
        """
        rows: list[tuple[int, float, float]] = []
        clips: list[NDArray[Any]] = []
        skipped: list[dict[str, Any]] = []
        video_bytes: list[int | None] = []
        for plan, codes in self._encoded(jobs):
            skipped += plan.skipped
            video_bytes.append(plan.video_bytes)
            rows += plan.entries()
            for _, clip in plan.rows:
                clips.append(codes[list(clip.frames)] if self.kind == "tokens" else codes[clip.frames[0]])
            advance(1)
        array = np.stack(clips) if clips else np.zeros((0,))
        return {"rows.npy": np.array(rows, ROW), f"{self.kind}.npy": array}, skipped, video_bytes

    def _encoded(self, jobs: Sequence[VideoJob]) -> Iterator[tuple[VideoPlan, NDArray[Any]]]:
        """Decode ahead in threads, encode in batches across videos; yields each video's plan and encoded frames."""
        pending: list[tuple[VideoPlan, NDArray[np.uint8]]] = []
        screen = self.new_screen()
        with ThreadPoolExecutor(self.workers) as pool:
            decoded = map_ahead(pool, self.extractor.decode, jobs, 4 * self.workers)
            for job, (plan, frames) in zip(jobs, decoded, strict=True):
                pending.append(screen(job.video, plan, frames))
                # Collect four batches before encoding, so that most batches are full.
                if sum(len(frames) for _, frames in pending) >= 4 * self.encode_batch:
                    yield from self._encode(pending)
                    pending = []
            yield from self._encode(pending)

    def _encode(self, videos: list[tuple[VideoPlan, NDArray[np.uint8]]]) -> Iterator[tuple[VideoPlan, NDArray[Any]]]:
        codes: NDArray[Any] = np.zeros((0,))
        if any(len(frames) for _, frames in videos):
            pixels = np.concatenate([frames for _, frames in videos])
            batches = np.array_split(pixels, -(-len(pixels) // self.encode_batch))
            codes = np.concatenate([self.encode(batch) for batch in batches])
        first = 0
        for plan, frames in videos:
            yield plan, codes[first : first + len(frames)]
            first += len(frames)


def crop_frames(frames: NDArray[np.uint8], side: int | None) -> NDArray[np.uint8]:
    """Cut a square of `side` out of each frame (N, H, W, 3) -> (N, side, side, 3); None: keep whole frames.

    Its place is random, but seeded by the frame's own pixels, so that it does not depend on batches or processes.
    """
    if side is None or not len(frames):
        return frames
    height, width = frames.shape[1:3]
    crops = []
    for frame in frames:
        rng = np.random.default_rng(zlib.crc32(frame.tobytes()))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crops.append(frame[top : top + side, left : left + side])
    return np.stack(crops)


def map_ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Like pool.map, in order, but with at most `ahead` results in memory."""
    iterator = iter(items)
    pending: list[Future[R]] = [pool.submit(work, item) for item in islice(iterator, ahead)]
    while pending:
        result = pending.pop(0).result()
        pending += [pool.submit(work, item) for item in islice(iterator, 1)]
        yield result
