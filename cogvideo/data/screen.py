"""Leave out clips that hardly move, or that look like a clip of another video; `ClipConfig` has the thresholds."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from cogvideo.data.clips import Clip
from cogvideo.data.extract import VideoPlan, select_rows
from cogvideo.media.similarity import difference_hashes, hash_distances, motion


class ClipScreen:
    """Screens the clips of one shard, video by video in their order, so that the result does not depend on threads."""

    def __init__(self, min_motion: float | None, min_distance: float | None):
        self.min_motion, self.min_distance = min_motion, min_distance
        self._kept: list[tuple[str, NDArray[np.bool_]]] = []
        """Video and hashes of the clips that were kept."""

    def screen(self, video: str, plan: VideoPlan, frames: NDArray[np.uint8]) -> tuple[VideoPlan, NDArray[np.uint8]]:
        """A video's plan and frames without the clips that are left out; entries of `skipped` say which and why."""
        if (self.min_motion is None and self.min_distance is None) or not plan.rows:
            return plan, frames
        hashes = difference_hashes(frames) if self.min_distance is not None else np.zeros((len(frames), 0), bool)
        verdicts: dict[tuple[int, ...], str] = {}  # captions of one span share their clips
        for _, clip in plan.rows:
            if clip.frames not in verdicts:
                verdicts[clip.frames] = self._verdict(clip, frames, hashes)
        if self.min_distance is not None:
            self._kept += [(video, hashes[list(clip)]) for clip, reason in verdicts.items() if not reason]
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
            }
            for caption, reasons in dropped.items()
        ]
        rows = [row for row in plan.rows if not verdicts[row[1].frames]]
        used, rows = select_rows(rows)
        return VideoPlan(plan.times[used], rows, plan.skipped + skipped), frames[used]

    def _verdict(self, clip: Clip, frames: NDArray[np.uint8], hashes: NDArray[np.bool_]) -> str:
        """Why a clip is left out; empty if it is kept."""
        picked = list(clip.frames)
        if self.min_motion is not None and (moves := motion(frames[picked])) < self.min_motion:
            return f"near-static, motion {moves:.2f} of 255 is below clips.min_motion={self.min_motion:g}"
        if self.min_distance is not None and self._kept:
            distances = hash_distances(hashes[None, picked], np.stack([kept for _, kept in self._kept]))[0]
            if distances.min() < self.min_distance:
                other = self._kept[int(distances.argmin())][0]
                return (
                    f"near-duplicate of {other}, {distances.min():.1f} of 64 bits differ, "
                    f"below clips.min_distance={self.min_distance:g}"
                )
        return ""
