"""Attention by every type of plan, with a cache and without, against one dense softmax."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.inference.backends import KVCache
from cogvideo.kernels import tiled_attention  # noqa: F401  (adds itself to ATTENTION)
from cogvideo.model import attention
from cogvideo.model.attention import ATTENTION, Attention, ChannelContext, attend_block
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.plan import BlockPlan, ChannelPlan, VisibleKeys, plan_blocks, plan_forward
from cogvideo.model.tiles import TilePlan, plan_tiles
from tests.helpers.models import VARIANTS, tiny_config

BIAS = torch.tensor([[-math.inf, -math.inf, 0.0], [1.4, 0.0, 0.5]], dtype=torch.float64)
"""Of three text rows: padding in the first clip, a bonus in the second."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend_blocks(plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor, tk: Tensor, tv: Tensor, bias: Tensor) -> Tensor:
    """(batch, heads, rows, head_dim), as `Attention.forward` joins the blocks."""
    outputs = []
    for block in plan.blocks:
        taken = block.queries.take(q), block.keys.take(k), block.keys.take(v)
        outputs.append(attend_block(*taken, tk, tv, bias, block.allowed, 0.0).flatten(2, 3))
    out = torch.cat(outputs, 2)
    return out if plan.restore is None else out.index_select(2, plan.restore)


def dense(allowed: np.ndarray, q: Tensor, k: Tensor, v: Tensor, tk: Tensor, tv: Tensor, bias: Tensor) -> Tensor:
    text = q @ tk.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias[:, None, None]
    frames = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~torch.from_numpy(allowed), -math.inf)
    return torch.cat([text, frames], -1).softmax(-1) @ torch.cat([tv, v], 2)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "image"])
