"""Attention over text and tiles of a clip, with gradients: no score matrix, no mask, no copy of keys.

Each piece (text keys, keys seen whole, keys seen causally) goes through the fused kernel by itself; the pieces are
merged by their log-sum-exp, and since the kernel's backward needs nothing of the softmax but that sum, the gradient of
the whole is the sum of the pieces'. CPU only: on a GPU `scaled_dot_product_attention` over blocks serves.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideo.model.tiles import Strips, TiledChannel

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_tiled(
    projected: Tensor, text_projected: Tensor, text_bias: Tensor | None, num_heads: int, channel: TiledChannel
) -> Tensor:
    """Contexts of all rows; those of rows that no tile asks for hold text alone.

    Shapes: projected (batch, rows, 3 * hidden), queries, keys and values side by side, rows as `channel.order` has
    them; text_projected (batch, text_len, 3 * hidden); text_bias (batch, text_len) or None -> (batch, rows, hidden).
    """
    context: Tensor = _TiledAttention.apply(projected, text_projected, text_bias, num_heads, channel)
    return context


class _Piece(NamedTuple):
    """One kernel call: views (batch, heads, rows, head_dim), in parallel for inputs and for whatever goes with them."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    causal: bool
    bias: Tensor | None
    at: "_Place"


class _Place(NamedTuple):
    queries: Strips
    keys: Strips
    of_text: bool
    view: int
    """Which of the strips' views."""

    def rows(self, x: Tensor) -> Tensor:
        """(batch, rows, heads, size) -> the piece's query rows (some batch, heads, length, size)."""
        return self.queries.views(x)[self.view]

    def cols(self, x: Tensor) -> Tensor:
        return self.keys.views(x)[self.view]


def _pieces(projected: Tensor, text: Tensor, text_bias: Tensor | None, channel: TiledChannel) -> Iterator[_Piece]:
    """Text first, over all rows, then the tiles. projected, text: (batch, rows, 3, heads, head_dim)."""
    queries, keys, values = projected.unbind(2)
    everything, words = Strips(0, queries.shape[1]), Strips(0, text.shape[1])
    place = _Place(everything, words, True, 0)
    _, text_keys, text_values = (place.cols(x) for x in text.unbind(2))
    yield _Piece(place.rows(queries), text_keys, text_values, False, text_bias, place)
    for tile in channel.tiles:
        for strips, causal in ((tile.whole, False), (tile.causal, True)):
            if strips is None:
                continue
            for i in range(len(strips.views(keys))):
                place = _Place(tile.queries, strips, False, i)
                yield _Piece(place.rows(queries), place.cols(keys), place.cols(values), causal, None, place)


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(2, (3, num_heads, -1))


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, text: Tensor, text_bias: Tensor | None, num_heads: int, channel: TiledChannel
    ) -> Tensor:
        if text_bias is not None:
            text_bias = text_bias[:, None, None, :].to(projected.dtype)
        context = total = projected
        for piece in _pieces(_by_head(projected, num_heads), _by_head(text, num_heads), text_bias, channel):
            out, logsumexp = _forward(piece.queries, piece.keys, piece.values, 0.0, piece.causal, attn_mask=piece.bias)
            if piece.at.of_text:
                # the kernel lays both out by row, then head
                context, total = out.transpose(1, 2), logsumexp.transpose(1, 2).unsqueeze(-1)
                continue
            so_far, sum_so_far = piece.at.rows(context), piece.at.rows(total)
            part = torch.sigmoid(logsumexp.unsqueeze(-1) - sum_so_far)  # of the new piece in the merged softmax
            so_far.lerp_(out, part.to(out.dtype))
            sum_so_far.copy_(torch.logaddexp(sum_so_far, logsumexp.unsqueeze(-1)))
        ctx.save_for_backward(projected, text, text_bias, context, total)
        ctx.num_heads, ctx.channel = num_heads, channel
        return context.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        projected, text, text_bias, context, total = ctx.saved_tensors
        grad = grads[0].unflatten(2, (ctx.num_heads, -1))
        d_projected, d_text = torch.zeros_like(projected), torch.zeros_like(text)
        d_query, d_key, d_value = _by_head(d_projected, ctx.num_heads).unbind(2)
        _, d_text_key, d_text_value = _by_head(d_text, ctx.num_heads).unbind(2)
        inputs = _by_head(projected, ctx.num_heads), _by_head(text, ctx.num_heads)
        for piece in _pieces(*inputs, text_bias, ctx.channel):
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
            at.cols(d_text_key if at.of_text else d_key).add_(dk)
            at.cols(d_text_value if at.of_text else d_value).add_(dv)
        return d_projected, d_text if ctx.needs_input_grad[1] else None, None, None, None
