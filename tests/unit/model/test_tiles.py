"""Tiles: each allowed pair of slots is met once and no other is; attention over them against one dense softmax."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cogvideo.kernels.tiled_attention import attend_tiled
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.tiles import Strips, TiledChannel, tile_channel
from cogvideo.sequence.layout import ClipLayout, FrameSpec
from tests.helpers.models import VARIANTS, tiny_config


def rows_of(strips: Strips) -> np.ndarray:
    """(groups, length), told apart by the definition alone."""
    return strips.start + np.arange(strips.groups)[:, None] * strips.step + np.arange(strips.length)


def pairs(channel: TiledChannel, num_slots: int) -> np.ndarray:
    """(slots, slots): how often each query meets each key."""
    slot = np.arange(num_slots) if channel.order is None else channel.order.numpy()
    count = np.zeros((num_slots, num_slots), int)
    for tile in channel.tiles:
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
    answered = tuple(sorted(draw(st.sets(st.integers(0, layout.num_frames - 1), min_size=1))))
    if draw(st.booleans()):
        return Mask(layout, "frame"), answered
    window = draw(st.sampled_from([None, *(w for w in range(1, side + 1) if side % w == 0)]))
    return Mask(layout, "clip", window, draw(st.sampled_from([0, window // 2])) if window else 0), answered


@given(cases())
def test_tiles_cover_the_mask(case: tuple[Mask, tuple[int, ...]]) -> None:
    mask, answered = case
    layout = mask.layout
    channel = tile_channel(mask, answered)
    ranks = [frame.rank for frame in layout.frames]
    if any(frame.causal and ranks.count(frame.rank) > 1 for frame in layout.frames):
        assert channel is None
        return
    assert channel is not None
    slots = np.arange(layout.num_slots)
    wanted = mask.allowed(slots[:, None], slots[None]) & np.isin(slots // layout.frame_len, answered)[:, None]
    assert np.array_equal(pairs(channel, len(slots)), wanted.astype(int))

    order = slots if channel.order is None else channel.order.numpy()
    given_back = order if channel.restore is None else order[channel.restore.numpy()]
    assert np.array_equal(given_back, layout.slots_of(*answered))


def test_published_masks_waste_nothing() -> None:
    """No mask, and no more than the triangles' upper halves beside what is seen."""
    for task, window, tiles in (("sequential", None, 1), ("interpolation", 10, 2)):
        config = tiny_config(task, frame_side=20, num_positions=512, window_size=window)  # type: ignore[arg-type]
        spatial, temporal = channel_masks(config.layout, window)
        channel = tile_channel(temporal[0])
        assert channel is not None
        assert len(channel.tiles) == tiles
        first = tile_channel(spatial)
        assert first is not None
        assert first.order is first.restore is None


def test_one_clips_groups_are_a_batch() -> None:
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


def dense(mask: Mask, projected: Tensor, text: Tensor, bias: Tensor, heads: int) -> Tensor:
    slots = np.arange(projected.shape[1])
    allowed = torch.from_numpy(mask.allowed(slots[:, None], slots[None]))
    q, k, v = projected.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    _, text_k, text_v = text.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q = q / math.sqrt(q.shape[-1])
    scores = (q @ k.transpose(-1, -2)).masked_fill(~allowed, -math.inf)
    weights = torch.cat([q @ text_k.transpose(-1, -2) + bias[:, None, None], scores], -1).softmax(-1)
    return (weights @ torch.cat([text_v, v], 2)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("all_answered", [False, True])
def test_attention_equals_one_dense_softmax_and_so_do_gradients(variant: str, batch: int, all_answered: bool) -> None:
    config = tiny_config(**VARIANTS[variant])
    layout, size = config.layout, 3 * 16
    answered = tuple(range(layout.num_frames)) if all_answered else layout.supervised_frames
    spatial, temporal = channel_masks(layout, config.window_size)
    generator = torch.Generator().manual_seed(0)
    for mask in (spatial, *temporal):
        channel = tile_channel(mask, answered)
        assert channel is not None
        projected, text = (
            torch.randn(batch, rows, size, dtype=torch.float64, generator=generator).requires_grad_()
            for rows in (layout.num_slots, 5)
        )
        bias = torch.zeros(batch, 5, dtype=torch.float64)
        bias[-1, :2] = -math.inf
        bias[-1, 4] = 1.4
        rows = projected if channel.order is None else projected[:, channel.order]
        got = attend_tiled(rows, text, bias, 2, channel)
        got = got if channel.restore is None else got[:, channel.restore]
        wanted = dense(mask, projected, text, bias, 2)[:, layout.slots_of(*answered)]
        torch.testing.assert_close(got, wanted)
        weight = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
        theirs = torch.autograd.grad(wanted, (projected, text), weight)
        for mine, other in zip(torch.autograd.grad(got, (projected, text), weight), theirs, strict=True):
            torch.testing.assert_close(mine, other)
