"""The super-resolution transformers. Both have two sorts of rows:

    context    text, and in the direct model the coarse grid: read by the trunk's attention as in a picture
    fine grid  one row a token to be drawn; slot j predicts token j, nothing is shifted. A row sees its neighbours
               within 9 rows by 5 columns, and of the context: in the direct model the 5 x 5 coarse tokens around it,
               in the iterative one all text

Context rows never see the fine grid. In the direct model the fine grid has projections of its own and all its inputs
are BOI: all its tokens are drawn at once. In the iterative one known places carry their tokens, and BOI asks.
Source: CogView2 (2204.14217), section 3; `SuperresConfig` tells the two apart, and `sight` says what is seen.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvideo.model.block import MLP
from cogvideo.model.config import Recompute
from cogvideo.model.loss import token_nll
from cogvideo.model.quantize import Embedding, Linear
from cogvideo.model.trunk import OnTrunk
from cogvideo.superres.batch import SuperresBatch
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import Tiles, all_of, attend_near, near

LOCAL, CROSS = (9, 5), (5, 5)
"""Rows and columns of a neighbourhood on the fine grid, and on the coarse one."""


class Heads(NamedTuple):
    """Queries, keys and values, each (batch, heads, rows, head_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Sight:
    """What rows of the fine grid see."""

    context: Tiles
    own: Tiles

    def to(self, device: torch.device) -> "Sight":
        return Sight(self.context.to(device), self.own.to(device))


def sight(config: SuperresConfig) -> Sight:
    """What a config's rows of the fine grid see."""
    side = config.high_res_side
    own = near(side, side, *LOCAL)
    if config.method == "direct":
        return Sight(near(side, config.low_res_side, *CROSS, first_key=config.text_len), own)
    return Sight(all_of(own, config.text_len), own)


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
        sight: Sight,
        *,
        answer_context: bool = True,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Shapes: context (batch, context rows, hidden), grid (batch, grid rows, hidden), and back alike;
        context_bias (batch, 1, context rows, context rows); padding_bias (batch, context rows), -inf on padding.

        In the last layer nobody reads the context's rows: without `answer_context` they come back as they are. With
        `recompute` what lies behind attention is not kept for the backward pass.
        """
        p_context, p_grid = (self._context_dropout, self._grid_dropout) if self.training else (0.0, 0.0)
        of_grid = self.high_res_attention if hasattr(self, "high_res_attention") else self.attention
        around = self.attention.heads(self.input_layernorm(context))
        own = of_grid.heads(self.input_layernorm(grid))
        after = partial(checkpoint, self._after_attention, use_reentrant=False) if recompute else self._after_attention
        if answer_context:
            seen = F.scaled_dot_product_attention(*around, context_bias, p_context)
            context = after(context, self.attention.dense(rearrange(seen, "b h s d -> b s (h d)")))
        sources = (around.key, around.value, sight.context, padding_bias), (own.key, own.value, sight.own, None)
        grid = after(grid, of_grid.dense(attend_near(own.query, sources, p_grid)))
        return context, grid

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.third_layernorm(attended)
        return x + self.fourth_layernorm(self.mlp(self.post_attention_layernorm(x)))


class SuperresTransformer(OnTrunk):
    """A trunk's parameters under a trunk's names, positions of the fine grid, and the direct model's projections."""

    added = ("extra_position_embeddings.", ".high_res_attention.")

    def __init__(self, config: SuperresConfig) -> None:
        super().__init__()
        needed = max(config.text_len, config.low_res_position_start + config.low_res_len if config.low_res_len else 0)
        if needed > config.num_positions:
            raise ValueError(
                f"superres.num_positions={config.num_positions} is less than the {needed} that text and coarse tokens "
                "have; give superres.low_res_position_start=... or use another checkpoint"
            )
        self.config = config
        self.word_embeddings = Embedding(config.vocabulary.size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.num_positions, config.hidden_size)
        self.extra_position_embeddings = nn.Embedding(config.high_res_len, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.recompute: Recompute = "nothing"
        """What the backward pass computes anew instead of keeping it."""
        self._sight = sight(config)

    def forward(self, text: Tensor, text_mask: Tensor, low_res: Tensor, high_res: Tensor) -> Tensor:
        """Hidden states of the fine grid after the final LayerNorm: (batch, high_res_len, hidden).

        Shapes: text (batch, text_len) ids, left-padded; text_mask (batch, text_len), False on padding, at least one
        True a row; low_res (batch, low_res_len) tokens, none for the iterative model; high_res (batch, high_res_len)
        inputs: tokens where they are known, BOI elsewhere.
        """
        config, device = self.config, text.device
        assert text.shape[1] == config.text_len and low_res.shape[1] == config.low_res_len
        if self._sight.own.keys.device != device:
            self._sight = self._sight.to(device)
        words = text_mask.cumsum(1).sub(1).clamp(min=0)
        coarse = config.low_res_position_start + torch.arange(config.low_res_len, device=device).expand(len(text), -1)
        positions = self.position_embeddings(torch.cat([words, coarse], dim=1))
        context = self._words(torch.cat([text, low_res], dim=1), positions)
        grid = self._words(high_res, self.extra_position_embeddings.weight)

        # what is seen: real text by all, the coarse grid by itself; a padded row sees real text, and nobody sees it
        present = F.pad(text_mask, (0, config.low_res_len), value=True)
        seen = present[:, None, :].repeat(1, present.shape[1], 1)
        seen[:, : config.text_len, config.text_len :] = False
        nothing = torch.zeros((), dtype=grid.dtype, device=device)
        context_bias = nothing.expand(seen.shape).masked_fill(~seen, float("-inf")).unsqueeze(1)
        padding_bias = nothing.expand(present.shape).masked_fill(~present, float("-inf"))
        final = len(self.layers) - 1
        recompute = self.recompute if self.training and torch.is_grad_enabled() else "nothing"
        for i, layer in enumerate(self.layers):
            run = partial(layer, sight=self._sight, answer_context=i < final, recompute=recompute == "mlp")
            if recompute == "layer":
                run = partial(checkpoint, run, use_reentrant=False)
            context, grid = run(context, grid, context_bias, padding_bias)
        return self.final_layernorm(grid)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of image tokens, float32: (..., hidden) -> (..., num_image_tokens)."""
        return self.word_embeddings.scores(hidden, self.config.vocabulary.num_image_tokens)

    def frame_losses(self, batch: SuperresBatch) -> Tensor:
        """Mean negative log-likelihood of the tokens that each frame is asked for: (batch,), float32.

        A mean a frame, whatever number a round asks for: so all rounds weigh the same. Logits exist for rows that are
        asked for only, a chunk of them at a time.
        """
        inputs = batch.high_res.masked_fill(batch.asked, self.config.vocabulary.start_of_image)
        hidden = self(batch.text, batch.text_mask, batch.low_res, inputs)[batch.asked]
        weight = self.word_embeddings.output_weight(hidden, self.config.vocabulary.num_image_tokens)
        losses = token_nll(hidden, weight, batch.high_res[batch.asked])
        frames = batch.asked.nonzero()[:, 0]
        return losses.new_zeros(len(batch.asked)).index_add(0, frames, losses) / batch.asked.sum(1)

    def _words(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding_dropout(self.word_embeddings(ids).to(positions.dtype) + positions)