def test_blocks_equal_one_dense_softmax_and_so_do_gradients(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    slots = np.arange(config.layout.num_slots)
    spatial, temporal = channel_masks(config.layout, config.window_size)
    for mask in (spatial, *temporal):
        inputs = [random(2, 2, n, 4, seed=i).requires_grad_() for i, n in enumerate([len(slots)] * 3 + [3] * 2)]
        expected = dense(mask.allowed(slots[:, None], slots[None]), *inputs, BIAS)
        got = attend_blocks(plan_blocks(mask, slots), *inputs, BIAS)
        torch.testing.assert_close(got, expected)
        weight = random(*expected.shape, seed=9)
        wanted = torch.autograd.grad((expected * weight).sum(), inputs)
        for mine, other in zip(torch.autograd.grad((got * weight).sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(mine, other)


def test_bfloat16_is_close() -> None:
    config = tiny_config("interpolation", window_size=2)
    plan = plan_forward(config).temporal[1]
    assert isinstance(plan, BlockPlan)
    inputs = [random(2, 2, n, 8, seed=i) for i, n in enumerate([config.layout.num_slots] * 3 + [3] * 2)]
    bias = torch.zeros(2, 3)
    exact = attend_blocks(plan, *inputs, bias.double())
    rough = attend_blocks(plan, *(x.bfloat16() for x in inputs), bias)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), exact, atol=0.03, rtol=0.03)


@pytest.fixture
def layer() -> Attention:
    torch.manual_seed(0)
    return Attention(16, 2, 0.0).double().eval()


def whole_clip(layer: Attention, mask: Mask, text: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's outputs by one dense softmax."""
    slots = np.arange(mask.layout.num_slots)
    q, k, v = layer._project(frames)
    tq, tk, tv = layer._project(text)
    out = dense(mask.allowed(slots[:, None], slots[None]), q, k, v, tk, tv, BIAS)
    padding = BIAS.masked_fill(-math.inf < BIAS, 0.0)
    text_out = dense(np.zeros((3, 0), bool), tq, k[:, :, :0], v[:, :, :0], tk, tv, padding)
    joined = [x.transpose(1, 2).flatten(2) for x in (text_out, out)]
    return layer.dense(joined[0]), layer.dense(joined[1])


@pytest.mark.parametrize("variant", ["sequential_windowed", "interpolation"])
@torch.no_grad()
def test_all_types_of_plan_give_the_same_rows(layer: Attention, variant: str) -> None:
    """Blocks and tiles over a whole clip; blocks with a cache, a frame at a time; tables, a slot at a time."""
    config = tiny_config(**VARIANTS[variant], hidden_size=16, num_heads=2)
    layout = config.layout
    text, frames = random(2, 3, 16), random(2, layout.num_slots, 16, seed=1)
    mask = channel_masks(layout, config.window_size)[1][0]
    slots = np.arange(layout.num_slots)
    expected = whole_clip(layer, mask, text, frames)

    def check(plan: ChannelPlan) -> None:
        for mine, other in zip(layer(text, frames, ChannelContext(plan, BIAS)), expected, strict=True):
            torch.testing.assert_close(mine, other)

    check(plan_blocks(mask, slots))
    tiles = plan_tiles(mask)
    assert tiles is not None
    layer.implementation = ATTENTION["cpu"]
    check(tiles)

    order = [*layout.given_frames, *layout.generation_order]
    first = [layout.slots_of(*layout.given_frames)]
    by_frame = first + [layout.slots_of(frame) for frame in order[len(layout.given_frames) :]]
    for table in (False, True):
        cache = KVCache.allocate(config, 2, 3, dtype=torch.float64).temporal[0]
        keys = VisibleKeys(mask, slots)
        for number, rows in enumerate(by_frame):
            steps = [rows] if number == 0 or not table else list(rows[:, None])
            for step in steps:
                at = torch.from_numpy(step)
                plan = keys.plan(at) if table and number else plan_blocks(mask, step, positions=slots)
                given_text = text if number == 0 else None
                text_out, out = layer(given_text, frames[:, at], ChannelContext(plan, BIAS, cache))
                torch.testing.assert_close(out, expected[1][:, at])
                assert (text_out is None) == (number > 0)
                if text_out is not None:
                    torch.testing.assert_close(text_out, expected[0])


@torch.no_grad()
def test_keys_are_read_as_the_cache_rounds_them(layer: Attention) -> None:
    """Text and frames of the pass that stores them, too: so a row does not depend on when its keys were stored."""
    config = tiny_config(hidden_size=16, num_heads=2)
    slots = np.arange(16)
    text, frames = random(2, 3, 16), random(2, 16, 16, seed=1)
    cache = KVCache.allocate(config, 2, 3, dtype=torch.bfloat16).temporal[0]
    mask = channel_masks(config.layout, None)[1][0]
    plan = plan_blocks(mask, slots, positions=np.arange(80))
    _, out = layer(text, frames, ChannelContext(plan, BIAS, cache))
    last = torch.tensor([15])
    _, again = layer(None, frames[:, last], ChannelContext(VisibleKeys(mask, np.arange(80)).plan(last), BIAS, cache))
    torch.testing.assert_close(out[:, last], again)
    _, exact = layer(text, frames, ChannelContext(plan_blocks(mask, slots), BIAS))
    assert 1e-4 < (out - exact).abs().max() < 0.1


def test_plans_that_do_not_fit_the_call_are_refused(layer: Attention) -> None:
    config = tiny_config()
    mask, slots = channel_masks(config.layout, None)[1][0], np.arange(80)
    text, frames = random(2, 3, 16), random(2, 80, 16, seed=1)
    tiles = plan_tiles(mask)
    assert isinstance(tiles, TilePlan)
    with pytest.raises(AssertionError, match="does not compute tiles"):
        layer(text, frames, ChannelContext(tiles, BIAS))
    with pytest.raises(AssertionError, match="attends to a cache"):
        layer(text, frames, ChannelContext(VisibleKeys(mask, slots).plan(torch.from_numpy(slots)), BIAS))
    with pytest.raises(AssertionError, match="neither an input nor in a cache"):
        layer(None, frames, ChannelContext(plan_blocks(mask, slots), BIAS))


def test_the_text_bonus_changes_frame_rows_and_no_text_row(layer: Attention) -> None:
    """A bonus on some text keys only: one that is equal on all keys of a row would cancel."""
    plan = plan_forward(tiny_config()).spatial
    text, frames = random(1, 3, 16), random(1, 80, 16, seed=1)
    mask = torch.tensor([[-math.inf, 0.0, 0.0]], dtype=torch.float64)
    bonus = torch.tensor([[0.0, 1.4, 0.0]], dtype=torch.float64)
    plain = layer(text, frames, ChannelContext(plan, mask))
    lifted = layer(text, frames, ChannelContext(plan, mask + bonus))
    torch.testing.assert_close(plain[0], lifted[0])
    assert (plain[1] - lifted[1]).abs().max() > 1e-3
    assert layer(text, frames, ChannelContext(plan, mask), update_text=False)[0] is None


def test_dropout_keeps_the_mean() -> None:
    """With values of one, the output is the sum of the remaining probabilities: one on average, and never just one."""
    torch.manual_seed(0)
    q, k = random(64, 4, 1, 16, 8, dtype=torch.float32), random(64, 4, 1, 16, 8, seed=1, dtype=torch.float32)
    ones, text = torch.ones_like(k), torch.ones(64, 4, 5, 8)
    out = attend_block(q, k, ones, text, text, torch.zeros(64, 5), None, 0.25)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.std().item() > 0.05


def test_implementations_are_chosen_by_name() -> None:
    assert attention.ATTENTION["sdpa"].attend_tiles is None
    assert Attention(16, 2, 0.0).implementation is ATTENTION["sdpa"]
    assert ATTENTION.keys() >= {"sdpa", "flex", "dense"}  # kernels add their own when they are imported
