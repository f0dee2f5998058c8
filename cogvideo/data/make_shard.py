"""One shard's rows, from its videos and their captions. Nothing here writes files.

Each distinct frame that some clip of a video wants is decoded and encoded once; frames of many videos share a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.data.extract import Extractor, VideoJob, VideoPlan
from cogvideo.data.shards import ROW, Kind

Encode = Callable[[NDArray[np.uint8]], NDArray[np.integer]]
"""(frames, H, W, 3) uint8 -> (frames, frame_len) token ids of the type to store; or the frames as they are."""


@dataclass(frozen=True)
class ShardMaker:
    extractor: Extractor
    encode: Encode
    kind: Kind
    encode_batch: int
    """Frames that are encoded at once."""
    workers: int
    """Threads that decode ahead."""

    def make(
        self, jobs: Sequence[VideoJob], advance: Callable[[int], Any]
    ) -> tuple[dict[str, NDArray], list[dict[str, Any]]]:
        """A shard's arrays by file name, and what was skipped; `advance(1)` is called after each video.

        Raises: ValueError for a bad video, where the extractor is strict.
        """
        rows: list[tuple[int, float, float]] = []
        clips: list[NDArray] = []
        skipped: list[dict[str, Any]] = []
        for plan, codes in self._encoded(jobs):
            skipped += plan.skipped
            for caption, clip in plan.rows:
                rows.append((caption, clip.seconds, float(plan.times[clip.frames[0]])))
                clips.append(codes[list(clip.frames)] if self.kind == "tokens" else codes[clip.frames[0]])
            advance(1)
        name = f"{self.kind}.npy"
        return {"rows.npy": np.array(rows, ROW), name: np.stack(clips) if clips else np.zeros((0,))}, skipped

    def _encoded(self, jobs: Sequence[VideoJob]) -> Iterator[tuple[VideoPlan, NDArray]]:
        """Decode ahead in threads, encode across videos, and give each back in order with its frames' codes."""
        waiting: list[tuple[VideoPlan, NDArray[np.uint8]]] = []
        with ThreadPoolExecutor(self.workers) as pool:
            for plan, frames in _map_ahead(pool, self.extractor.decode, jobs, 4 * self.workers):
                waiting.append((plan, frames))
                # Four batches at once, so that most are full.
                if sum(len(frames) for _, frames in waiting) >= 4 * self.encode_batch:
                    yield from self._flush(waiting)
                    waiting = []
            yield from self._flush(waiting)

    def _flush(self, videos: list[tuple[VideoPlan, NDArray[np.uint8]]]) -> Iterator[tuple[VideoPlan, NDArray]]:
        codes = np.zeros((0,))
        if any(len(frames) for _, frames in videos):
            pixels = np.concatenate([frames for _, frames in videos])
            batches = np.array_split(pixels, -(-len(pixels) // self.encode_batch))
            codes = np.concatenate([self.encode(batch) for batch in batches])
        first = 0
        for plan, frames in videos:
            yield plan, codes[first : first + len(frames)]
            first += len(frames)


def _map_ahead(pool: ThreadPoolExecutor, work: Callable, items: Sequence, ahead: int) -> Iterator[Any]:
    """Like pool.map, in order, with at most `ahead` results waiting: memory stays bounded."""
    iterator = iter(items)
    pending: list[Future] = [pool.submit(work, item) for item in islice(iterator, ahead)]
    while pending:
        result = pending.pop(0).result()
        pending += [pool.submit(work, item) for item in islice(iterator, 1)]
        yield result
