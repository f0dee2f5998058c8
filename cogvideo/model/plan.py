"""What one forward pass attends to, as data: derived from the masks alone, with no arithmetic of the model.

A channel of a layer has one of four types of plan:

    BlockPlan   groups of query rows that share keys and mask, batched: any rows, with or without a cache
    TilePlan    a whole clip cut into full and causal tiles, without masks or gathers (tiles.py)
    JoinedPlan  text and frames as one sequence, for one call of FlexAttention per channel (joined.py)
    TablePlan   a few rows of any slots, each with a boolean mask over the cache, looked up by slot: decoding

`Plan` holds the plans of all channels and layers of a forward pass; `DecodeMasks` makes one for any slots with tensor
operations alone, so that every decoding step has the same shapes.
"""

from collections import defaultdict
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cogvideo.model.config import ModelConfig
from cogvideo.model.joined import JoinedMask, JoinedPlan, KeyBlocks, list_key_blocks, plan_joined
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.tiles import TilePlan, plan_tiles

GivenWindows = Literal["cut", "wrapped"]
"""How windows of given frames treat the frame's edge; `wrapped` reproduces the published stage-2 prefill."""
PlanType = Literal["blocks", "tiles", "joined"]
"""How passes over many rows are planned. `tiles`: large channels of whole clips are tiled, the others are blocks."""
# Groups with more query rows are split by frame: masked scores of later frames would cost more than another call.
_SPLIT_ABOVE_ROWS = 512
# Channels whose queries see fewer frame keys are not tiled: one masked softmax is faster than merging two.
_TILE_FROM_KEYS = 256


@dataclass(frozen=True)
class Rows:
    """Indices (groups, length) into a row axis; consecutive ones are taken as a view."""

    index: Tensor
    start: int | None
    """The first row if `index` counts up without a gap, else None."""

    @classmethod
    def from_index(cls, index: np.ndarray) -> "Rows":
        flat = index.reshape(-1)
        consecutive = bool((np.diff(flat) == 1).all())
        return cls(torch.from_numpy(np.ascontiguousarray(index)), int(flat[0]) if consecutive else None)

    def take(self, x: Tensor) -> Tensor:
        """(batch, heads, rows, head_dim) -> (batch, heads, groups, length, head_dim)."""
        if self.start is not None:
            taken = x.narrow(2, self.start, self.index.numel())
        else:
            taken = x.index_select(2, self.index.flatten())
        return taken.unflatten(2, tuple(self.index.shape))

    def to(self, device: torch.device | str) -> "Rows":
        return Rows(self.index.to(device), self.start)


@dataclass(frozen=True)
class AttentionBlock:
    """Groups of queries with equally many keys and the same mask. Every group sees the text keys as well."""

    queries: Rows
    """(groups, num_queries) rows of this forward pass."""
    keys: Rows
    """(groups, num_keys) cache positions, or rows of this forward pass; `BlockPlan.cache_positions` says which."""
    allowed: Tensor | None
    """(num_queries, num_keys) bool, or None where everything is visible."""

    def to(self, device: torch.device | str) -> "AttentionBlock":
        return AttentionBlock(self.queries.to(device), self.keys.to(device), _to(self.allowed, device))


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of one channel in one layer."""

    blocks: tuple[AttentionBlock, ...]
    restore: Tensor | None
    """(query rows,) index that puts the concatenated outputs of all blocks in row order; None if they are in order."""
    cache_positions: Tensor | None = None
    """(rows,) where the cache stores the rows' keys; the blocks' keys are then cache positions. None: keys are rows."""

    def to(self, device: torch.device | str) -> "BlockPlan":
        blocks = tuple(block.to(device) for block in self.blocks)
        return BlockPlan(blocks, _to(self.restore, device), _to(self.cache_positions, device))


@dataclass(frozen=True)
class TablePlan:
    """One channel of a decoding step: the keys that each row sees, as a mask over the cache's frame positions."""

    cache_positions: Tensor
    """(rows,) where the cache stores the rows' keys."""
    visible: Tensor
    """(rows, positions) bool; the cache may have fewer positions (a clip that ends early) or more."""
    keys: KeyBlocks | None = None
    """The blocks to read from a cache of a given size; None: read all of it."""

    def with_key_blocks(self, text_len: int, num_keys: int) -> "TablePlan":
        """The same plan with the blocks to read from a cache of `num_keys` keys, text included."""
        return replace(self, keys=list_key_blocks(self.visible, text_len, num_keys))

    def to(self, device: torch.device | str) -> "TablePlan":
        return TablePlan(self.cache_positions.to(device), self.visible.to(device))


