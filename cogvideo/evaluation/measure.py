"""Measure a set of clips: choose one clip per video, then compute features and pixel measures, batch by batch.

Only one batch of frames is in memory at a time; of each clip, its features are kept, 10 to 50 KB. Measured clips can be
cached on disk, under the protocol's hash and a digest of the networks and the clips, so that an interrupted evaluation
can resume and several processes can share one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cogvideo.distributed import ProcessGroup
from cogvideo.evaluation import pixel_metrics
from cogvideo.evaluation.lpips import PairNetwork
from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.evaluation.packaged_networks import TAKES_PIXELS
from cogvideo.evaluation.pixel_metrics import DRIFT_FRAMES, FROZEN_MOTION
from cogvideo.evaluation.preprocessing import choose_frames, network_input, resize_frames, to_bytes
from cogvideo.evaluation.protocols import Protocol, Start
from cogvideo.evaluation.sources import Clip, ClipSource, Frames, ReconstructedClip
from cogvideo.evaluation.warp import warp_residual
from cogvideo.files import atomic_write, read_npz
from cogvideo.locks import InUseError, lock_output, remove_dead_lock
from cogvideo.logs import progress

CACHE_BYTES = 1 << 30
CHUNK = 64
"""Clips per cache file: the most that each process has to repeat after an interruption."""
CACHE_VERSION = 2
"""Incremented when the cached content of a clip changes."""
ALONE = ProcessGroup()


class ChosenClip(NamedTuple):
    """A video and the indices of the frames chosen from it."""

    clip: Clip
    indices: NDArray[np.int64]


class Choice(NamedTuple):
    """Clips of a source, in the order of their names."""

    clips: list[ChosenClip]
    too_short: int
    """Number of videos examined and left out."""

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for clip, indices in self.clips:
            digest.update(f"{clip.identity} {indices.tolist()}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Measured:
    """Measurements of a set of clips, one row per clip."""

    names: list[str]
    features: dict[str, NDArray[np.float32]]
    """(clips, d) by the network's role."""
    pixels: dict[str, NDArray[np.float64]]
    """(clips,) by measure; NaN where a clip has no value."""
    captions: tuple[str | None, ...] = ()
    codes: NDArray[np.int64] | None = None
    """(codes of the image tokenizer,): how often each occurs in reconstructed clips; None for other sets."""

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def joined(cls, parts: Sequence[Measured]) -> Measured:
        """Concatenate sets that were measured in the same way."""
        first = parts[0]
        codes = [part.codes for part in parts if part.codes is not None]
        return cls(
            [name for part in parts for name in part.names],
            {role: np.concatenate([part.features[role] for part in parts]) for role in first.features},
            {name: np.concatenate([part.pixels[name] for part in parts]) for name in first.pixels},
            tuple(caption for part in parts for caption in part.captions),
            None if not codes else np.sum(codes, axis=0),
        )

    def part(self, rows: slice | NDArray[np.int64]) -> Measured:
        names = np.array(self.names, dtype=object)[rows].tolist()
        features = {role: values[rows] for role, values in self.features.items()}
        captions = tuple(np.array(self.captions, dtype=object)[rows].tolist())
        return Measured(names, features, {name: values[rows] for name, values in self.pixels.items()}, captions)


def choose_clips(
    source: ClipSource,
    protocol: Protocol,
    start: Start,
    wanted: int | None,
    seed: int,
    processes: ProcessGroup = ALONE,
) -> Choice:
    """Draw up to `wanted` videos that are long enough (None: all), and a clip from each. `seed` determines the clips.

    With several processes, only rank 0 examines the videos. Raises: ValueError for a video that cannot be read.
    """

    def choose() -> tuple[list[tuple[int, NDArray[np.int64]]], int]:
        rng = np.random.default_rng((seed, 0xE7A1))
        chosen: list[tuple[int, NDArray[np.int64]]] = []
        too_short = 0
        for index in rng.permutation(len(source)).tolist():
            if wanted is not None and len(chosen) == wanted:
                break
            clip = source.clips[index]
            try:
                frames = choose_frames(protocol, clip.num_frames, clip.seconds, start, rng)
            except ValueError as error:
                if clip.name in str(error):
                    raise
                raise ValueError(f"{source.origin}, {clip.name}: {error}") from None
            if frames is None:
                too_short += 1
            else:
                chosen.append((index, frames))
        return chosen, too_short

    chosen, too_short = processes.broadcast_from_rank_0(choose)
    clips = [ChosenClip(source.clips[index], frames) for index, frames in chosen]
    return Choice(sorted(clips, key=lambda entry: entry.clip.name), too_short)


