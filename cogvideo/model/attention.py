"""Attention of frame rows over [text, frame slots], and of text rows over text. One class serves both channels.

Not here: which slots are seen (masks.py, plan.py) and how the channels are mixed (block.py).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvideo.inference.cache import ChannelCache
from cogvideo.kernels.tiled_attention import attend_tiled
from cogvideo.model.plan import AttentionBlock, ChannelPlan
from cogvideo.model.quantize import Linear
from cogvideo.model.tiles import TiledChannel


class Attention(nn.Module):
    """Multi-head attention with biases. Source: CogVideo (2205.15868) section 3.2; both channels are built alike."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = Linear(hidden_size, 3 * hidden_size)
        self.dense = Linear(hidden_size, hidden_size)

    def forward(
        self,
        text: Tensor | None,
        frames: Tensor,
        *,
        plan: ChannelPlan,
        text_bias: Tensor,
        cache: ChannelCache | None = None,
        answer_text: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """Attend from every frame row and, if `answer_text`, from every text row.

        Shapes: text (batch, text_len, hidden), or None where the cache holds it; frames (batch, rows, hidden), the rows
        that were planned for; text_bias (batch, text_len), added to the scores of text keys, -inf on padding.
        Returns both outputs in their inputs' shapes, of frames only the rows that the plan answers; None for text that
        was not given or not answered.
        """
        dropout = self.dropout if self.training else 0.0
        if plan.tiled is not None and text is not None and cache is None and dropout == 0 and not frames.is_cuda:
            return self._forward_tiled(text, frames, plan.tiled, text_bias, answer_text)
        projected = self.query_key_value(frames)
        text_query = None
        if text is not None:
            text_query, text_key, text_value = self._project(text)
            if cache is not None:
                cache.store_text(text_key, text_value)
        else:
            assert cache is not None, "text rows are in neither the input nor a cache"
        query, key, value = self._by_head(projected)
        if cache is not None:
            # as they are stored, which may be in fewer bits
            text_key, text_value = (kept.to(frames.dtype) for kept in cache.text)
            if plan.places is not None:
                cache.store_frames(plan.places, key, value)
        if plan.seen is not None:
            assert cache is not None, "what a slot sees is in a cache"
            out = rearrange(attend_cache(query, cache, text_bias, plan.seen), "b h r d -> b r (h d)")
        else:
            if cache is not None and plan.places is not None:
                key, value = (kept.to(frames.dtype) for kept in cache.frames)
            outputs = [
                rearrange(
                    attend_block(query, key, value, text_key, text_value, text_bias, block, dropout),
                    "b h g q d -> b (g q) (h d)",
                )
                for block in plan.blocks
            ]
            out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
            if plan.restore is not None:
                out = out.index_select(1, plan.restore)

        text_out = None
        if text_query is not None and answer_text:
            text_out = self._answer_text(text_query, text_key, text_value, text_bias, dropout)
        return text_out, self.dense(out)

    def _forward_tiled(
        self, text: Tensor, frames: Tensor, channel: TiledChannel, text_bias: Tensor, answer_text: bool
    ) -> tuple[Tensor | None, Tensor]:
        """`forward` over a whole clip, of which the channel's answered rows come back."""
        ordered = frames if channel.order is None else frames.index_select(1, channel.order)
        text_projected = self.query_key_value(text)
        out = attend_tiled(self.query_key_value(ordered), text_projected, text_bias, self.num_heads, channel)
        out = self.dense(out)  # before rows are put in order: its input is kept already, as attention's output
        if channel.restore is not None:
            out = out.index_select(1, channel.restore)
        text_out = None
        if answer_text:
            text_out = self._answer_text(*self._by_head(text_projected), text_bias, 0.0)
        return text_out, out

    def _answer_text(self, query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, dropout: float) -> Tensor:
        bias = text_bias[:, None, None, :].to(query.dtype)
        bias = bias.masked_fill(bias > float("-inf"), 0.0)  # the text bonus is for frame rows alone
        context = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout)
        return self.dense(rearrange(context, "b h s d -> b s (h d)"))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, rows, hidden) -> queries, keys and values, each (batch, heads, rows, head_dim)."""
        return self._by_head(self.query_key_value(x))

    def _by_head(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(projected, "b s (three h d) -> three b h s d", three=3, h=self.num_heads)
        return q, k, v


def attend_cache(query: Tensor, cache: ChannelCache, text_bias: Tensor, seen: Tensor) -> Tensor:
    """One softmax over the cache's text and what each row sees of its frames. Nothing is copied.

    Shapes: query (batch, heads, rows, head_dim); text_bias (batch, text_len); seen (rows, places) bool, of a cache that
    may have fewer places (a clip that ends early) or more -> like query.
    """
    bias = query.new_full((len(query), 1, len(seen), cache.key.shape[2]), float("-inf"))
    bias[..., : cache.text_len] = text_bias[:, None, None, :]
    frames = bias[..., cache.text_len : cache.text_len + seen.shape[1]]
    frames.masked_fill_(seen[:, : frames.shape[-1]], 0.0)
    return F.scaled_dot_product_attention(query, cache.key.to(query.dtype), cache.value.to(query.dtype), bias)


def attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    block: AttentionBlock,
    dropout: float = 0.0,
) -> Tensor:
    """One softmax over [text keys, the block's keys] for the block's queries.

    Shapes: query (batch, heads, rows, head_dim); key, value (batch, heads, slots, head_dim); text_key, text_value
    (batch, heads, text_len, head_dim); text_bias (batch, text_len) -> (batch, heads, groups, num_queries, head_dim).
    """
    q, k, v = block.queries.take(query), block.keys.take(key), block.keys.take(value)
    explicit = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    form = _attend_explicit if explicit else _attend_fused
    return form(q, k, v, text_key, text_value, text_bias, block.allowed, dropout)


def _attend_fused(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_bias: Tensor, allowed: Tensor | None, p: float
) -> Tensor:
    """Through the fused kernel: keys of text and frames side by side, the bias broadcast over heads and groups."""
    batch, _, groups, num_queries, _ = q.shape
    num_keys, text_len = k.shape[3], text_k.shape[2]

    def with_text(text: Tensor, frame: Tensor) -> Tensor:
        return torch.cat([text.unsqueeze(2).expand(-1, -1, groups, -1, -1), frame], dim=3)

    bias = q.new_zeros(batch, 1, num_queries, text_len + num_keys)
    bias[..., :text_len] = text_bias[:, None, None, :]
    if allowed is not None:
        bias[..., text_len:].masked_fill_(~allowed, float("-inf"))
    # groups ride with the heads, so that the bias needs no copy for them
    fold = "b h g s d -> b (h g) s d"
    out = F.scaled_dot_product_attention(
        rearrange(q, fold), rearrange(with_text(text_k, k), fold), rearrange(with_text(text_v, v), fold), bias, p
    )
    return rearrange(out, "b (h g) s d -> b h g s d", g=groups)


def _attend_explicit(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_bias: Tensor, allowed: Tensor | None, p: float
) -> Tensor:
    """By plain matrix products: on a CPU in bfloat16 the fused kernel's backward is far slower."""
    groups, text_len = q.shape[2], text_k.shape[2]
    q = q / math.sqrt(q.shape[-1])
    rows = rearrange(q, "b h g q d -> b h (g q) d")
    text_scores = rows @ text_k.transpose(-1, -2) + text_bias[:, None, None, :].to(q.dtype)
    scores = q @ k.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = torch.cat([rearrange(text_scores, "b h (g q) t -> b h g q t", g=groups), scores], dim=-1).softmax(-1)
    weights = F.dropout(weights, p)
    to_text, to_frames = weights[..., :text_len], weights[..., text_len:]
    from_text = rearrange(to_text, "b h g q t -> b h (g q) t") @ text_v
    return to_frames @ v + rearrange(from_text, "b h (g q) d -> b h g q d", g=groups)
