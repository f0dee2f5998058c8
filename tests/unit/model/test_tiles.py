"""Tiles: each allowed pair of slots is in one tile, and no other pair is."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.tiles import Strips, TilePlan, plan_tiles
from cogvideo.sequence.layout import ClipLayout, FrameSpec
from tests.helpers.models import tiny_config


def rows_of(strips: Strips) -> np.ndarray:
    """(groups, length) rows, from the definition alone."""
    return strips.start + np.arange(strips.groups)[:, None] * strips.step + np.arange(strips.length)


def pairs(plan: TilePlan, num_slots: int) -> np.ndarray:
    """(slots, slots): how often each query sees each key."""
    slot = np.arange(num_slots) if plan.order is None else plan.order.numpy()
    count = np.zeros((num_slots, num_slots), int)
    for tile in plan.tiles:
        for group, queries in enumerate(rows_of(tile.queries)):
            if tile.whole is not None:
                np.add.at(count, np.ix_(slot[queries], slot[rows_of(tile.whole)[group]]), 1)
            if tile.causal is not None:
                keys = rows_of(tile.causal)[group]
                triangle = np.tril(np.ones((len(queries), len(keys)), int))
                np.add.at(count, np.ix_(slot[queries], slot[keys]), triangle)
    return count


@st.composite
def cases(draw: st.DrawFn) -> tuple[Mask, tuple[int, ...]]:
    side = draw(st.integers(1, 6))
    spec = st.builds(FrameSpec, st.integers(0, 3), st.booleans(), st.booleans())
    layout = ClipLayout(1, side, tuple(draw(st.lists(spec, min_size=1, max_size=5))))
    query_frames = tuple(sorted(draw(st.sets(st.integers(0, layout.num_frames - 1), min_size=1))))
    if draw(st.booleans()):
        return Mask(layout, "frame"), query_frames
    window = draw(st.sampled_from([None, *(w for w in range(1, side + 1) if side % w == 0)]))
    return Mask(layout, "clip", window, draw(st.sampled_from([0, window // 2])) if window else 0), query_frames


@given(cases())
def test_tiles_cover_the_mask(case: tuple[Mask, tuple[int, ...]]) -> None:
    mask, query_frames = case
    layout = mask.layout
    plan = plan_tiles(mask, query_frames)
    orders = [frame.order for frame in layout.frames]
    if any(frame.causal and orders.count(frame.order) > 1 for frame in layout.frames):
        assert plan is None
        return
    assert plan is not None
    slots = np.arange(layout.num_slots)
    wanted = mask.allowed(slots[:, None], slots[None]) & np.isin(slots // layout.frame_len, query_frames)[:, None]
    assert np.array_equal(pairs(plan, len(slots)), wanted.astype(int))

    order = slots if plan.order is None else plan.order.numpy()
    restored = order if plan.restore is None else order[plan.restore.numpy()]
    assert np.array_equal(restored, layout.slots_of(*query_frames))


def test_published_masks_take_few_tiles() -> None:
    for task, window, tiles in (("sequential", None, 1), ("interpolation", 10, 2)):
        config = tiny_config(task, frame_side=20, num_positions=512, window_size=window)  # type: ignore[arg-type]
        spatial, temporal = channel_masks(config.layout, window)
        plan = plan_tiles(temporal[0])
        assert plan is not None
        assert len(plan.tiles) == tiles
        by_frame = plan_tiles(spatial)
        assert by_frame is not None
        assert by_frame.order is by_frame.restore is None


def test_groups_of_a_single_clip_are_the_batch_of_one_view() -> None:
    strips = Strips(1, 2, groups=2, step=3)
    x = torch.arange(2 * 7 * 4.0).view(2, 7, 2, 2)
    (together,) = strips.views(x[:1])
    apart = strips.views(x)
    assert together.shape == (2, 2, 2, 2)
    for group, view in enumerate(apart):
        assert torch.equal(view[:1], together[group : group + 1])
        assert torch.equal(view, x[:, [1 + 3 * group, 2 + 3 * group]].transpose(1, 2))
    together.zero_()
    assert x[0, [1, 2, 4, 5]].abs().sum() == 0
    assert x[0, 3].abs().sum() > 0