ChannelPlan = BlockPlan | TilePlan | JoinedPlan | TablePlan
LayerPlan = BlockPlan | TilePlan | JoinedMask | TablePlan
"""A channel's plan once the number of text rows is known."""


def with_text(plan: ChannelPlan, text_len: int) -> LayerPlan:
    return plan.with_text(text_len) if isinstance(plan, JoinedPlan) else plan


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a forward pass that needs only some outputs: every row is a key, only some are queries."""

    query_rows: Tensor
    """(query rows,) of this forward pass, ascending."""
    spatial: ChannelPlan
    temporal: ChannelPlan | None

    def to(self, device: torch.device | str) -> "LastLayer":
        temporal = None if self.temporal is None else self.temporal.to(device)
        return LastLayer(self.query_rows.to(device), self.spatial.to(device), temporal)


@dataclass(frozen=True)
class Plan:
    """One forward pass over `slots`."""

    slots: Tensor
    """(rows,) slots of the clip, in the order of the input rows."""
    spatial: ChannelPlan
    temporal: tuple[ChannelPlan, ...]
    """By layer, cyclically (windows differ between even and odd layers); empty: the channel is off."""
    last: LastLayer | None = None
    """None: the last layer is like the others and every row has an output."""

    @property
    def needs_cache(self) -> bool:
        """Whether keys are stored in a cache."""
        channels = (self.spatial, *self.temporal)
        return any(not isinstance(c, TilePlan) and c.cache_positions is not None for c in channels)

    def with_key_blocks(self, text_len: int, spatial_keys: int, temporal_keys: int) -> "Plan":
        """For a decoding step: list the blocks to read from caches of these numbers of keys, text included."""

        def listed(plan: ChannelPlan, num_keys: int) -> ChannelPlan:
            return plan.with_key_blocks(text_len, num_keys) if isinstance(plan, TablePlan) else plan

        temporal = tuple(listed(plan, temporal_keys) for plan in self.temporal)
        return replace(self, spatial=listed(self.spatial, spatial_keys), temporal=temporal)

    def temporal_at(self, layer: int) -> ChannelPlan | None:
        return self.temporal[layer % len(self.temporal)] if self.temporal else None

    def to(self, device: torch.device | str) -> "Plan":
        temporal = tuple(channel.to(device) for channel in self.temporal)
        last = None if self.last is None else self.last.to(device)
        return Plan(self.slots.to(device), self.spatial.to(device), temporal, last)


class CachePositions(NamedTuple):
    """Where a cache stores each slot; arrays (num_slots,) int64, -1: not stored."""

    spatial: np.ndarray
    temporal: tuple[np.ndarray, ...]
    """By layer, cyclically."""


def window_positions(mask: Mask, slots: np.ndarray) -> np.ndarray:
    """Where to store `slots`, so that those of a window are adjacent, in generation order: (num_slots,), others -1."""
    windows = replace(mask, wrap_given=False).window_index(slots)
    order = np.lexsort((slots, mask.layout.locate(slots).order, windows))
    positions = np.full(mask.layout.num_slots, -1)
    positions[slots[order]] = np.arange(len(slots))
    return positions


def plan_forward(
    config: ModelConfig,
    slots: np.ndarray | None = None,
    *,
    temporal: bool = True,
    given_windows: GivenWindows = "cut",
    positions: CachePositions | None = None,
    joined: bool = False,
) -> Plan:
    """Plan a forward pass over `slots` that stores keys in a cache, or, if None, over the whole clip without a cache.

    The keys are all slots that the masks let the queries see: in decoding these must be in the cache or among `slots`;
    with `joined`, which plans text and frames as one sequence, they must be among `slots`.
    `positions` (default: every slot at its own number) is where the cache stores slots. `temporal=False` turns the
    channel off, which leaves a text-to-image model of one frame. For `given_windows` see docs/differences.md.
    """
    every_slot = np.arange(config.layout.num_slots)
    cached = slots is not None
    slots = every_slot if slots is None else np.asarray(slots)
    spatial, by_layer = channel_masks(config.layout, config.window_size, wrap_given=given_windows == "wrapped")
    use_temporal = temporal and config.has_temporal_channel

    def plan(mask: Mask, stored_at: np.ndarray) -> ChannelPlan:
        plan_channel = plan_joined if joined else plan_blocks
        return plan_channel(mask, slots, positions=stored_at if cached else None)

    at = positions or CachePositions(every_slot, (every_slot,) * len(by_layer))
    return Plan(
        torch.from_numpy(slots.astype(np.int64)),
        plan(spatial, at.spatial),
        tuple(map(plan, by_layer, at.temporal)) if use_temporal else (),
    )


def plan_clip(config: ModelConfig, *, supervised_only: bool = False, plan_type: PlanType = "blocks") -> Plan:
    """Plan a forward pass over a whole clip without a cache, as in training and scoring.

    `supervised_only`: the last layer computes rows of supervised frames only. `plan_type`: one that the attention
    implementation supports.
    """
    layout = config.layout
    spatial, by_layer = channel_masks(layout, config.window_size)
    by_layer = by_layer if config.has_temporal_channel else ()

    def plan(mask: Mask, frames: tuple[int, ...] | None = None) -> ChannelPlan:
        every_slot, query_rows = np.arange(layout.num_slots), None if frames is None else layout.slots_of(*frames)
        if plan_type == "joined":
            return plan_joined(mask, every_slot, query_rows)
        blocks = plan_blocks(mask, every_slot, query_rows)
        most_keys = max(block.keys.index.shape[1] for block in blocks.blocks)
        tiles = plan_tiles(mask, frames) if plan_type == "tiles" and most_keys >= _TILE_FROM_KEYS else None
        return tiles or blocks

    last = None
    if supervised_only and layout.given_frames:
        frames = layout.supervised_frames
        of_last_layer = by_layer[(config.num_layers - 1) % len(by_layer)] if by_layer else None
        last = LastLayer(
            torch.from_numpy(layout.slots_of(*frames)),
            plan(spatial, frames),
            None if of_last_layer is None else plan(of_last_layer, frames),
        )
    return Plan(torch.arange(layout.num_slots), plan(spatial), tuple(map(plan, by_layer)), last)


def plan_blocks(
    mask: Mask, slots: np.ndarray, query_rows: np.ndarray | None = None, positions: np.ndarray | None = None
) -> BlockPlan:
    """Group query rows that can share keys, find each group's keys, and batch equal groups.

    Row i is `slots[i]`; queries are the rows `query_rows` (ascending; default: all). `positions` (num_slots,) is where
    the cache stores each slot; None, or -1 for all of `slots`: keys are rows of this forward pass.
    """
    # key_index maps a slot to where its key is found: a cache position, or a row of this pass (-1: nowhere)
    if positions is None or (positions[slots] < 0).all():
        cache_positions, key_index = None, np.full(mask.layout.num_slots, -1)
        key_index[slots] = np.arange(len(slots))
    else:
        cache_positions, key_index = torch.from_numpy(positions[slots].astype(np.int64)), positions
    query_rows = np.arange(len(slots)) if query_rows is None else query_rows

    # queries share keys within a frame (spatial) or within a window (temporal)
    at = mask.layout.locate(slots)
    group_of = at.frame if mask.scope == "frame" else mask.window_index(slots)
    if mask.scope == "clip" and np.unique(group_of[query_rows], return_counts=True)[1].max() > _SPLIT_ABOVE_ROWS:
        # large windows are split by generation order: frames of equal order see the same keys and stay together
        group_of = group_of * (mask.layout.num_frames + 1) + at.order

    # groups with the same numbers of queries and keys and the same mask become one block
    every_slot = np.arange(mask.layout.num_slots)
    equal_groups: dict[tuple[int, int, bytes], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = defaultdict(list)
    for group in np.unique(group_of[query_rows]):
        rows = query_rows[group_of[query_rows] == group]
        allowed = mask.allowed(slots[rows, None], every_slot[None, :])
        keys = np.flatnonzero(allowed.any(0))
        allowed = allowed[:, keys]
        equal_groups[(len(rows), len(keys), allowed.tobytes())].append((rows, keys, allowed))

    blocks, order = [], []
    for members in equal_groups.values():
        rows, keys = np.stack([m[0] for m in members]), key_index[np.stack([m[1] for m in members])]
        assert (keys >= 0).all(), "a row sees a slot that is neither an input of this pass nor in the cache"
        allowed = members[0][2]
        mask_or_none = None if allowed.all() else torch.from_numpy(allowed)
        blocks.append(AttentionBlock(Rows.from_index(rows), Rows.from_index(keys), mask_or_none))
        order.append(rows.reshape(-1))

    # the inverse of the order in which the blocks output their query rows
    restore = np.argsort(np.concatenate(order), kind="stable")
    in_order = bool((restore == np.arange(len(restore))).all())
    return BlockPlan(tuple(blocks), None if in_order else torch.from_numpy(restore), cache_positions)


class VisibleKeys:
    """The frame keys that every slot of a clip sees in one channel, for a cache that stores slot s at positions[s].

    Kernels read the runs of keys; PyTorch uses rows of `visible` as a mask over the whole cache.
    """

    starts: Tensor
    """(num_slots + 1,) int64: slot s sees runs[starts[s]:starts[s + 1]]."""
    runs: Tensor
    """(runs, 2) int64: first cache position, and number of keys."""
    positions: Tensor
    """(num_slots,) int64 cache positions; -1: not stored."""
    max_keys: int
    """The maximum number of keys that a slot sees."""

    def __init__(self, mask: Mask, positions: np.ndarray) -> None:
        layout = mask.layout
        every_slot, counts, runs = np.arange(layout.num_slots), [], []
        # a run of keys ends where the next slot is stored elsewhere
        follows = np.diff(positions, prepend=-2) == np.where(positions < 0, 0, 1)
        for frame in range(layout.num_frames):
            allowed = mask.allowed(layout.slots_of(frame)[:, None], every_slot)
            before = np.pad(allowed, ((0, 0), (1, 0)))[:, :-1] & follows
            after = np.pad(allowed & follows, ((0, 0), (0, 1)))[:, 1:]
            (row, first), (_, last) = np.nonzero(allowed & ~before), np.nonzero(allowed & ~after)
            counts.append(np.bincount(row, minlength=layout.frame_len))
            runs.append(np.stack([positions[first], last + 1 - first], axis=1))
        starts = np.cumsum([0, *np.concatenate(counts)])
        self.starts, self.runs = torch.from_numpy(starts), torch.from_numpy(np.concatenate(runs))
        self.positions = torch.from_numpy(positions.astype(np.int64))
        self.max_keys = int(np.add.reduceat(self.runs[:, 1].numpy(), starts[:-1]).max())

    @cached_property
    def visible(self) -> Tensor:
        """(num_slots, positions) bool: the runs as a mask."""
        slots = torch.arange(len(self.positions)).repeat_interleave(self.starts.diff())
        stored = self.runs[:, 0] >= 0
        slots, first, end = slots[stored], self.runs[stored, 0], self.runs[stored].sum(1)
        # +1 where a run begins and -1 where it ends: the running sum is 1 inside
        edges = torch.zeros(len(self.positions), int(self.positions.max()) + 2, dtype=torch.int8)
        one = torch.ones((), dtype=torch.int8)
        edges.index_put_((slots, first), one, accumulate=True)
        edges.index_put_((slots, end), -one, accumulate=True)
        return edges.cumsum(1, dtype=torch.int8)[:, :-1] > 0

    def to(self, device: torch.device) -> "VisibleKeys":
        """Move what PyTorch reads; the runs stay on the CPU."""
        moved = copy(self)
        moved.positions, moved.visible = self.positions.to(device), self.visible.to(device)
        return moved

    def plan(self, slots: Tensor) -> TablePlan:
        return TablePlan(self.positions.index_select(0, slots), self.visible.index_select(0, slots))


class DecodeMasks(NamedTuple):
    """The visible keys of all channels and layers, for decoding any slots."""

    spatial: VisibleKeys
    temporal: tuple[VisibleKeys, ...]
    """By layer, cyclically; empty: the channel is off."""

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        temporal: bool = True,
        given_windows: GivenWindows = "cut",
        positions: CachePositions | None = None,
    ) -> "DecodeMasks":
        """Arguments as in `plan_forward`."""
        spatial, by_layer = channel_masks(config.layout, config.window_size, wrap_given=given_windows == "wrapped")
        every_slot = np.arange(config.layout.num_slots)
        by_layer = by_layer if temporal and config.has_temporal_channel else ()
        at = positions or CachePositions(every_slot, (every_slot,) * len(by_layer))
        return cls(VisibleKeys(spatial, at.spatial), tuple(map(VisibleKeys, by_layer, at.temporal)))

    def to(self, device: torch.device) -> "DecodeMasks":
        return DecodeMasks(self.spatial.to(device), tuple(keys.to(device) for keys in self.temporal))

    def plan(self, slots: Tensor) -> Plan:
        """Plan a forward pass over these slots (rows,) with a cache: the same tensor operations for any slots."""
        return Plan(slots, self.spatial.plan(slots), tuple(keys.plan(slots) for keys in self.temporal))


def _to(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