@dataclass(frozen=True)
class Meter:
    """Measures all sets of clips in the same way."""

    protocol: Protocol
    networks: dict[str, FeatureNetwork]
    batch: int = 8
    """Clips per forward pass of a network."""
    cache: Path | None = None
    """Folder of measured clips; several processes need one that all of them can access."""
    seam: int | None = None
    """Index of the frame at which a continuation begins."""
    processes: ProcessGroup = ALONE
    pair_networks: dict[str, PairNetwork] = field(default_factory=dict)
    """LPIPS, by role, for clips with references."""

    def measure(self, choice: Choice, what: str, references: Sequence[ChosenClip] | None = None) -> Measured:
        """Read and measure clips. `what`: their name in the progress bar.

        Clips are measured and cached in chunks of `CHUNK`. With several processes, each measures its share of
        the chunks, waits for the others, and reads their chunks from the cache.

        `references`, one per clip, adds PSNR, SSIM and LPIPS.
        Raises: ValueError, OSError for a clip that cannot be read.
        """
        if self.cache is None and self.processes.size > 1:
            raise ValueError("several processes share what they measured in a folder; give one as the cache")
        starts = range(0, len(choice.clips), CHUNK)
        chunks = [Choice(choice.clips[first : first + CHUNK], 0) for first in starts]
        known = [None if references is None else references[first : first + CHUNK] for first in starts]
        own = self.processes.shard(len(chunks))
        parts: dict[int, Measured] = {}
        with progress(sum(len(chunks[number].clips) for number in own), what, "clips") as bar:
            for number in own:
                parts[number] = self._chunk(chunks[number], known[number], bar.update)
        self.processes.barrier()
        for number in set(range(len(chunks))) - set(own):
            parts[number] = self._chunk(chunks[number], known[number], lambda count: None)
        return Measured.joined([parts[number] for number in range(len(chunks))])

    def _chunk(
        self, choice: Choice, references: Sequence[ChosenClip] | None, update: Callable[[int], object]
    ) -> Measured:
        """A chunk from the cache, or measured and added to it."""
        file = None if self.cache is None else self.cache / f"{self._key(choice, references is not None)}.npz"
        arrays, was_there = cached(
            file,
            lambda: _to_arrays(self._measure(choice, references, update)),
            lambda arrays: _fits(arrays, len(choice.clips)),
        )
        if was_there:
            update(len(choice.clips))
        return _from_arrays(arrays, choice)

    def _measure(
        self, choice: Choice, references: Sequence[ChosenClip] | None, update: Callable[[int], object]
    ) -> Measured:
        features: dict[str, list[NDArray[np.float32]]] = {role: [] for role in self.networks}
        rows: list[dict[str, float]] = []
        codes: NDArray[np.int64] | None = None
        for first in range(0, len(choice.clips), self.batch):
            batch = []
            for number, (clip, indices) in enumerate(choice.clips[first : first + self.batch], first):
                if isinstance(clip, ReconstructedClip):
                    shown, counts = clip.reconstruct(indices)
                    pixels = self.prepare(shown)
                    codes = counts if codes is None else codes + counts
                else:
                    pixels = self._prepared(clip, indices)
                batch.append(pixels)
                frames = to_bytes(pixels)
                row = self._pixel_row(frames, None if clip.seconds is None else clip.seconds[indices])
                if references is not None:
                    original = to_bytes(self._prepared(*references[number]))
                    row["psnr"] = pixel_metrics.psnr(frames, original)
                    row["ssim"] = pixel_metrics.ssim(frames, original)
                    row |= {role: network.distance(frames, original) for role, network in self.pair_networks.items()}
                rows.append(row)
            for role, network in self.networks.items():
                clips = torch.stack([network_input(self.protocol, pixels, role) for pixels in batch])
                prepare = self.protocol.network_prepares and role not in TAKES_PIXELS
                features[role].append(network.features(clips, prepare=prepare))
            update(len(batch))
        return Measured(
            [clip.name for clip, _ in choice.clips],
            {role: np.concatenate(parts) for role, parts in features.items()},
            {name: np.array([row[name] for row in rows]) for name in rows[0]},
            tuple(clip.caption for clip, _ in choice.clips),
            codes,
        )

    def frames(self, chosen: ChosenClip) -> Frames:
        """A clip's frames as they are measured, (n, side, side, 3)."""
        return to_bytes(self._prepared(*chosen))

    def prepare(self, frames: Frames) -> torch.Tensor:
        """Frames at the protocol's size, (n, 3, side, side) 0 to 255."""
        return resize_frames(frames, self.protocol.side, self.protocol.crop, self.protocol.filter)

    def _prepared(self, clip: Clip, indices: NDArray[np.int64]) -> torch.Tensor:
        return clip.resized(indices, self.prepare)

    def _pixel_row(self, frames: Frames, seconds: NDArray[np.float64] | None) -> dict[str, float]:
        moved = pixel_metrics.motion(frames) if len(frames) > 1 else float("nan")
        values: dict[str, float | None] = {"motion": moved, "motion_at_fps": None}
        if seconds is not None and len(frames) > 1:
            with suppress(ValueError):  # no value for a clip that is too slow or too short
                values["motion_at_fps"] = pixel_metrics.motion(frames, seconds, self.protocol.motion_fps)
        values["frozen"] = float(moved < FROZEN_MOTION)
        values["flicker"] = pixel_metrics.flicker(frames)
        values["warp_residual"] = warp_residual(frames, FROZEN_MOTION)
        for distance in [distance for distance in DRIFT_FRAMES if distance < self.protocol.frames]:
            values[f"drift_{distance}"] = pixel_metrics.drift(frames, distance)
        if self.seam is not None:
            values["seam"] = pixel_metrics.seam(frames, self.seam)
        return {name: float("nan") if value is None else value for name, value in values.items()}

    def _key(self, choice: Choice, has_references: bool) -> str:
        used = self.networks | self.pair_networks
        networks = sorted((role, network.sha256) for role, network in used.items())
        parts = (CACHE_VERSION, self.protocol.hash, networks, self.seam, has_references, choice.digest)
        return f"{self.protocol.hash}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"


