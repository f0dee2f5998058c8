"""From one video and its captions to the distinct frames that its clips want. No tokens, no files written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.data.captions import Caption
from cogvideo.data.clips import Clip
from cogvideo.media.cuts import find_cuts
from cogvideo.media.video import SAME_TIME, probe_video, read_video

Choose = Callable[[NDArray[np.float64], Caption], list[Clip]]
"""Which clips a caption's span of a video gives, from the video's frame times."""


@dataclass(frozen=True)
class VideoJob:
    """One video and the captions that speak of it, with their ids."""

    video: str
    captions: tuple[tuple[int, Caption], ...]


@dataclass(frozen=True)
class VideoPlan:
    """What is wanted of a video."""

    times: NDArray[np.float64]
    """(N,) the distinct frames' times, ascending."""
    rows: list[tuple[int, Clip]]
    """Caption id and a clip whose frames are indices into `times`."""
    skipped: list[dict[str, Any]]
    """Captions that give nothing, each with the reason."""


@dataclass(frozen=True)
class Extractor:
    """How videos of one folder are read."""

    folder: Path
    side: int
    """Pixels a side of a frame."""
    choose: Choose
    strict: bool
    """Whether a video that cannot be used is an error; else it is skipped."""
    max_bytes: int
    """Of one video's decoded frames."""
    cut_threshold: float | None = None
    """As of `ClipConfig`."""

    def plan(self, job: VideoJob) -> VideoPlan:
        """Choose a video's clips by its timestamps. Raises: ValueError if it is bad, or gives nothing and `strict`."""
        path = self._inside(job.video)
        times = probe_video(path).seconds
        shots = [times]
        if self.cut_threshold is not None:
            cuts = find_cuts(path, self.cut_threshold)
            shots = np.split(times, np.searchsorted(times, cuts - SAME_TIME))
        rows: list[tuple[int, Clip]] = []
        skipped: list[dict[str, Any]] = []
        for index, caption in job.captions:
            spans = [caption] if len(shots) == 1 else [part for shot in shots for part in _within(caption, shot)]
            clips = [clip for span in spans for clip in self.choose(times, span)]
            rows += [(index, clip) for clip in clips]
            if not clips:
                end = float(times[-1]) if caption.end is None else caption.end
                reason = f"no clip fits between {caption.start:g} s and {end:g} s of {job.video}"
                if self.strict:
                    raise ValueError(reason)
                skipped.append({"caption": index, "video": job.video, "reason": reason})
        wanted = np.array(sorted({frame for _, clip in rows for frame in clip.frames}), int)
        place = {int(frame): position for position, frame in enumerate(wanted)}
        moved = [(index, Clip(clip.seconds, tuple(place[frame] for frame in clip.frames))) for index, clip in rows]
        return VideoPlan(times[wanted], moved, skipped)

    def decode(self, job: VideoJob) -> tuple[VideoPlan, NDArray[np.uint8]]:
        """A video's plan and its wanted frames (N, side, side, 3). Raises: ValueError for a bad video, if `strict`."""
        none = np.zeros((0, self.side, self.side, 3), np.uint8)
        try:
            plan = self.plan(job)
            if not len(plan.times):
                return plan, none
            frames, _ = read_video(self._inside(job.video), side=self.side, only=plan.times, max_bytes=self.max_bytes)
            return plan, frames
        except ValueError as error:
            if self.strict:
                raise
            reason = str(error).replace(f"{self.folder}/", "")  # prepared data names no machine's folders
            skipped = [{"caption": index, "video": job.video, "reason": reason} for index, _ in job.captions]
            return VideoPlan(np.zeros(0), [], skipped), none

    def _inside(self, video: str) -> Path:
        """A video's place. Raises: ValueError if a link leads out of the folder."""
        path = self.folder / video
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{path} is a link that leads out of {self.folder}; give a path inside it")
        return path


def _within(caption: Caption, shot: NDArray[np.float64]) -> list[Caption]:
    """The part of a caption's span that lies between a shot's first frame and its last, if any."""
    start, end = max(caption.start, float(shot[0])), min(float("inf") if caption.end is None else caption.end, shot[-1])
    return [replace(caption, start=start, end=float(end))] if start < end else []
