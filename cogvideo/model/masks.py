"""Attention masks: one predicate on coordinates gives every mask of every stage. No tensors here.

Source: CogVideo (2205.15868) sections 3.2 and 3.3. Masks differ between stages only in the frames' generation order and
causal flags, between channels only in scope, between layers only in the windows' shift.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cogvideo.sequence.layout import ClipLayout


@dataclass(frozen=True)
class Mask:
    """Which frame slots a frame slot attends to in one channel of one layer. Text is visible to all slots."""

    layout: ClipLayout
    scope: Literal["frame", "clip"]
    """`frame`: the spatial channel; `clip`: the temporal channel."""
    window_size: int | None = None
    shift: int = 0
    """Windows are cut at shift, shift + window_size, ... on each axis; they do not wrap around."""
    wrap_given: bool = False
    """As in published inference: given frames use windows that wrap around the frame's edge."""

    def allowed(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Whether slot `query` may see slot `key`; integer arrays that broadcast, bool result."""
        q, k = self.layout.locate(query), self.layout.locate(key)
        ok = (k.order < q.order) | ((k.order == q.order) & (~q.causal | (k.raster <= q.raster)))
        if self.scope == "frame":
            return ok & (q.frame == k.frame)
        if not self.window_size:
            return ok
        return ok & (self._window_index(query, query) == self._window_index(key, query))

    def intervals(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same mask as intervals: slot i sees slot j if first[i] <= place[j] <= last[i].

        Returns first, last and place, each in the shape of `slots`. With `wrap_given`, `slots` must all be of given
        frames or all of others: a key's place then depends on the query.
        """
        layout, at = self.layout, self.layout.locate(slots)
        group = at.frame if self.scope == "frame" else self.window_index(slots) + 1
        # within a group, places count up in the order of generation
        first = group * (max(frame.order for frame in layout.frames) + 1) * layout.frame_len
        whole_frames = first + at.order * layout.frame_len
        place = whole_frames + at.raster
        return first, np.where(at.causal, place, whole_frames + layout.frame_len - 1), place

    def window_index(self, slots: np.ndarray) -> np.ndarray:
        """Index of the window that holds each slot; all -1 if there are no windows."""
        return self._window_index(slots, slots) if self.window_size else np.full(slots.shape, -1)

    def _window_index(self, slots: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Window of each slot, under the windows that its query slot uses: cut at the frame's edge, or wrapped."""
        assert self.window_size
        at = self.layout.locate(slots)
        windows_per_side = self.layout.frame_side // self.window_size + 1

        def along(axis: np.ndarray) -> np.ndarray:
            return (axis - self.shift) // self.window_size + 1

        cut = along(at.row) * windows_per_side + along(at.column)
        if not (self.wrap_given and self.shift):
            return cut
        # rolled by the shift: what lies before the first window belongs to the last one
        side = self.layout.frame_side
        wrapped = along((at.row - self.shift) % side + self.shift) * windows_per_side
        wrapped = wrapped + along((at.column - self.shift) % side + self.shift)
        supervised = np.array([f.supervised for f in self.layout.frames])
        return np.where(supervised[self.layout.locate(queries).frame], cut, wrapped)


def channel_masks(
    layout: ClipLayout, window_size: int | None, *, wrap_given: bool = False
) -> tuple[Mask, tuple[Mask, ...]]:
    """The spatial mask, and the temporal masks of even and odd layers (a single mask if they are equal)."""
    spatial = Mask(layout, "frame")
    if window_size is None:
        return spatial, (Mask(layout, "clip"),)
    shifts = (0, window_size // 2)
    return spatial, tuple(Mask(layout, "clip", window_size, shift, wrap_given) for shift in shifts)


def render_mask(mask: Mask, slots: np.ndarray | None = None) -> str:
    """The mask as text, one line per query, one character per key: `#` visible, `.` hidden, blanks between frames."""
    slots = np.arange(mask.layout.num_slots) if slots is None else slots
    visible = mask.allowed(slots[:, None], slots[None, :])
    breaks = set(np.flatnonzero(np.diff(mask.layout.locate(slots).frame)) + 1)
    lines = []
    for i, row in enumerate(visible):
        if i in breaks:
            lines.append("")
        lines.append("".join((" " if j in breaks else "") + (".#"[int(v)]) for j, v in enumerate(row)))
    return "\n".join(lines)


def render_view(mask: Mask, slot: int) -> str:
    """What one slot attends to, as grids of the frames side by side: `@` the slot itself, `#` visible, `.` hidden."""
    layout = mask.layout
    slots = np.arange(layout.num_slots)
    letters = np.where(mask.allowed(np.array(slot), slots), "#", ".")
    letters[slot] = "@"
    grids = letters.reshape(layout.num_frames, layout.frame_side, layout.frame_side)
    return "\n".join("  ".join("".join(row) for row in rows) for rows in grids.transpose(1, 0, 2))