def cached(
    file: Path | None, compute: Callable[[], dict[str, Any]], fits: Callable[[dict[str, Any]], bool]
) -> tuple[dict[str, Any], bool]:
    """The arrays of a file if they fit, else computed ones, then stored in it; and whether they came from the file.

    `file` None: nothing is stored. Raises: OSError; ValueError for a damaged file; whatever `compute` raises.
    """
    if file is not None and file.is_file():
        found = read_npz(file, max_bytes=CACHE_BYTES)
        if fits(found):
            remove_dead_lock(file)
            return found, True
    arrays = compute()
    if file is not None:
        with (
            suppress(InUseError),  # another process is writing the same file
            lock_output(file),
            atomic_write(file) as temporary,
            open(temporary, "wb") as opened,
        ):
            np.savez(opened, **arrays)
    return arrays, False


def _to_arrays(measured: Measured) -> dict[str, Any]:
    arrays: dict[str, Any] = {f"features_{role}": values for role, values in measured.features.items()}
    arrays |= {f"pixels_{name}": values for name, values in measured.pixels.items()}
    return arrays if measured.codes is None else {**arrays, "codes": measured.codes}


def _fits(arrays: dict[str, Any], count: int) -> bool:
    """Whether every array but the codes has one row per clip."""
    return {values.shape[:1] for name, values in arrays.items() if name != "codes"} == {(count,)}


def _from_arrays(arrays: dict[str, Any], choice: Choice) -> Measured:
    codes = arrays.get("codes")
    return Measured(
        [clip.name for clip, _ in choice.clips],
        {name.removeprefix("features_"): v.astype(np.float32) for name, v in arrays.items() if "features_" in name},
        {name.removeprefix("pixels_"): v for name, v in arrays.items() if "pixels_" in name},
        tuple(clip.caption for clip, _ in choice.clips),
        None if codes is None else codes.astype(np.int64),
    )
