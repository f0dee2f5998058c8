"""What single slots see, as runs of slots that follow each other: plans for decoding, cheap to make for any few slots.

`plan.py` groups many rows that see alike; a decoding step has few rows, and a window of a frame is a few dozen runs.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cogvideo.model.config import ModelConfig
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.plan import AttentionBlock, ChannelPlan, Plan, Rows


@dataclass(frozen=True)
class KeyRuns:
    """The frame keys of each row of a forward."""

    starts: Tensor
    """(rows + 1,) int64: row r sees runs[starts[r]:starts[r + 1]]."""
    runs: Tensor
    """(runs, 2) int64: the first place in the cache, and how many."""
    longest: int
    """Keys of the row that has most."""

    @cached_property
    def block(self) -> AttentionBlock:
        """The same as one group of all rows under a mask."""
        rows = len(self.starts) - 1
        seen = [
            np.concatenate([np.arange(first, first + count) for first, count in self.runs[a:b].tolist()])
            for a, b in zip(self.starts.tolist(), self.starts[1:].tolist(), strict=False)
        ]
        keys = np.unique(np.concatenate(seen))
        allowed = np.stack([np.isin(keys, own) for own in seen])
        mask = None if allowed.all() else torch.from_numpy(allowed)
        return AttentionBlock(Rows.of(np.arange(rows)[None]), Rows.of(keys[None]), mask)


class Sight:
    """What every slot of a clip sees in one channel of one kind of layer, in a cache that has slots at `places`."""

    def __init__(self, mask: Mask, places: np.ndarray) -> None:
        layout = mask.layout
        every_slot, counts, runs = np.arange(layout.num_slots), [], []
        for frame in range(layout.num_frames):
            allowed = mask.allowed(layout.slots_of(frame)[:, None], every_slot)
            edges = np.diff(allowed.astype(np.int8), axis=1, prepend=0, append=0)
            (row, first), (_, behind) = np.nonzero(edges == 1), np.nonzero(edges == -1)
            counts.append(np.bincount(row, minlength=layout.frame_len))
            together = places[behind - 1] - places[first] == behind - 1 - first
            assert (together | (places[first] < 0)).all(), "a run lies apart in the cache"
            runs.append(np.stack([places[first], behind - first], axis=1))
        self._runs, self._places = np.concatenate(runs), places
        self._starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])

    def of(self, slots: np.ndarray) -> ChannelPlan:
        own = [self._runs[self._starts[slot] : self._starts[slot + 1]] for slot in slots]
        starts = np.cumsum([0, *map(len, own)])
        longest = max(int(runs[:, 1].sum()) for runs in own)
        seen = KeyRuns(torch.from_numpy(starts), torch.from_numpy(np.concatenate(own)), longest)
        return ChannelPlan((), None, runs=seen, places=torch.from_numpy(self._places[slots]))


class SlotPlanner:
    """Plans forwards of a few slots, in any order, with a cache."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        temporal: bool = True,
        given_windows: Literal["cut", "wrapped"] = "cut",
        spatial_places: np.ndarray | None = None,
    ) -> None:
        """As `plan.plan_forward`."""
        spatial, by_layer = channel_masks(config.layout, config.window_size, wrap_given=given_windows == "wrapped")
        every_slot = np.arange(config.layout.num_slots)
        by_layer = by_layer if temporal and config.has_temporal_channel else ()
        self._spatial = Sight(spatial, every_slot if spatial_places is None else spatial_places)
        self._temporal = [Sight(mask, every_slot) for mask in by_layer]

    def plan(self, slots: np.ndarray) -> Plan:
        slots = slots.astype(np.int64)
        return Plan(
            torch.from_numpy(slots), self._spatial.of(slots), tuple(sight.of(slots) for sight in self._temporal)
        )
