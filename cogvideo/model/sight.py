"""What every slot of a clip sees in a cache, as tables by slot: a decoding step then needs no plan, just its slots.

`plan.py` groups many rows that see alike, for training and prefill. A step feeds a row or a few dozen, of any slots.
The kernels follow a table's runs of keys; PyTorch takes rows of it as a mask over the whole cache, so that all steps of
as many rows have the same shapes, and nothing is gathered.
"""

from copy import copy
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cogvideo.model.config import ModelConfig
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.plan import ChannelPlan, Plan


class Sight:
    """One channel of one kind of layer, in a cache that has slots at `places` (num_slots,): -1 is nowhere."""

    starts: Tensor
    """(num_slots + 1,) int64: slot s sees runs[starts[s]:starts[s + 1]] of its clip's frames."""
    runs: Tensor
    """(runs, 2) int64: the first place, and how many."""
    places: Tensor
    """(num_slots,) int64."""
    longest: int
    """Keys of the slot that sees most."""

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
        starts = np.cumsum([0, *np.concatenate(counts)])
        self.starts, self.runs = torch.from_numpy(starts), torch.from_numpy(np.concatenate(runs))
        self.places = torch.from_numpy(places.astype(np.int64))
        self.longest = int(np.add.reduceat(self.runs[:, 1].numpy(), starts[:-1]).max())

    @cached_property
    def seen(self) -> Tensor:
        """(num_slots, places) bool: the same as a mask, made when it is first asked for."""
        slots = torch.arange(len(self.places)).repeat_interleave(self.starts.diff())
        kept = self.runs[:, 0] >= 0
        slots, first, behind = slots[kept], self.runs[kept, 0], self.runs[kept].sum(1)
        edges = torch.zeros(len(self.places), int(self.places.max()) + 2, dtype=torch.int8)
        one = torch.ones((), dtype=torch.int8)
        edges.index_put_((slots, first), one, accumulate=True)
        edges.index_put_((slots, behind), -one, accumulate=True)
        return edges.cumsum(1, dtype=torch.int8)[:, :-1] > 0

    def to(self, device: torch.device) -> "Sight":
        """What PyTorch needs of it there; runs stay."""
        moved = copy(self)
        moved.places, moved.seen = self.places.to(device), self.seen.to(device)
        return moved

    def plan(self, slots: Tensor) -> ChannelPlan:
        return ChannelPlan((), None, places=self.places.index_select(0, slots), seen=self.seen.index_select(0, slots))


class Sights(NamedTuple):
    """All that steps of one program see."""

    spatial: Sight
    temporal: tuple[Sight, ...]
    """By layer, cyclically; empty: the channel is off."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        temporal: bool = True,
        given_windows: Literal["cut", "wrapped"] = "cut",
        spatial_places: np.ndarray | None = None,
    ) -> "Sights":
        """Arguments as of `plan.plan_forward`."""
        spatial, by_layer = channel_masks(config.layout, config.window_size, wrap_given=given_windows == "wrapped")
        every_slot = np.arange(config.layout.num_slots)
        by_layer = by_layer if temporal and config.has_temporal_channel else ()
        places = every_slot if spatial_places is None else spatial_places
        return cls(Sight(spatial, places), tuple(Sight(mask, every_slot) for mask in by_layer))

    def to(self, device: torch.device) -> "Sights":
        return Sights(self.spatial.to(device), tuple(sight.to(device) for sight in self.temporal))

    def plan(self, slots: Tensor) -> Plan:
        """A forward of these slots (rows,) with a cache: by operations on tensors alone, the same for any slots."""
        return Plan(slots, self.spatial.plan(slots), tuple(sight.plan(slots) for sight in self.temporal))
