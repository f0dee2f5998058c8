"""Leave out clips that hardly move, or that look like a clip of another video; `ClipConfig` has the thresholds."""

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cogvideo.data.clips import Clip
from cogvideo.data.extract import VideoPlan, select_rows
from cogvideo.media.similarity import clip_distances, motion, thumbnails


class ClipScreen:
    """Screens the clips of one shard video by video, in order, so that the result does not depend on threads."""

    def __init__(self, min_motion: float | None, min_distance: float | None):
        self.min_motion, self.min_distance = min_motion, min_distance
        self._videos: list[str] = []
        """The video of each clip that was kept. Clips are compared with those of earlier videos only."""
        self._kept: NDArray[np.uint8] | None = None
        """(clips, frames, 8, 8, 3): thumbnails of the clips that were kept."""

    def screen(self, video: str, plan: VideoPlan, frames: NDArray[np.uint8]) -> tuple[VideoPlan, NDArray[np.uint8]]:
        """A video's plan and frames without the clips that are left out; entries of `skipped` say which and why.

        These entries are marked `screened`: the videos are sound, and a rerun would leave out the same clips.
        """
        if (self.min_motion is None and self.min_distance is None) or not plan.rows:
            return plan, frames
        small = thumbnails(frames) if self.min_distance is not None else np.zeros((len(frames), 0), np.uint8)
        verdicts: dict[tuple[int, ...], str] = {}  # captions of one span share their clips
        for _, clip in plan.rows:
            if clip.frames not in verdicts:
                verdicts[clip.frames] = self._verdict(clip, frames, small)
        kept = [small[list(clip)] for clip, reason in verdicts.items() if not reason]
        if self.min_distance is not None and kept:
            self._videos += [video] * len(kept)
            before = [] if self._kept is None else [self._kept]
            self._kept = np.concatenate([*before, np.stack(kept)])
        if not any(verdicts.values()):
            return plan, frames
        total = Counter(caption for caption, _ in plan.rows)
        dropped: dict[int, list[str]] = {}
        for caption, clip in plan.rows:
            if reason := verdicts[clip.frames]:
                dropped.setdefault(caption, []).append(reason)
        skipped = [
            {
                "caption": caption if len(reasons) == total[caption] else None,
                "video": video,
                "reason": f"{len(reasons)} of {total[caption]} clips of caption {caption} left out: {reasons[0]}",
                "screened": True,
            }
            for caption, reasons in dropped.items()
        ]
        rows = [row for row in plan.rows if not verdicts[row[1].frames]]
        used, rows = select_rows(rows)
        return replace(plan, times=plan.times[used], rows=rows, skipped=plan.skipped + skipped), frames[used]

    def _verdict(self, clip: Clip, frames: NDArray[np.uint8], small: NDArray[np.uint8]) -> str:
        """Why a clip is left out; empty if it is kept."""
        picked = list(clip.frames)
        if self.min_motion is not None and (moves := motion(frames[picked])) < self.min_motion:
            return f"near-static, motion {moves:.2f} of 255 is below clips.min_motion={self.min_motion:g}"
        if self.min_distance is not None and self._kept is not None:
            distances = clip_distances(small[picked], self._kept)
            nearest = int(distances.argmin())
            if distances[nearest] < self.min_distance:
                return (
                    f"near-duplicate of {self._videos[nearest]}, distance {distances[nearest]:.2f} of 255 is below "
                    f"clips.min_distance={self.min_distance:g}"
                )
        return ""
