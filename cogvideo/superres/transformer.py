"""The super-resolution transformers, direct and iterative (`SuperresConfig.method`). Both have two kinds of rows:

    context    text, and in the direct model the coarse grid; uses the trunk's attention layers
    fine grid  one row per token: row j predicts token j, without a shift. A row attends to its neighbours within 9 rows
               by 5 columns, and to context: the 5 x 5 coarse tokens around it in the direct model, all text in the
               iterative model

Context rows never attend to the fine grid. In the direct model the fine grid has its own projections and all of its
inputs are BOI, so all tokens are drawn at once. In the iterative model known places have their tokens as inputs, and
places to draw have BOI. Source: CogView2 (2204.14217), section 3.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvideo.model.config import Recompute
from cogvideo.model.loss import token_nll
from cogvideo.model.quantize import Embedding, Linear
from cogvideo.model.transformer import MLP, TrunkModel
from cogvideo.superres.batch import SuperresBatch
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import KeySource, QueryTiles, attend_in_tiles, full_tiles, neighbourhood_tiles

FINE_NEIGHBOURHOOD, COARSE_NEIGHBOURHOOD = (9, 5), (5, 5)
"""Rows and columns of keys around a fine query, on the fine grid and on the coarse grid."""
ROWS_PER_CHUNK = 1024
"""Rows whose MLP is computed at once on a CPU: all 3,600 of a frame would take most of the memory of a forward pass."""


class Heads(NamedTuple):
    """Queries, keys and values, each (batch, heads, rows, head_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class VisibleKeys:
    """The keys that rows of the fine grid attend to, among context rows and on the fine grid."""

    context: QueryTiles
    grid: QueryTiles

    def to(self, device: torch.device) -> "VisibleKeys":
        return VisibleKeys(self.context.to(device), self.grid.to(device))


def visible_keys(config: SuperresConfig) -> VisibleKeys:
    side = config.high_res_side
    grid = neighbourhood_tiles(side, side, *FINE_NEIGHBOURHOOD)
    if config.method == "direct":
        # coarse tokens follow the text among the context rows
        coarse = neighbourhood_tiles(side, config.low_res_side, *COARSE_NEIGHBOURHOOD, first_key=config.text_len)
        return VisibleKeys(coarse, grid)
    return VisibleKeys(full_tiles(grid, config.text_len), grid)


class _Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = Linear(hidden_size, 3 * hidden_size)
        self.dense = Linear(hidden_size, hidden_size)

    def heads(self, x: Tensor) -> Heads:
        return Heads(*rearrange(self.query_key_value(x), "b s (three h d) -> three b h s d", three=3, h=self.num_heads))


class _Layer(nn.Module):
    def __init__(self, config: SuperresConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.input_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.attention = _Attention(h, config.num_heads)
        self.third_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.post_attention_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.mlp = MLP(h, config.dropout)
        self.fourth_layernorm = nn.LayerNorm(h, eps=1e-5)
        if config.method == "direct":
            self.high_res_attention = _Attention(h, config.num_heads)
        self._context_dropout, self._grid_dropout = config.context_attention_dropout, config.attention_dropout

    def forward(
        self,
        context: Tensor,
        grid: Tensor,
        context_bias: Tensor,
        padding_bias: Tensor,
        visible: VisibleKeys,
        *,
        update_context: bool = True,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the updated context and grid.

        Shapes: context (batch, context rows, hidden); grid (batch, grid rows, hidden); context_bias (batch, 1, context
        rows, context rows); padding_bias (batch, context rows), -inf on padding. `update_context=False` returns the
        context unchanged: after the last layer it is not used. `recompute` recomputes everything after attention in the
        backward pass instead of storing it.
        """
        context_dropout, grid_dropout = (self._context_dropout, self._grid_dropout) if self.training else (0.0, 0.0)
        grid_attention = self.high_res_attention if hasattr(self, "high_res_attention") else self.attention
        of_context = self.attention.heads(self.input_layernorm(context))
        of_grid = grid_attention.heads(self.input_layernorm(grid))
        finish = partial(checkpoint, self._after_attention, use_reentrant=False) if recompute else self._after_attention
        if update_context:
            attended = F.scaled_dot_product_attention(*of_context, context_bias, context_dropout)
            context = finish(context, self.attention.dense(rearrange(attended, "b h s d -> b s (h d)")))
        sources = (
            KeySource(of_context.key, of_context.value, visible.context, padding_bias),
            KeySource(of_grid.key, of_grid.value, visible.grid),
        )
        grid = finish(grid, grid_attention.dense(attend_in_tiles(of_grid.query, sources, grid_dropout)))
        return context, grid

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer, which treats each row independently: when sampling on a CPU, in chunks to save memory.

        A GPU takes all rows at once, since weights may be copied to it for each product.
        """
        rows = max(1, ROWS_PER_CHUNK // len(x))
        if x.shape[1] <= rows or x.device.type != "cpu" or torch.is_grad_enabled():
            return self._finish_rows(x, attended)
        chunks = zip(x.split(rows, dim=1), attended.split(rows, dim=1), strict=True)
        return torch.cat([self._finish_rows(*chunk) for chunk in chunks], dim=1)

    def _finish_rows(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.third_layernorm(attended)
        return x + self.fourth_layernorm(self.mlp(self.post_attention_layernorm(x)))


class SuperresTransformer(TrunkModel):
    """The trunk's parameters (same names), positions of the fine grid, and the direct model's own projections."""

    extra_names = ("extra_position_embeddings.", ".high_res_attention.")

    def __init__(self, config: SuperresConfig) -> None:
        super().__init__()
        needed = max(config.text_len, config.low_res_position_start + config.low_res_len if config.low_res_len else 0)
        if needed > config.num_positions:
            raise ValueError(
                f"superres.num_positions={config.num_positions} is less than the {needed} that text and coarse tokens "
                "need; give superres.low_res_position_start=... or use another checkpoint"
            )
        self.config = config
        self.word_embeddings = Embedding(config.vocabulary.size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.num_positions, config.hidden_size)
        self.extra_position_embeddings = nn.Embedding(config.high_res_len, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.recompute: Recompute = "nothing"
        """What the backward pass recomputes instead of storing it."""
        self._visible = visible_keys(config)

    def forward(self, text: Tensor, text_mask: Tensor, low_res: Tensor, high_res: Tensor) -> Tensor:
        """Hidden states of the fine grid after the final LayerNorm: (batch, high_res_len, hidden).

        Shapes: text (batch, text_len) ids, left-padded; text_mask (batch, text_len), False on padding, with at
        least one True per row; low_res (batch, low_res_len) tokens, none for the iterative model; high_res (batch,
        high_res_len) inputs: tokens where they are known, BOI elsewhere.
        """
        config, device = self.config, text.device
        assert text.shape[1] == config.text_len and low_res.shape[1] == config.low_res_len
        if self._visible.grid.keys.device != device:
            self._visible = self._visible.to(device)
        text_positions = text_mask.cumsum(1).sub(1).clamp(min=0)
        coarse_places = torch.arange(config.low_res_len, device=device).expand(len(text), -1)
        coarse_positions = config.low_res_position_start + coarse_places
        positions = self.position_embeddings(torch.cat([text_positions, coarse_positions], dim=1))
        context = self._embed(torch.cat([text, low_res], dim=1), positions)
        grid = self._embed(high_res, self.extra_position_embeddings.weight)

        # All rows attend to real text, coarse rows to all coarse rows too. Padding attends to real text, so that its
        # softmax is defined, but no row attends to padding.
        is_real = F.pad(text_mask, (0, config.low_res_len), value=True)
        allowed = is_real[:, None, :].repeat(1, is_real.shape[1], 1)
        allowed[:, : config.text_len, config.text_len :] = False
        zero = torch.zeros((), dtype=grid.dtype, device=device)
        context_bias = zero.expand(allowed.shape).masked_fill(~allowed, float("-inf")).unsqueeze(1)
        padding_bias = zero.expand(is_real.shape).masked_fill(~is_real, float("-inf"))
        last = len(self.layers) - 1
        recompute = self.recompute if self.training and torch.is_grad_enabled() else "nothing"
        for i, layer in enumerate(self.layers):
            call = layer if not self.training or self._train_layer is None else partial(self._train_layer, layer)
            run = partial(call, visible=self._visible, update_context=i < last, recompute=recompute == "mlp")
            if recompute == "layer":
                run = partial(checkpoint, run, use_reentrant=False)
            context, grid = run(context, grid, context_bias, padding_bias)
        return self.final_layernorm(grid)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of image tokens, float32: (..., hidden) -> (..., num_image_tokens)."""
        return self.word_embeddings.logits(hidden, self.config.vocabulary.num_image_tokens)

    def frame_losses(self, batch: SuperresBatch) -> Tensor:
        """Mean negative log-likelihood of each frame's target tokens: (batch,), float32.

        The mean is per frame, so all rounds have the same weight whatever their number of targets. Logits are computed
        only for target rows, a chunk at a time.
        """
        device = batch.high_res.device
        frames, places = (index.to(device) for index in batch.target_mask.nonzero(as_tuple=True))
        inputs = batch.high_res.masked_fill(batch.target_mask.to(device), self.config.vocabulary.start_of_image)
        hidden = self(batch.text, batch.text_mask, batch.low_res, inputs)[frames, places]
        weight = self.word_embeddings.output_weight(hidden, self.config.vocabulary.num_image_tokens)
        losses = token_nll(hidden, weight, batch.high_res[frames, places])
        counts = batch.target_mask.sum(1).to(device)
        return losses.new_zeros(len(counts)).index_add(0, frames, losses) / counts

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding_dropout(self.word_embeddings(ids).to(positions.dtype) + positions)
