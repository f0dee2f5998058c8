"""The attention implementation "cpu", for training and scoring whole clips on a CPU.

Tiles need no score matrix, no mask and no copy of keys. Each piece (text keys, keys that all queries see, keys that are
seen causally) goes through PyTorch's fused kernel by itself, and the pieces are merged by their log-sum-exp. The
kernel's backward pass needs nothing else from the softmax, so the gradient is the sum of the pieces' gradients.
In bfloat16 the fused kernel's backward pass is several times slower than in float32, so tiles run it in float32, on
tensors that the forward pass saved in bfloat16, and blocks use matrix products.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideo.model.attention import ATTENTION, AttentionImplementation, attend_block
from cogvideo.model.tiles import Strips, TilePlan

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_tiles(
    projected: Tensor, text_projected: Tensor, text_bias: Tensor | None, num_heads: int, plan: TilePlan
) -> Tensor:
    """`model.attention.TileAttention`. Rows that are not queries of any tile attend to text only."""
    out: Tensor = _TiledAttention.apply(projected, text_projected, text_bias, num_heads, plan)  # type: ignore[no-untyped-call]
    return out


def attend_block_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    allowed: Tensor | None,
    dropout: float,
) -> Tensor:
    """`model.attention.BlockAttention`, by matrix products where bfloat16 needs gradients."""
    unfused = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    attend = attend_block_unfused if unfused else attend_block
    return attend(query, key, value, text_key, text_value, text_bias, allowed, dropout)


def attend_block_unfused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    allowed: Tensor | None,
    dropout: float,
) -> Tensor:
    """`model.attention.BlockAttention` by plain matrix products."""
    groups, text_len = query.shape[2], text_key.shape[2]
    query = query / math.sqrt(query.shape[-1])
    # text keys are the same for all groups: their scores are one product over all rows
    rows = rearrange(query, "b h g q d -> b h (g q) d")
    text_scores = rows @ text_key.transpose(-1, -2) + text_bias[:, None, None, :].to(query.dtype)
    scores = query @ key.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = torch.cat([rearrange(text_scores, "b h (g q) t -> b h g q t", g=groups), scores], dim=-1).softmax(-1)
    weights = F.dropout(weights, dropout)
    text_weights, frame_weights = weights[..., :text_len], weights[..., text_len:]
    text_out = rearrange(text_weights, "b h g q t -> b h (g q) t") @ text_value
    return frame_weights @ value + rearrange(text_out, "b h (g q) d -> b h g q d", g=groups)


ATTENTION["cpu"] = AttentionImplementation(attend_block_cpu, attend_tiles)


class _Piece(NamedTuple):
    """The inputs of one kernel call: views (batch, heads, rows, head_dim)."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    causal: bool
    bias: Tensor | None
    at: "_Region"


class _Region(NamedTuple):
    """Where a piece's queries and keys are, in the inputs and in outputs and gradients of the same layout."""

    queries: Strips
    keys: Strips
    is_text: bool
    view: int
    """Index among the strips' views."""

    def rows(self, x: Tensor) -> Tensor:
        """(batch, rows, heads, size) -> the piece's query rows (batch, heads, length, size)."""
        return self.queries.views(x)[self.view]

    def cols(self, x: Tensor) -> Tensor:
        """(batch, rows, heads, size) -> the piece's key rows (batch, heads, length, size)."""
        return self.keys.views(x)[self.view]


def _pieces(projected: Tensor, text: Tensor, text_bias: Tensor | None, plan: TilePlan) -> Iterator[_Piece]:
    """Text first, for all rows, then the tiles. projected, text: (batch, rows, 3, heads, head_dim)."""
    queries, keys, values = projected.unbind(2)
    region = _Region(Strips(0, queries.shape[1]), Strips(0, text.shape[1]), True, 0)
    _, text_keys, text_values = (region.cols(x) for x in text.unbind(2))
    yield _Piece(region.rows(queries), text_keys, text_values, False, text_bias, region)
    for tile in plan.tiles:
        for strips, causal in ((tile.whole, False), (tile.causal, True)):
            if strips is None:
                continue
            for i in range(len(strips.views(keys))):
                region = _Region(tile.queries, strips, False, i)
                yield _Piece(region.rows(queries), region.cols(keys), region.cols(values), causal, None, region)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(2, (3, num_heads, -1))


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, text: Tensor, text_bias: Tensor | None, num_heads: int, plan: TilePlan
    ) -> Tensor:
        if text_bias is not None:
            text_bias = text_bias[:, None, None, :].to(projected.dtype)
        context = total = projected
        for piece in _pieces(_split_heads(projected, num_heads), _split_heads(text, num_heads), text_bias, plan):
            out, logsumexp = _forward(piece.queries, piece.keys, piece.values, 0.0, piece.causal, attn_mask=piece.bias)
            if piece.at.is_text:
                # the kernel's memory layout is by row, then head
                context, total = out.transpose(1, 2), logsumexp.transpose(1, 2).unsqueeze(-1)
                continue
            # two softmaxes merge by their sums: the new piece has weight e^new / (e^new + e^old)
            merged, merged_total = piece.at.rows(context), piece.at.rows(total)
            weight = torch.sigmoid(logsumexp.unsqueeze(-1) - merged_total)
            merged.lerp_(out, weight.to(out.dtype))
            merged_total.copy_(torch.logaddexp(merged_total, logsumexp.unsqueeze(-1)))
        ctx.save_for_backward(projected, text, text_bias, context, total)
        ctx.num_heads, ctx.plan = num_heads, plan
        return context.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtype, wide = grads[0].dtype, torch.promote_types(grads[0].dtype, torch.float32)
        saved: list[Any] = [x if x is None else x.to(wide) for x in ctx.saved_tensors]
        projected, text, text_bias, context, total = saved
        grad = grads[0].to(wide).unflatten(2, (ctx.num_heads, -1))
        d_projected, d_text = torch.zeros_like(projected), torch.zeros_like(text)
        d_query, d_key, d_value = _split_heads(d_projected, ctx.num_heads).unbind(2)
        _, d_text_key, d_text_value = _split_heads(d_text, ctx.num_heads).unbind(2)
        inputs = _split_heads(projected, ctx.num_heads), _split_heads(text, ctx.num_heads)
        for piece in _pieces(*inputs, text_bias, ctx.plan):
            at = piece.at
            dq, dk, dv = _backward(
                at.rows(grad),
                piece.queries,
                piece.keys,
                piece.values,
                at.rows(context),
                at.rows(total).squeeze(-1),
                0.0,
                piece.causal,
                attn_mask=piece.bias,
            )
            at.rows(d_query).add_(dq)
            at.cols(d_text_key if at.is_text else d_key).add_(dk)
            at.cols(d_text_value if at.is_text else d_value).add_(dv)
        return d_projected.to(dtype), d_text.to(dtype) if ctx.needs_input_grad[1] else None, None, None, None
