"""A clip's mask as rectangles and triangles of rows: what one training forward computes without mask or gather.

With rows in a suitable order every mask of masks.py falls apart into tiles, each a run of query rows, keys that all of
them see, and keys seen up to the query itself. Plans by blocks (plan.py) serve any rows; this is for whole clips.
No arithmetic of the model here: see tiled_attention.py.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cogvideo.model.masks import Mask
from cogvideo.sequence.layout import ClipLayout


@dataclass(frozen=True)
class Strips:
    """Equal runs of rows at equal distances: rows start + g * step + [0, length) for g < groups."""

    start: int
    length: int
    groups: int = 1
    step: int = 0

    def views(self, x: Tensor) -> list[Tensor]:
        """(batch, rows, heads, size) -> views (some batch, heads, length, size), the groups of one clip as a batch."""
        if len(x) == 1 and self.groups > 1:
            span = x[0].narrow(0, self.start, (self.groups - 1) * self.step + self.length)
            return [span.unfold(0, self.length, self.step).transpose(2, 3)]
        starts = range(self.start, self.start + max(1, self.groups * self.step), max(1, self.step))
        return [x.narrow(1, start, self.length).transpose(1, 2) for start in starts]


@dataclass(frozen=True)
class Tile:
    """Query rows, and the keys they meet; text keys come on top."""

    queries: Strips
    whole: Strips | None
    """Keys that every query sees."""
    causal: Strips | None
    """As many keys as queries, each seen from its own place on."""


@dataclass(frozen=True)
class TiledChannel:
    """All tiles of one channel in one layer."""

    tiles: tuple[Tile, ...]
    order: Tensor | None
    """(slots,) the slot of every row; None: rows are in slot order."""
    restore: Tensor | None
    """(answered rows,) where each answered slot's row is, in slot order; None: all rows, as they stand."""

    def to(self, device: torch.device | str) -> "TiledChannel":
        order, restore = (None if x is None else x.to(device) for x in (self.order, self.restore))
        return TiledChannel(self.tiles, order, restore)


def tile_channel(mask: Mask, answered: tuple[int, ...] | None = None) -> TiledChannel | None:
    """Tiles for a whole clip, of which only the frames `answered` (default: all) are asked for.

    None for a layout in which a causal frame shares its rank: its mask is no triangle.
    """
    layout = mask.layout
    answered = tuple(range(layout.num_frames)) if answered is None else answered
    by_rank = defaultdict(list)
    for frame in layout.frames:
        by_rank[frame.rank].append(frame)
    if mask.wrap_given or any(len(f) > 1 and any(x.causal for x in f) for f in by_rank.values()):
        return None
    if mask.scope == "frame":
        tiles, rows = _tiles_by_frame(layout, answered), np.arange(layout.num_slots)
    else:
        tiles, rows = _tiles_by_cell(mask, answered)
    row_of_slot = np.argsort(rows)
    restore = row_of_slot[layout.slots_of(*answered)]
    in_order = bool((rows == np.arange(len(rows))).all())
    as_they_stand = len(restore) == len(rows) and in_order
    return TiledChannel(
        tuple(tiles),
        None if in_order else torch.from_numpy(rows),
        None if as_they_stand else torch.from_numpy(restore),
    )


def _tiles_by_frame(layout: ClipLayout, answered: tuple[int, ...]) -> list[Tile]:
    """The spatial channel: every frame sees itself, causally or whole."""
    n, tiles = layout.frame_len, []
    for causal in (False, True):
        frames = [f for f in answered if layout.frames[f].causal == causal]
        steps = {b - a for a, b in pairwise(frames)}
        together = [frames] if frames and len(steps) <= 1 else [[f] for f in frames]
        for group in together:
            step = (group[1] - group[0]) * n if len(group) > 1 else 0
            strips = Strips(group[0] * n, n, len(group), step)
            tiles.append(Tile(strips, None if causal else strips, strips if causal else None))
    return tiles


def _tiles_by_cell(mask: Mask, answered: tuple[int, ...]) -> tuple[list[Tile], np.ndarray]:
    """The temporal channel, and each row's slot: cell after cell, equal ones side by side, frames by rank in each."""
    layout = mask.layout
    frames = sorted(range(layout.num_frames), key=lambda f: (layout.frames[f].rank, f))
    cell = mask.cell(np.arange(layout.frame_len))
    members = sorted((np.flatnonzero(cell == c) for c in np.unique(cell)), key=len)
    rows, tiles, start = [], [], 0
    for size in sorted({len(m) for m in members}):
        alike = [m for m in members if len(m) == size]
        rows += [m + f * layout.frame_len for m in alike for f in frames]
        groups, step = len(alike), size * layout.num_frames
        for first, last in _runs(layout, frames, answered):

            def strips(a: int, b: int, start: int = start, groups: int = groups, step: int = step) -> Strips:
                return Strips(start + a * size, (b - a) * size, groups, step)  # noqa: B023

            queries = strips(first, last)
            if layout.frames[frames[first]].causal:
                tiles.append(Tile(queries, strips(0, first) if first else None, queries))
            else:
                rank = layout.frames[frames[first]].rank
                seen = sum(f.rank <= rank for f in layout.frames)
                tiles.append(Tile(queries, strips(0, seen), None))
        start += groups * step
    return tiles, np.concatenate(rows)


def _runs(layout: ClipLayout, frames: list[int], answered: tuple[int, ...]) -> list[tuple[int, int]]:
    """Places [first, last) in `frames` whose queries go together: causal ones in a row, or whole ones of one rank."""
    runs: list[tuple[int, int]] = []
    for place, f in enumerate(frames):
        if f not in answered:
            continue
        if runs and runs[-1][1] == place:
            before, here = layout.frames[frames[place - 1]], layout.frames[f]
            if (before.causal and here.causal) or (before.rank == here.rank):
                runs[-1] = (runs[-1][0], place + 1)
                continue
        runs.append((place, place + 1))
    return runs
