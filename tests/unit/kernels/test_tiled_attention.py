"""The attention implementation "cpu" against one dense softmax: tiles, and blocks without the fused kernel."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.kernels.tiled_attention import attend_block_cpu, attend_block_unfused, attend_tiles
from cogvideo.model.attention import attend_block
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.tiles import TilePlan, plan_tiles
from cogvideo.model.transformer import CogVideoTransformer
from tests.helpers.models import VARIANTS, tiny_config, tiny_model


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
@pytest.mark.parametrize("all_frames", [False, True])
def test_tiles_equal_one_dense_softmax_and_so_do_gradients(variant: str, batch: int, all_frames: bool) -> None:
    config = tiny_config(**VARIANTS[variant])
    layout, size = config.layout, 3 * 16
    query_frames = tuple(range(layout.num_frames)) if all_frames else layout.supervised_frames
    spatial, temporal = channel_masks(layout, config.window_size)
    generator = torch.Generator().manual_seed(0)
    for mask in (spatial, *temporal):
        plan = plan_tiles(mask, query_frames)
        assert plan is not None
        projected, text = (
            torch.randn(batch, rows, size, dtype=torch.float64, generator=generator).requires_grad_()
            for rows in (layout.num_slots, 5)
        )
        bias = torch.zeros(batch, 5, dtype=torch.float64)
        bias[-1, :2] = -math.inf
        bias[-1, 4] = 1.4
        ordered = projected if plan.order is None else projected[:, plan.order]
        got = attend_tiles(ordered, text, bias, 2, plan)
        got = got if plan.restore is None else got[:, plan.restore]
        wanted = dense(mask, projected, text, bias, 2)[:, layout.slots_of(*query_frames)]
        torch.testing.assert_close(got, wanted)
        weight = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
        expected = torch.autograd.grad(wanted, (projected, text), weight)
        for mine, other in zip(torch.autograd.grad(got, (projected, text), weight), expected, strict=True):
            torch.testing.assert_close(mine, other)


def test_gradients_of_bfloat16_tiles_are_computed_in_float32() -> None:
    """Their error is that of rounding inputs and outputs to bfloat16; sums over tiles are not rounded."""
    config = tiny_config(**VARIANTS["sequential"])
    layout, generator = config.layout, torch.Generator().manual_seed(0)
    _, (mask, *_) = channel_masks(layout, config.window_size)
    plan = plan_tiles(mask, range(layout.num_frames))
    assert plan is not None and plan.order is None
    rough = [torch.randn(2, rows, 48, generator=generator).bfloat16() for rows in (layout.num_slots, 5)]
    weight = torch.randn(2, layout.num_slots, 16, generator=generator).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in rough]
        out = attend_tiles(*inputs, torch.zeros(2, 5, dtype=dtype), 2, plan)
        found.append(torch.autograd.grad(out, inputs, weight.to(dtype)))
    for mine, exact in zip(*found, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - exact).norm() < 0.0027 * exact.norm()  # 0.0020; in bfloat16 0.0035


def block_inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries, keys, values, text keys and values; text bias; mask."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (2, 3, 6, 8), (2, 3, 6, 8)]
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    bias = torch.zeros(2, 6)
    bias[0, :2], bias[1] = -math.inf, 1.4
    allowed = torch.rand(5, 7, generator=generator) < 0.7
    return inputs, bias, allowed


def test_unfused_blocks_equal_fused_ones_and_so_do_gradients() -> None:
    inputs, bias, allowed = block_inputs(torch.float64)
    for mask in (allowed, None):
        got, expected = (attend(*inputs, bias, mask, 0.0) for attend in (attend_block_unfused, attend_block))
        torch.testing.assert_close(got, expected)
        weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        wanted = torch.autograd.grad(expected, inputs, weight)
        for mine, other in zip(torch.autograd.grad(got, inputs, weight), wanted, strict=True):
            torch.testing.assert_close(mine, other)


def test_blocks_are_unfused_in_bfloat16_with_gradients_only() -> None:
    for dtype, needs_grad, attend in (
        (torch.bfloat16, True, attend_block_unfused),
        (torch.bfloat16, False, attend_block),
        (torch.float32, True, attend_block),
    ):
        inputs, bias, allowed = block_inputs(dtype)
        inputs = [x.detach().requires_grad_(needs_grad) for x in inputs]
        assert torch.equal(attend_block_cpu(*inputs, bias, allowed, 0.0), attend(*inputs, bias, allowed, 0.0))


def test_unfused_dropout_keeps_the_mean() -> None:
    """With values of one, the output is the sum of the remaining probabilities: one on average, and never just one."""
    torch.manual_seed(0)
    q, k = torch.randn(64, 4, 1, 16, 8), torch.randn(64, 4, 1, 16, 8)
    ones, text = torch.ones_like(k), torch.ones(64, 4, 5, 8)
    out = attend_block_unfused(q, k, ones, text, text, torch.zeros(64, 5), None, 0.25)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.std().item() > 0.05


@pytest.mark.parametrize(("training", "dropout", "tiled"), [(True, 0.0, True), (True, 0.1, False), (False, 0.1, True)])
def test_a_model_plans_tiles_unless_dropout_is_on(training: bool, dropout: float, tiled: bool) -> None:
    model = tiny_model(tiny_config(frame_side=16, num_positions=512, attention_dropout=dropout)).train(training)
    assert not plans_tiles(model)
    model.use_attention("cpu")
    assert plans_tiles(model) == tiled


def plans_tiles(model: CogVideoTransformer) -> bool:
    return isinstance(model.plan_clip(torch.device("cpu")).temporal[0], TilePlan)
