"""What one forward attends to, as data: for given query slots, which keys each group of them reads, under what mask.

A plan is derived from the masks alone, once, and then drives training, prefill and decoding alike: the model only
gathers and attends. Groups of equal shape and equal mask are batched into one block, so that a frame, or a window,
never meets a score that it would throw away.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cogvideo.model.config import ModelConfig
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.tiles import TiledChannel, tile_channel

# A group of queries is cut by frame when it is this large: above it, keys of later frames that only the mask would
# drop cost more than the further call.
_ROWS_WORTH_SPLITTING = 512
# A whole clip's channel is tiled when a query meets this many frame keys: below, one masked softmax beats two merged.
_KEYS_WORTH_TILING = 256


@dataclass(frozen=True)
class Rows:
    """Indices (groups, length) into a row axis; a run of consecutive ones is taken as a view."""

    index: Tensor
    start: int | None
    """First row where `index` counts up without a gap, else None."""

    @classmethod
    def of(cls, index: np.ndarray) -> "Rows":
        flat = index.reshape(-1)
        consecutive = bool((np.diff(flat) == 1).all())
        return cls(torch.from_numpy(np.ascontiguousarray(index)), int(flat[0]) if consecutive else None)

    def take(self, x: Tensor) -> Tensor:
        """(batch, heads, rows, head_dim) -> (batch, heads, groups, length, head_dim)."""
        if self.start is not None:
            picked = x.narrow(2, self.start, self.index.numel())
        else:
            picked = x.index_select(2, self.index.flatten())
        return picked.unflatten(2, tuple(self.index.shape))

    def to(self, device: torch.device | str) -> "Rows":
        return Rows(self.index.to(device), self.start)


@dataclass(frozen=True)
class AttentionBlock:
    """Groups of queries with equally many keys and the same mask. Text keys come on top, for every group."""

    queries: Rows
    """(groups, num_queries) into the rows of this forward."""
    keys: Rows
    """(groups, num_keys) places in the cache, or rows of this forward; `ChannelPlan.places` says which."""
    allowed: Tensor | None
    """(num_queries, num_keys) bool, or None where all is seen."""

    def to(self, device: torch.device | str) -> "AttentionBlock":
        return AttentionBlock(
            self.queries.to(device), self.keys.to(device), None if self.allowed is None else self.allowed.to(device)
        )


@dataclass(frozen=True)
class ChannelPlan:
    """All blocks of one channel in one layer, and the order that puts their outputs back."""

    blocks: tuple[AttentionBlock, ...]
    restore: Tensor | None
    """(rows,) such that concatenated block outputs, indexed by it, stand in row order; None if they already do."""
    tiled: TiledChannel | None = None
    """The same without masks, for whole clips where that is faster."""
    places: Tensor | None = None
    """(rows,) where the cache keeps the rows' keys; keys are then places too. None: keys are rows of this forward."""
    seen: Tensor | None = None
    """(rows, places) bool, instead of blocks: what a few rows see of the cache, see sight.py."""

    def to(self, device: torch.device | str) -> "ChannelPlan":
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return ChannelPlan(
            tuple(b.to(device) for b in self.blocks),
            moved(self.restore),
            None if self.tiled is None else self.tiled.to(device),
            moved(self.places),
            moved(self.seen),
        )


@dataclass(frozen=True)
class LastLayer:
    """The last layer where not all of its outputs are read: every row is a key, some are queries."""

    answered: Tensor
    """(answered rows,) of this forward, ascending."""
    spatial: ChannelPlan
    temporal: ChannelPlan | None

    def to(self, device: torch.device | str) -> "LastLayer":
        temporal = None if self.temporal is None else self.temporal.to(device)
        return LastLayer(self.answered.to(device), self.spatial.to(device), temporal)


@dataclass(frozen=True)
class Plan:
    """One forward over `slots`."""

    slots: Tensor
    """(rows,) clip slots fed, in this order."""
    spatial: ChannelPlan
    temporal: tuple[ChannelPlan, ...]
    """By layer, cyclically (even and odd layers differ in their windows); empty: the channel is off."""
    last: LastLayer | None = None
    """None: the last layer is as the others, and the forward answers every row."""

    @property
    def needs_cache(self) -> bool:
        return any(channel.places is not None for channel in (self.spatial, *self.temporal))

    def temporal_of(self, layer: int) -> ChannelPlan | None:
        return self.temporal[layer % len(self.temporal)] if self.temporal else None

    def to(self, device: torch.device | str) -> "Plan":
        temporal = tuple(t.to(device) for t in self.temporal)
        last = None if self.last is None else self.last.to(device)
        return Plan(self.slots.to(device), self.spatial.to(device), temporal, last)


