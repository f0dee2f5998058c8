"""The properties of captioned videos that determine the choice of sizes and clip lengths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogvideo.data.captions import CaptionsFile
from cogvideo.data.clips import ClipConfig, pick_frames
from cogvideo.data.prepare import Preparation, PrepareConfig
from cogvideo.data.statistics import spread
from cogvideo.logs import progress
from cogvideo.media.video import SAME_TIME

MAX_VIDEOS = 100
LENGTHS = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
"""Clip lengths in seconds to choose among."""
ENOUGH = 0.5
"""Share of the captions that must be long enough for a clip length."""


@dataclass(frozen=True)
class Survey:
    """Counts over all captions; lengths and medians from a sample of the videos."""

    num_videos: int
    num_captions: int
    seconds: tuple[float, ...]
    """Length of each sampled caption's span, including the duration of the last frame."""
    fps: float
    short_side: int
    """Pixels."""

    def clip_lengths(self, most: int) -> tuple[float, ...]:
        """Up to `most` clip lengths that suit the videos, longest first, each half of the one before.

        Raises: ValueError if there is none.
        """
        fit = [length for length in LENGTHS if self.fits(length)]
        if not fit:
            raise ValueError(
                f"no clip of five frames fits videos of {np.median(self.seconds):.2g} s at {self.fps:.3g} frames per "
                "second (medians); give longer videos or spans"
            )
        return tuple(fit[:most])

    def fits(self, length: float, num_frames: int = 5) -> bool:
        """Whether enough captions are this long, and clips of this length have `num_frames` different frames."""
        if np.mean(np.array(self.seconds) >= length - SAME_TIME) < ENOUGH:
            return False
        times = np.arange(1 + math.ceil(length * self.fps)) / self.fps
        return pick_frames(times, 0.0, length, ClipConfig(num_frames=num_frames)) is not None

    def __str__(self) -> str:
        return (
            f"{self.num_captions:,} captions of {self.num_videos:,} videos; medians: {np.median(self.seconds):.3g} s, "
            f"{self.fps:.3g} frames per second, {self.short_side} pixels at the shorter side"
        )


def survey_videos(captions: CaptionsFile) -> Survey:
    """Read the frame times of up to MAX_VIDEOS videos. Raises: ValueError if none can be read."""
    source = Preparation(captions, captions.path.parent, "frames", PrepareConfig())
    seconds: list[float] = []
    fps: list[float] = []
    sides: list[int] = []
    problem = ""
    with progress(min(MAX_VIDEOS, source.num_videos), "surveying videos", "videos") as bar:
        for job in source.sample_jobs(MAX_VIDEOS):
            bar.update(1)
            try:
                info = source.extractor.probe(job)
            except (ValueError, OSError, MemoryError) as error:
                problem = str(error)
                continue
            if len(info.seconds) < 2:
                continue
            frame = float(np.median(np.diff(info.seconds)))
            fps.append(1 / frame)
            sides.append(min(info.width, info.height))
            last = info.duration + frame
            seconds += [min(last, last if c.end is None else c.end) - c.start for _, c in job.captions]
    if not fps:
        raise ValueError(f"no video of {captions.path} can be read: {problem or 'each has one frame only'}")
    return Survey(source.num_videos, len(captions), tuple(seconds), float(np.median(fps)), int(np.median(sides)))


def example_prompts(captions: CaptionsFile, count: int) -> list[str]:
    """Distinct captions, spread over the whole file, to sample with."""
    found = captions.select(spread(len(captions), 50 * count))
    texts = list(dict.fromkeys(caption.text.replace("\n", " ") for caption in found))
    return [texts[index] for index in spread(len(texts), count)]


def text_length(lengths: Sequence[int], multiple: int = 16, most: int = 256) -> int:
    """model.text_len for prompts of these lengths in tokens: no prompt is cut, unless it is longer than `most`."""
    return int(min(most, max(2 * multiple, -(-max(lengths) // multiple) * multiple)))
