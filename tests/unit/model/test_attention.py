"""Attention by blocks, fused and explicit, against one dense softmax."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.model import attention
from cogvideo.model.attention import Attention
from cogvideo.model.masks import channel_masks
from cogvideo.model.plan import ChannelPlan, plan_forward
from tests.helpers.models import VARIANTS, tiny_config

FORMS = {"fused": attention._attend_fused, "explicit": attention._attend_explicit}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(form: str, plan: ChannelPlan, q: Tensor, k: Tensor, v: Tensor, tk: Tensor, tv: Tensor, bias: Tensor) -> Tensor:
    """(batch, heads, rows, head_dim) by blocks, as `Attention.forward` strings them together."""
    outputs = []
    for block in plan.blocks:
        picked = block.queries.take(q), block.keys.take(k), block.keys.take(v)
        outputs.append(FORMS[form](*picked, tk, tv, bias, block.allowed, 0.0).flatten(2, 3))
    out = torch.cat(outputs, 2)
    return out if plan.restore is None else out.index_select(2, plan.restore)


def dense(allowed: np.ndarray, q: Tensor, k: Tensor, v: Tensor, tk: Tensor, tv: Tensor, bias: Tensor) -> Tensor:
    text = q @ tk.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias[:, None, None]
    frames = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~torch.from_numpy(allowed), -math.inf)
    return torch.cat([text, frames], -1).softmax(-1) @ torch.cat([tv, v], 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "image"])
def test_blocks_equal_one_dense_softmax_and_so_do_gradients(form: str, variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    slots = np.arange(config.layout.num_slots)
    plan = plan_forward(config)
    spatial, temporal = channel_masks(config.layout, config.window_size)
    bias = torch.tensor([[-math.inf, -math.inf, 0.0], [1.4, 0.0, 0.0]], dtype=torch.float64)
    for mask, channel in zip((spatial, *temporal), (plan.spatial, *plan.temporal), strict=True):
        inputs = [random(2, 2, n, 4, seed=i).requires_grad_() for i, n in enumerate([len(slots)] * 3 + [3] * 2)]
        expected = dense(mask.allowed(slots[:, None], slots[None]), *inputs, bias)
        got = run(form, channel, *inputs, bias)
        torch.testing.assert_close(got, expected)
        weight = random(*expected.shape, seed=9)
        wanted = torch.autograd.grad((expected * weight).sum(), inputs)
        for mine, theirs in zip(torch.autograd.grad((got * weight).sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_close(form: str) -> None:
    config = tiny_config("interpolation", window_size=2)
    plan = plan_forward(config).temporal[1]
    inputs = [random(2, 2, n, 8, seed=i) for i, n in enumerate([config.layout.num_slots] * 3 + [3] * 2)]
    bias = torch.zeros(2, 3)
    exact = run(form, plan, *inputs, bias.double())
    rough = run(form, plan, *(x.bfloat16() for x in inputs), bias)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), exact, atol=0.03, rtol=0.03)


def test_text_rows_see_text_without_the_bonus() -> None:
    layer = Attention(16, 2, 0.0).double()
    plan = plan_forward(tiny_config()).spatial
    text, frames = random(1, 3, 16), random(1, 80, 16, seed=1)
    mask = torch.tensor([[-math.inf, 0.0, 0.0]], dtype=torch.float64)
    plain = layer(text, frames, plan=plan, text_bias=mask)
    lifted = layer(text, frames, plan=plan, text_bias=mask + 1.4)
    torch.testing.assert_close(plain[0], lifted[0])
    assert (plain[1] - lifted[1]).abs().max() > 1e-3
    assert layer(text, frames, plan=plan, text_bias=mask, answer_text=False)[0] is None


@pytest.mark.parametrize("form", FORMS)
def test_dropout_keeps_the_mean(form: str) -> None:
    """With values of one, the output is the sum of the kept probabilities: one on average, and never just one."""
    torch.manual_seed(0)
    q, k = random(64, 4, 1, 16, 8, dtype=torch.float32), random(64, 4, 1, 16, 8, seed=1, dtype=torch.float32)
    ones, text = torch.ones_like(k), torch.ones(64, 4, 5, 8)
    out = FORMS[form](q, k, ones, text, text, torch.zeros(64, 5), None, 0.25)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.std().item() > 0.05


def test_mixing_is_a_weighted_mean_by_channel() -> None:
    from cogvideo.model.block import mix_channels

    spatial, temporal = random(2, 3, 4), random(2, 3, 4, seed=1)
    logit = torch.tensor([-50.0, 0.0, 1.0, 50.0], dtype=torch.float64)
    alpha = logit.sigmoid()
    torch.testing.assert_close(mix_channels(spatial, temporal, logit), alpha * spatial + (1 - alpha) * temporal)