def plan_forward(
    config: ModelConfig,
    slots: np.ndarray | None = None,
    *,
    temporal: bool = True,
    given_windows: Literal["cut", "wrapped"] = "cut",
    spatial_places: np.ndarray | None = None,
) -> Plan:
    """The plan for feeding `slots`; default: the whole clip, as in training, without a cache.

    Keys are whatever the masks let the queries see: in decoding those slots must be in the cache or be fed along. The
    temporal channel's cache keeps every slot at its number, the spatial one's at `spatial_places` (num_slots,), or not
    at all where that is -1 (default: at its number).
    `temporal=False` leaves the trunk alone, which makes a text-to-image model of a frame.
    `given_windows="wrapped"` repeats the published stage-2 prefill (see docs/differences.md).
    """
    every_slot = np.arange(config.layout.num_slots)
    cached, whole = slots is not None, slots is None and given_windows == "cut"
    slots = every_slot if slots is None else np.asarray(slots)
    spatial_places = every_slot if spatial_places is None else spatial_places
    spatial, by_layer = channel_masks(config.layout, config.window_size, wrap_given=given_windows == "wrapped")
    use_temporal = temporal and config.has_temporal_channel

    def plan(mask: Mask, places: np.ndarray) -> ChannelPlan:
        return plan_clip(mask) if whole else plan_channel(mask, slots, places=places if cached else None)

    return Plan(
        torch.from_numpy(slots.astype(np.int64)),
        plan(spatial, spatial_places),
        tuple(plan(mask, every_slot) for mask in by_layer) if use_temporal else (),
    )


def plan_training(config: ModelConfig) -> Plan:
    """The plan for a whole clip of which only supervised frames are answered."""
    plan, layout = plan_forward(config), config.layout
    if not layout.given_frames:
        return plan
    spatial, by_layer = channel_masks(layout, config.window_size)
    answered = layout.supervised_frames
    temporal = plan_clip(by_layer[(config.num_layers - 1) % len(by_layer)], answered) if plan.temporal else None
    rows = torch.from_numpy(layout.slots_of(*answered))
    return replace(plan, last=LastLayer(rows, plan_clip(spatial, answered), temporal))


def plan_clip(mask: Mask, answered: tuple[int, ...] | None = None) -> ChannelPlan:
    """A channel for a whole clip, asked for the frames `answered` (default: all)."""
    layout = mask.layout
    slots = np.arange(layout.num_slots)
    by_blocks = plan_channel(mask, slots, None if answered is None else layout.slots_of(*answered))
    largest = max(block.keys.index.shape[1] for block in by_blocks.blocks)
    return replace(by_blocks, tiled=tile_channel(mask, answered)) if largest >= _KEYS_WORTH_TILING else by_blocks


def plan_channel(
    mask: Mask, slots: np.ndarray, answered: np.ndarray | None = None, places: np.ndarray | None = None
) -> ChannelPlan:
    """Group query rows by what they can share, find each group's keys, and batch equal groups.

    Rows are those of `slots`, queries are the rows `answered` (ascending; default: all). `places` (num_slots,) is where
    the cache keeps each slot; None, or -1 for all of `slots`: nowhere.
    """
    if places is None or (places[slots] < 0).all():
        own_places, key_of = None, np.full(mask.layout.num_slots, -1)
        key_of[slots] = np.arange(len(slots))
    else:
        own_places, key_of = torch.from_numpy(places[slots].astype(np.int64)), places
    answered = np.arange(len(slots)) if answered is None else answered
    at = mask.layout.locate(slots)
    group_of = at.frame if mask.scope == "frame" else mask.cell(slots)
    if mask.scope == "clip" and np.unique(group_of[answered], return_counts=True)[1].max() > _ROWS_WORTH_SPLITTING:
        # frames of one rank see the same keys: they stay together
        group_of = group_of * (mask.layout.num_frames + 1) + at.rank
    every_slot = np.arange(mask.layout.num_slots)

    alike: dict[tuple[int, int, bytes], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = defaultdict(list)
    for group in np.unique(group_of[answered]):
        rows = answered[group_of[answered] == group]
        allowed = mask.allowed(slots[rows, None], every_slot[None, :])
        keys = np.flatnonzero(allowed.any(0))
        allowed = allowed[:, keys]
        alike[(len(rows), len(keys), allowed.tobytes())].append((rows, keys, allowed))

    blocks, order = [], []
    for members in alike.values():
        rows, keys = np.stack([m[0] for m in members]), key_of[np.stack([m[1] for m in members])]
        assert (keys >= 0).all(), "what a row sees is neither fed along nor kept in the cache"
        allowed = members[0][2]
        blocks.append(
            AttentionBlock(Rows.of(rows), Rows.of(keys), None if allowed.all() else torch.from_numpy(allowed))
        )
        order.append(rows.reshape(-1))
    restore = np.argsort(np.concatenate(order), kind="stable")  # of answered rows, which ascend
    in_order = bool((restore == np.arange(len(restore))).all())
    return ChannelPlan(tuple(blocks), None if in_order else torch.from_numpy(restore), places=own_places)
