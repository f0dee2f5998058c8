"""Attention of frame rows over [text, frame slots], and of text rows over text. One class serves both channels.

Not here: which slots are visible (masks.py, plan.py) and how the channels are mixed (transformer.py). By default
everything runs through `scaled_dot_product_attention`; `ATTENTION` names implementations that can replace it for passes
over many rows.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvideo.model.inputs import ChannelCache
from cogvideo.model.joined import JoinedMask, attend_dense, attend_flex, attend_key_blocks, permute_rows
from cogvideo.model.plan import BlockPlan, LayerPlan, PlanType, TablePlan
from cogvideo.model.quantize import Linear
from cogvideo.model.tiles import TilePlan


@dataclass(frozen=True)
class ChannelContext:
    """What one channel of one layer attends to in a forward pass."""

    plan: LayerPlan
    text_bias: Tensor
    """(batch, text_len), added to the scores of text keys, -inf on padding."""
    cache: ChannelCache | None = None


class BlockAttention(Protocol):
    """One softmax over [text keys, a block's keys] for the block's queries."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        text_key: Tensor,
        text_value: Tensor,
        text_bias: Tensor,
        allowed: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Shapes: query (batch, heads, groups, num_queries, head_dim), and the result; key, value (batch, heads,
        groups, num_keys, head_dim); text_key, text_value (batch, heads, text_len, head_dim); text_bias (batch,
        text_len); allowed (num_queries, num_keys) bool.
        """
        ...


class TileAttention(Protocol):
    """Attention of a whole clip over text and tiles, on a CPU and without dropout."""

    def __call__(
        self, projected: Tensor, text_projected: Tensor, text_bias: Tensor | None, num_heads: int, plan: TilePlan
    ) -> Tensor:
        """Shapes: projected (batch, rows, 3 * hidden), queries, keys and values side by side, rows in `plan.order`;
        text_projected (batch, text_len, 3 * hidden); text_bias (batch, text_len) -> (batch, rows, hidden).
        """
        ...


class JoinedAttention(Protocol):
    """One softmax over text and frames, for the queries of both."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, mask: JoinedMask, dropout: float
    ) -> Tensor:
        """Shapes: query (batch, heads, queries, head_dim), and the result; key, value (batch, heads, text_len + rows,
        head_dim), in the order of `mask`; text_bias (batch, text_len), whose bonus does not apply to text queries.
        """
        ...


@dataclass(frozen=True)
class AttentionImplementation:
    """How attention is computed for each type of plan. Table plans, of a few rows, always use `attend_table`."""

    attend_block: BlockAttention
    attend_tiles: TileAttention | None = None
    attend_joined: JoinedAttention | None = None
    """At most one of the two; with neither, whole clips are planned as blocks."""

    def plan_type(self, device: torch.device, dropout: float) -> PlanType:
        """How passes over many rows are planned for this implementation."""
        if self.attend_joined is not None:
            return "joined"
        return "tiles" if self.attend_tiles is not None and device.type != "cuda" and not dropout else "blocks"


