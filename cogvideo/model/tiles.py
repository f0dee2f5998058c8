"""The tile plan: a whole clip's mask as rectangles and triangles of rows, computed without masks or gathers.

With the rows in a suitable order, the masks of masks.py decompose into tiles: a run of query rows, keys that all of
them see, and keys that each sees up to its own row. This is the geometry alone; `cogvideo.kernels.tiled_attention`
computes with it.
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
    """Equally long, equally spaced runs of rows: rows start + g * step + [0, length) for g < groups."""

    start: int
    length: int
    groups: int = 1
    step: int = 0

    def views(self, x: Tensor) -> list[Tensor]:
        """(batch, rows, heads, size) -> views (batch, heads, length, size), one per group.

        For a single clip, all groups form the batch of one view.
        """
        if len(x) == 1 and self.groups > 1:
            span = x[0].narrow(0, self.start, (self.groups - 1) * self.step + self.length)
            return [span.unfold(0, self.length, self.step).transpose(2, 3)]
        starts = range(self.start, self.start + max(1, self.groups * self.step), max(1, self.step))
        return [x.narrow(1, start, self.length).transpose(1, 2) for start in starts]


@dataclass(frozen=True)
class Tile:
    """Query rows and the frame keys they see; every query sees the text keys as well."""

    queries: Strips
    whole: Strips | None
    """Keys that every query sees."""
    causal: Strips | None
    """As many keys as queries; query i sees keys 0 to i."""


@dataclass(frozen=True)
class TilePlan:
    """All tiles of one channel in one layer."""

    tiles: tuple[Tile, ...]
    order: Tensor | None
    """(slots,) the slot of each row; None: rows are in slot order."""
    restore: Tensor | None
    """(query rows,) the row of each query slot, in slot order; None: all rows, already in slot order."""

    def to(self, device: torch.device | str) -> "TilePlan":
        order, restore = (None if x is None else x.to(device) for x in (self.order, self.restore))
        return TilePlan(self.tiles, order, restore)


def plan_tiles(mask: Mask, query_frames: tuple[int, ...] | None = None) -> TilePlan | None:
    """Cut a whole clip into tiles, with queries from `query_frames` only (default: all frames).

    None with windows that wrap around, or for a layout in which a causal frame shares its generation order with
    another: its mask is not a triangle.
    """
    layout = mask.layout
    query_frames = tuple(range(layout.num_frames)) if query_frames is None else query_frames
    by_order = defaultdict(list)
    for frame in layout.frames:
        by_order[frame.order].append(frame)
    if mask.wrap_given or any(len(f) > 1 and any(x.causal for x in f) for f in by_order.values()):
        return None
    if mask.scope == "frame":
        tiles, rows = _tiles_by_frame(layout, query_frames), np.arange(layout.num_slots)
    else:
        tiles, rows = _tiles_by_window(mask, query_frames)
    row_of_slot = np.argsort(rows)
    restore = row_of_slot[layout.slots_of(*query_frames)]
    in_order = bool((rows == np.arange(len(rows))).all())
    unchanged = len(restore) == len(rows) and in_order
    return TilePlan(
        tuple(tiles),
        None if in_order else torch.from_numpy(rows),
        None if unchanged else torch.from_numpy(restore),
    )


def _tiles_by_frame(layout: ClipLayout, query_frames: tuple[int, ...]) -> list[Tile]:
    """The spatial channel: every frame sees itself, causally or whole."""
    n, tiles = layout.frame_len, []
    for causal in (False, True):
        frames = [f for f in query_frames if layout.frames[f].causal == causal]
        # frames at equal distances are the groups of one tile
        steps = {b - a for a, b in pairwise(frames)}
        grouped = [frames] if frames and len(steps) <= 1 else [[f] for f in frames]
        for group in grouped:
            step = (group[1] - group[0]) * n if len(group) > 1 else 0
            strips = Strips(group[0] * n, n, len(group), step)
            tiles.append(Tile(strips, None if causal else strips, strips if causal else None))
    return tiles


def _tiles_by_window(mask: Mask, query_frames: tuple[int, ...]) -> tuple[list[Tile], np.ndarray]:
    """The temporal channel, and the slot of each row: window after window, and in each, frame after frame by order.

    Windows of equal size are adjacent, so that they form the groups of one tile.
    """
    layout = mask.layout
    frames = sorted(range(layout.num_frames), key=lambda f: (layout.frames[f].order, f))
    window = mask.window_index(np.arange(layout.frame_len))
    members = sorted((np.flatnonzero(window == w) for w in np.unique(window)), key=len)
    rows, tiles, start = [], [], 0
    for size in sorted({len(m) for m in members}):
        equal = [m for m in members if len(m) == size]
        rows += [m + f * layout.frame_len for m in equal for f in frames]
        groups, step = len(equal), size * layout.num_frames
        for first, end in _query_runs(layout, frames, query_frames):

            def strips(a: int, b: int, start: int = start, groups: int = groups, step: int = step) -> Strips:
                """Frames a to b (exclusive, in the order of `frames`) of every window of this size."""
                return Strips(start + a * size, (b - a) * size, groups, step)  # noqa: B023

            queries = strips(first, end)
            if layout.frames[frames[first]].causal:
                tiles.append(Tile(queries, strips(0, first) if first else None, queries))
            else:
                order = layout.frames[frames[first]].order
                num_visible = sum(f.order <= order for f in layout.frames)
                tiles.append(Tile(queries, strips(0, num_visible), None))
        start += groups * step
    return tiles, np.concatenate(rows)


def _query_runs(layout: ClipLayout, frames: list[int], query_frames: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges [first, end) of `frames` whose queries share a tile: consecutive causal frames, or non-causal
    ones of the same generation order."""
    runs: list[tuple[int, int]] = []
    for place, f in enumerate(frames):
        if f not in query_frames:
            continue
        if runs and runs[-1][1] == place:
            previous, current = layout.frames[frames[place - 1]], layout.frames[f]
            if (previous.causal and current.causal) or (previous.order == current.order):
                runs[-1] = (runs[-1][0], place + 1)
                continue
        runs.append((place, place + 1))
    return runs
