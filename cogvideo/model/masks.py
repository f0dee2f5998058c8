"""Who sees whom: one predicate on coordinates gives every mask of every stage. No tensors of the model here.

Source: CogVideo (2205.15868) sections 3.2 and 3.3. The masks differ between stages only by the frames' ranks and
causal flags, between channels only by scope, between layers only by the windows' shift.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cogvideo.sequence.layout import ClipLayout


@dataclass(frozen=True)
class Mask:
    """What a channel of a layer lets a frame slot see among frame slots. Text is visible to all and handled apart."""

    layout: ClipLayout
    scope: Literal["frame", "clip"]
    """`frame`: the spatial channel; `clip`: the temporal channel."""
    window_size: int | None = None
    shift: int = 0
    """Windows are cut at shift, shift + window_size, ... on each axis; nothing wraps around."""
    wrap_given: bool = False
    """Published inference only: rows of given frames use windows that wrap around the frame's edge."""

    def allowed(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Whether slot `query` may see slot `key`; integer arrays that broadcast, bool result."""
        q, k = self.layout.locate(query), self.layout.locate(key)
        ok = (k.rank < q.rank) | ((k.rank == q.rank) & (~q.causal | (k.raster <= q.raster)))
        if self.scope == "frame":
            return ok & (q.frame == k.frame)
        return ok & (self._cell(query, query) == self._cell(key, query)) if self.window_size else ok

    def cell(self, slots: np.ndarray) -> np.ndarray:
        """Number of the window that holds each slot, -1 throughout without windows."""
        return self._cell(slots, slots) if self.window_size else np.full(slots.shape, -1)

    def _cell(self, slots: np.ndarray, viewers: np.ndarray) -> np.ndarray:
        """Window of each slot, as counted by the slot that looks."""
        assert self.window_size
        at = self.layout.locate(slots)
        cells_a_side = self.layout.frame_side // self.window_size + 1

        def number(along: np.ndarray) -> np.ndarray:
            return (along - self.shift) // self.window_size + 1

        cut = number(at.row) * cells_a_side + number(at.column)
        if not (self.wrap_given and self.shift):
            return cut
        side = self.layout.frame_side
        wrapped = number((at.row - self.shift) % side + self.shift) * cells_a_side
        wrapped = wrapped + number((at.column - self.shift) % side + self.shift)
        supervised = np.array([f.supervised for f in self.layout.frames])
        return np.where(supervised[self.layout.locate(viewers).frame], cut, wrapped)


def channel_masks(
    layout: ClipLayout, window_size: int | None, *, wrap_given: bool = False
) -> tuple[Mask, tuple[Mask, ...]]:
    """The spatial mask, and the temporal masks of even and odd layers (one mask if they are the same)."""
    spatial = Mask(layout, "frame")
    if window_size is None:
        return spatial, (Mask(layout, "clip"),)
    shifts = (0, window_size // 2)
    return spatial, tuple(Mask(layout, "clip", window_size, shift, wrap_given) for shift in shifts)


def picture(mask: Mask, slots: np.ndarray | None = None) -> str:
    """The mask as text, one character a (query, key) pair: `#` seen, `.` not. Frames are divided by blanks."""
    slots = np.arange(mask.layout.num_slots) if slots is None else slots
    seen = mask.allowed(slots[:, None], slots[None, :])
    breaks = set(np.flatnonzero(np.diff(mask.layout.locate(slots).frame)) + 1)
    lines = []
    for i, row in enumerate(seen):
        if i in breaks:
            lines.append("")
        lines.append("".join((" " if j in breaks else "") + (".#"[int(v)]) for j, v in enumerate(row)))
    return "\n".join(lines)


def view_from(mask: Mask, slot: int) -> str:
    """What one slot sees, frame beside frame: `@` the slot itself, `#` seen, `.` not."""
    layout = mask.layout
    slots = np.arange(layout.num_slots)
    letters = np.where(mask.allowed(np.array(slot), slots), "#", ".")
    letters[slot] = "@"
    grids = letters.reshape(layout.num_frames, layout.frame_side, layout.frame_side)
    return "\n".join("  ".join("".join(row) for row in rows) for rows in grids.transpose(1, 0, 2))