class Attention(nn.Module):
    """Multi-head attention with biases. Source: CogVideo (2205.15868) section 3.2; both channels are built alike."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = Linear(hidden_size, 3 * hidden_size)
        self.dense = Linear(hidden_size, hidden_size)
        self.implementation = ATTENTION["sdpa"]

    def forward(
        self, text: Tensor | None, frames: Tensor, context: ChannelContext, *, update_text: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Attend from every query row of the plan and, with `update_text`, from every text row.

        Shapes: text (batch, text_len, hidden), or None where the cache holds it; frames (batch, rows, hidden), the rows
        that the plan is for. Returns text in its input's shape, None if it was not given or not updated; and frames
        (batch, query rows, hidden).
        """
        plan, cache = context.plan, context.cache
        if isinstance(plan, TilePlan):
            assert text is not None and cache is None, "tiles are for whole clips without a cache"
            return self._forward_tiled(text, frames, plan, context.text_bias, update_text)
        if isinstance(plan, JoinedMask):
            assert text is not None, "joined plans are for passes over text and frames"
            return self._forward_joined(text, frames, plan, context.text_bias, cache, update_text)

        query, key, value = self._project(frames)
        text_query = None
        if text is not None:
            text_query, text_key, text_value = self._project(text)
            if cache is not None:
                cache.store_text(text_key, text_value)
        if cache is not None:
            text_key, text_value = cache.read_text(frames.dtype)
            if plan.cache_positions is not None:
                cache.store_frames(plan.cache_positions, key, value)
        else:
            assert text is not None, "text is neither an input nor in a cache"

        dropout = self.dropout if self.training else 0.0
        if isinstance(plan, TablePlan):
            assert cache is not None, "a table plan attends to a cache"
            out = rearrange(attend_table(query, cache, context.text_bias, plan), "b h r d -> b r (h d)")
        else:
            if cache is not None and plan.cache_positions is not None:
                key, value = cache.read_frames(frames.dtype)
            out = self._attend_blocks(plan, query, key, value, text_key, text_value, context.text_bias, dropout)
        text_out = None
        if text_query is not None and update_text:
            text_out = self._attend_text(text_query, text_key, text_value, context.text_bias, dropout)
        return text_out, self.dense(out)

    def attend_cached(self, projected: Tensor, context: ChannelContext) -> Tensor:
        """Store the keys of a decoding step, and attend to the cache.

        Shapes: projected (batch, rows, 3 * hidden), queries, keys and values side by side -> (batch, rows, hidden).
        """
        plan, cache = context.plan, context.cache
        assert isinstance(plan, TablePlan) and cache is not None, "a decoding step has a table plan and a cache"
        query, key, value = self._split_heads(projected)
        cache.store_frames(plan.cache_positions, key, value)
        return rearrange(attend_table(query, cache, context.text_bias, plan), "b h r d -> b r (h d)")

    def _attend_blocks(
        self,
        plan: BlockPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        text_key: Tensor,
        text_value: Tensor,
        text_bias: Tensor,
        dropout: float,
    ) -> Tensor:
        """Heads of rows (batch, heads, rows, head_dim) -> (batch, query rows, hidden), in row order."""
        outputs = []
        for block in plan.blocks:
            q, k, v = block.queries.take(query), block.keys.take(key), block.keys.take(value)
            out = self.implementation.attend_block(q, k, v, text_key, text_value, text_bias, block.allowed, dropout)
            outputs.append(rearrange(out, "b h g q d -> b (g q) (h d)"))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return joined if plan.restore is None else joined.index_select(1, plan.restore)

    def _forward_tiled(
        self, text: Tensor, frames: Tensor, plan: TilePlan, text_bias: Tensor, update_text: bool
    ) -> tuple[Tensor | None, Tensor]:
        attend = self.implementation.attend_tiles
        assert attend is not None, "this attention implementation does not compute tiles"
        ordered = frames if plan.order is None else frames.index_select(1, plan.order)
        text_projected = self.query_key_value(text)
        out = attend(self.query_key_value(ordered), text_projected, text_bias, self.num_heads, plan)
        # projected before the rows are put back in order: autograd keeps attention's output anyway, and no second copy
        out = self.dense(out)
        if plan.restore is not None:
            out = out.index_select(1, plan.restore)
        text_out = None
        if update_text:
            text_out = self._attend_text(*self._split_heads(text_projected), text_bias, 0.0)
        return text_out, out

    def _forward_joined(
        self,
        text: Tensor,
        frames: Tensor,
        mask: JoinedMask,
        text_bias: Tensor,
        cache: ChannelCache | None,
        update_text: bool,
    ) -> tuple[Tensor | None, Tensor]:
        attend, plan, text_len = self.implementation.attend_joined, mask.plan, mask.text_len
        assert attend is not None, "this attention implementation does not compute joined plans"
        if plan.order is not None and plan.inverse is not None:
            frames = permute_rows(frames, plan.order, plan.inverse)
        query, key, value = self._project(torch.cat([text, frames], 1))
        if cache is not None:
            key, value = _store_joined(cache, key, value, mask)
        if plan.queries is not None:
            query = query[:, :, text_len:].index_select(2, plan.queries)
        out = attend(query, key, value, text_bias, mask, self.dropout if self.training else 0.0)
        out = self.dense(rearrange(out, "b h r d -> b r (h d)"))
        if plan.queries is not None:
            assert not update_text, "a pass without text queries has no text output"
            return None, out if plan.restore is None else out.index_select(1, plan.restore)
        text_out, out = out.split([text_len, frames.shape[1]], 1)
        if plan.order is not None and plan.inverse is not None:
            out = permute_rows(out, plan.inverse, plan.order)
        if not update_text:
            return None, out
        # text attends to text alone: if nothing there is trained, it needs no gradient
        learns = text.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        return text_out if learns else text_out.detach(), out

    def _attend_text(self, query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, dropout: float) -> Tensor:
        bias = text_bias[:, None, None, :].to(query.dtype)
        bias = bias.masked_fill(bias > float("-inf"), 0.0)  # padding only: the text bonus is for frame rows
        out = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout)
        return self.dense(rearrange(out, "b h s d -> b s (h d)"))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, rows, hidden) -> queries, keys and values, each (batch, heads, rows, head_dim)."""
        return self._split_heads(self.query_key_value(x))

    def _split_heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(projected, "b s (three h d) -> three b h s d", three=3, h=self.num_heads)
        return q, k, v


def _store_joined(cache: ChannelCache, key: Tensor, value: Tensor, mask: JoinedMask) -> tuple[Tensor, Tensor]:
    """Store keys and values (batch, heads, text_len + rows, head_dim); return them as rounded by the cache."""
    sizes = [mask.text_len, key.shape[2] - mask.text_len]
    (text_key, key), (text_value, value) = key.split(sizes, 2), value.split(sizes, 2)
    cache.store_text(text_key, text_value)
    if mask.plan.cache_positions is not None:
        cache.store_frames(mask.plan.cache_positions, key, value)
        key, value = (x.to(cache.key.dtype).to(x.dtype) for x in (key, value))
    text_key, text_value = cache.read_text(key.dtype)
    return torch.cat([text_key, key], 2), torch.cat([text_value, value], 2)


def attend_table(query: Tensor, cache: ChannelCache, text_bias: Tensor, plan: TablePlan) -> Tensor:
    """One softmax over the cache's text and the frame keys that each row sees.

    If the cache has the queries' dtype, nothing is copied, and where the plan lists blocks of keys, FlexAttention reads
    only those; otherwise the whole cache is read.
    Shapes: query (batch, heads, rows, head_dim), and the result; text_bias (batch, text_len).
    """
    if plan.keys is not None and cache.key.dtype == query.dtype:
        return attend_key_blocks(query, cache.key, cache.value, text_bias, plan.keys)
    visible = plan.visible
    bias = query.new_full((len(query), 1, len(visible), cache.key.shape[2]), float("-inf"))
    bias[..., : cache.text_len] = text_bias[:, None, None, :]
    frames = bias[..., cache.text_len : cache.text_len + visible.shape[1]]
    frames.masked_fill_(visible[:, : frames.shape[-1]], 0.0)
    return F.scaled_dot_product_attention(query, cache.key.to(query.dtype), cache.value.to(query.dtype), bias)


def attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    allowed: Tensor | None,
    dropout: float,
) -> Tensor:
    """`BlockAttention` by the fused kernel: text and frame keys concatenated, one bias for all heads and groups."""
    batch, _, groups, num_queries, _ = query.shape
    num_keys, text_len = key.shape[3], text_key.shape[2]

    def join(text: Tensor, frames: Tensor) -> Tensor:
        return torch.cat([text.unsqueeze(2).expand(-1, -1, groups, -1, -1), frames], dim=3)

    bias = query.new_zeros(batch, 1, num_queries, text_len + num_keys)
    bias[..., :text_len] = text_bias[:, None, None, :]
    if allowed is not None:
        bias[..., text_len:].masked_fill_(~allowed, float("-inf"))
    # groups are folded into the heads, over which the bias is broadcast without a copy
    fold = "b h g s d -> b (h g) s d"
    out = F.scaled_dot_product_attention(
        rearrange(query, fold),
        rearrange(join(text_key, key), fold),
        rearrange(join(text_value, value), fold),
        bias,
        dropout,
    )
    return rearrange(out, "b (h g) s d -> b h g s d", g=groups)


ATTENTION: dict[str, AttentionImplementation] = {
    "sdpa": AttentionImplementation(attend_block),
    "flex": AttentionImplementation(attend_block, attend_joined=attend_flex),
    "dense": AttentionImplementation(attend_block, attend_joined=attend_dense),
}
"""Implementations by name; `cogvideo.kernels` adds its own. `use_attention` selects one for a model."""
