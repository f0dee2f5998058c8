"""Plans: for any input slots, each allowed pair of slots is attended to once, and no other pair is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.model import plan as plan_module
from cogvideo.model.config import ModelTask
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.plan import (
    BlockPlan,
    CachePositions,
    DecodeMasks,
    Plan,
    Rows,
    TablePlan,
    VisibleKeys,
    plan_blocks,
    plan_clip,
    plan_forward,
    window_positions,
)
from cogvideo.model.tiles import TilePlan
from cogvideo.sequence.layout import ClipLayout, FrameSpec
from tests.helpers.models import tiny_config


def pairs(plan: object, num_rows: int, num_slots: int) -> np.ndarray:
    """(rows, slots): how often a block plan attends to each pair."""
    assert isinstance(plan, BlockPlan)
    count = np.zeros((num_rows, num_slots), int)
    for block in plan.blocks:
        for queries, keys in zip(block.queries.index.tolist(), block.keys.index.tolist(), strict=True):
            allowed = np.ones((len(queries), len(keys)), int) if block.allowed is None else block.allowed.int().numpy()
            np.add.at(count, np.ix_(queries, keys), allowed)
    return count


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    side = draw(st.integers(1, 6))
    frames = draw(
        st.lists(st.builds(FrameSpec, st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=4)
    )
    layout = ClipLayout(1, side, tuple(frames))
    if draw(st.booleans()):
        return Mask(layout, "frame")
    window = draw(st.sampled_from([None, *(w for w in range(1, side + 1) if side % w == 0)]))
    shift = draw(st.sampled_from([0, window // 2])) if window else 0
    return Mask(layout, "clip", window, shift, wrap_given=draw(st.booleans()))


@given(masks(), st.data())
def test_blocks_cover_the_mask(mask: Mask, data: st.DataObject) -> None:
    slots = np.array(
        data.draw(st.lists(st.integers(0, mask.layout.num_slots - 1), min_size=1, max_size=40, unique=True)), dtype=int
    )
    large = data.draw(st.sampled_from([1, 8, 512]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_SPLIT_ABOVE_ROWS", large)
        query_rows = np.array(sorted(data.draw(st.sets(st.integers(0, len(slots) - 1), min_size=1))))
        plan = plan_blocks(mask, slots, query_rows, positions=np.arange(mask.layout.num_slots))
    wanted = mask.allowed(slots[:, None], np.arange(mask.layout.num_slots)[None, :])
    wanted &= np.isin(np.arange(len(slots)), query_rows)[:, None]
    assert np.array_equal(pairs(plan, len(slots), mask.layout.num_slots), wanted.astype(int))

    order = torch.cat([block.queries.index.flatten() for block in plan.blocks])
    assert torch.equal(order if plan.restore is None else order[plan.restore], torch.from_numpy(query_rows))


@pytest.mark.parametrize("task", ["sequential", "interpolation"])
@pytest.mark.parametrize("window", [None, 10])
def test_published_size_wastes_little(task: str, window: int | None) -> None:
    """Scores computed stay within a few times those used: no dense 2000 x 2000 matrix."""
    config = tiny_config(task, frame_side=20, num_positions=512, window_size=window)  # type: ignore[arg-type]
    plan = plan_forward(config)
    for channel in (plan.spatial, *plan.temporal):
        assert isinstance(channel, BlockPlan)
        computed = sum(b.queries.index.numel() * b.keys.index.shape[1] for b in channel.blocks)
        used = int(pairs(channel, 2000, 2000).sum())
        assert computed <= 2.2 * used


def test_rows_take_consecutive_ones_as_a_view() -> None:
    x = torch.randn(2, 3, 8, 4)
    view, copy = Rows.from_index(np.array([[2, 3], [4, 5]])), Rows.from_index(np.array([[2, 3], [5, 4]]))
    assert view.start == 2
    assert copy.start is None
    assert view.take(x).data_ptr() == x[:, :, 2].data_ptr()
    assert torch.equal(view.take(x), x[:, :, [[2, 3], [4, 5]]])
    assert torch.equal(copy.take(x), x[:, :, [[2, 3], [5, 4]]])


def test_temporal_plans_alternate_by_layer() -> None:
    plan = plan_forward(tiny_config(window_size=2))
    assert plan.temporal_at(0) is plan.temporal_at(2) is not plan.temporal_at(1)
    assert plan_forward(tiny_config(window_size=2), temporal=False).temporal_at(0) is None
    assert plan_forward(tiny_config("image")).temporal_at(0) is None


def test_the_last_layer_computes_supervised_frames_only() -> None:
    config = tiny_config("interpolation", window_size=2)
    last = plan_clip(config, supervised_only=True).last
    assert last is not None
    assert last.query_rows.tolist() == [*range(16, 32), *range(48, 64)]
    assert last.temporal is not None
    shifted = channel_masks(config.layout, 2)[1][(config.num_layers - 1) % 2]
    wanted = shifted.allowed(np.arange(80)[:, None], np.arange(80)[None])
    assert np.array_equal(pairs(last.temporal, 80, 80)[last.query_rows], wanted[last.query_rows].astype(int))
    assert plan_clip(config).last is None
    assert plan_clip(tiny_config("image"), supervised_only=True).last is None


def test_keys_that_are_not_cached_must_be_in_the_same_pass() -> None:
    config = tiny_config("interpolation", window_size=2)
    assert not plan_forward(config).needs_cache
    assert plan_forward(config, np.arange(16)).needs_cache

    whole, nowhere = config.layout.slots_of(0, 2, 4), np.full(80, -1)
    plan = plan_forward(config, whole, positions=CachePositions(nowhere, (np.arange(80),) * 2))
    assert isinstance(plan.spatial, BlockPlan) and isinstance(plan.temporal[0], BlockPlan)
    assert plan.spatial.cache_positions is None and plan.temporal[0].cache_positions is not None
    rows = {tuple(keys.tolist()) for block in plan.spatial.blocks for keys in block.keys.index}
    assert rows == {tuple(range(start, start + 16)) for start in (0, 16, 32)}
    with pytest.raises(AssertionError, match="nor in the cache"):
        plan_forward(config, whole[8:], positions=CachePositions(nowhere, (np.arange(80),) * 2))


def kinds(plan: Plan) -> set[type]:
    last = [plan.last.spatial, plan.last.temporal] if plan.last else []
    return {type(channel) for channel in (plan.spatial, *plan.temporal, *last)}


def test_whole_clips_are_tiled_only_on_request_and_where_queries_see_many_keys() -> None:
    large = tiny_config("interpolation", frame_side=16, num_positions=512)
    assert kinds(plan_clip(large, supervised_only=True, plan_type="tiles")) == {TilePlan}
    assert kinds(plan_clip(large, supervised_only=True)) == {BlockPlan}
    assert kinds(plan_clip(tiny_config("interpolation"), supervised_only=True, plan_type="tiles")) == {BlockPlan}
    # the spatial channel sees 16 keys here, the temporal one 80
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_TILE_FROM_KEYS", 80)
        mixed = plan_clip(tiny_config("sequential"), plan_type="tiles")
        assert isinstance(mixed.spatial, BlockPlan) and isinstance(mixed.temporal[0], TilePlan)


@given(masks())
def test_decode_masks_are_the_masks_at_the_cache_positions(mask: Mask) -> None:
    layout = mask.layout
    slots = np.arange(layout.num_slots)
    # frames stored in reverse order, which keeps each frame's keys together
    positions = slots % layout.frame_len + (layout.num_frames - 1 - slots // layout.frame_len) * layout.frame_len
    if mask.scope == "clip":
        positions = window_positions(mask, slots)
    keys = VisibleKeys(mask, positions)
    expected = np.zeros((layout.num_slots, layout.num_slots), bool)
    expected[:, positions] = mask.allowed(slots[:, None], slots[None])
    assert np.array_equal(keys.visible.numpy(), expected)
    assert keys.max_keys == expected.sum(1).max()


def test_a_window_is_stored_together_in_the_order_of_generation() -> None:
    config = tiny_config("interpolation", window_size=2)
    _, masks = channel_masks(config.layout, 2)
    slots = np.arange(80)
    for mask in masks:
        positions = window_positions(mask, slots)
        assert sorted(positions) == slots.tolist()
        windows = mask.window_index(slots)[np.argsort(positions)]
        assert (np.diff(windows) >= 0).all()
    # the first window's slots 0, 1, 4 and 5 of frames 0, 2 and 4, which are given, then of 1 and 3
    first = np.argsort(window_positions(masks[0], slots))[:20].reshape(5, 4)
    assert np.array_equal(first, np.array([0, 2, 4, 1, 3])[:, None] * 16 + [0, 1, 4, 5])
    sequential = channel_masks(tiny_config().layout, None)[1][0]
    assert window_positions(sequential, slots).tolist() == slots.tolist()
    some = window_positions(masks[0], config.layout.slots_of(0, 2))
    assert sorted(some) == [-1] * 48 + list(range(32))


def test_decoding_reads_the_blocks_of_a_cache_that_are_filled_and_in_the_window() -> None:
    """Blocks of 128 keys of the spatial and temporal channels, at the published sizes with a text of 64."""

    def num_blocks(task: ModelTask, slot: int) -> list[tuple[int, int]]:
        config = tiny_config(
            task, frame_side=20, num_positions=512, window_size=10 if task == "interpolation" else None
        )
        _, masks = channel_masks(config.layout, config.window_size)
        every = np.arange(2000)
        positions = CachePositions(every, tuple(window_positions(mask, every) for mask in masks))
        step = DecodeMasks.from_config(config, positions=positions).plan(torch.tensor([slot]))
        plan = step.with_key_blocks(64, 64 + 2000, 64 + 2000)
        channels = [channel for channel in (plan.spatial, *plan.temporal) if isinstance(channel, TablePlan)]
        return [channel.keys.num_blocks for channel in channels if channel.keys is not None]

    assert num_blocks("sequential", 400) == [(2, 17), (4, 17)]
    assert num_blocks("sequential", 1999) == [(5, 17), (17, 17)]
    assert num_blocks("interpolation", 400) == [(2, 17), (3, 17), (2, 17)]
    assert num_blocks("interpolation", 1599) == [(5, 17), (6, 17), (3, 17)]


def test_a_decoding_step_attends_to_what_its_block_plan_does() -> None:
    config = tiny_config("interpolation", window_size=2)
    slots = config.layout.slots_of(3)[:5]
    blocks, step = plan_forward(config, slots), DecodeMasks.from_config(config).plan(torch.from_numpy(slots))
    for by_blocks, table in zip((blocks.spatial, *blocks.temporal), (step.spatial, *step.temporal), strict=True):
        assert isinstance(table, TablePlan) and isinstance(by_blocks, BlockPlan)
        assert np.array_equal(pairs(by_blocks, 5, 80), table.visible.numpy().astype(int))
        assert by_blocks.cache_positions is not None and torch.equal(table.cache_positions, by_blocks.cache_positions)
    assert step.needs_cache
