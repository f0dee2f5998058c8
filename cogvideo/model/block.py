"""One transformer layer: sandwich LayerNorm around dual-channel attention and an MLP.

    x <- x + LN3(Attention(LN1(x)))        x <- x + LN4(MLP(LN2(x)))

Text and frame rows go through as two tensors: text sees text alone, so what it computes never depends on frames,
and with a frozen trunk it needs no gradient at all.
Source: CogVideo (2205.15868) section 3.2; sandwich LayerNorm from CogView (2105.13290).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvideo.inference.cache import LayerCache
from cogvideo.model.attention import Attention
from cogvideo.model.config import ModelConfig
from cogvideo.model.plan import ChannelPlan
from cogvideo.model.quantize import Linear


class MLP(nn.Module):
    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(hidden_size, 4 * hidden_size)
        self.dense_4h_to_h = Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh")))


class TransformerLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.input_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.attention = Attention(h, config.num_heads, config.attention_dropout)
        self.third_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.post_attention_layernorm = nn.LayerNorm(h, eps=1e-5)
        self.mlp = MLP(h, config.dropout)
        self.fourth_layernorm = nn.LayerNorm(h, eps=1e-5)
        if config.has_temporal_channel:
            self.temporal_attention = Attention(h, config.num_heads, config.attention_dropout)
            self.mix_logit = nn.Parameter(torch.zeros(h))

    def forward(
        self,
        text: Tensor | None,
        frames: Tensor,
        *,
        spatial: ChannelPlan,
        temporal: ChannelPlan | None,
        spatial_text_bias: Tensor,
        temporal_text_bias: Tensor,
        cache: LayerCache | None = None,
        answered: Tensor | None = None,
        answer_text: bool = True,
        recompute: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Shapes: text (batch, text_len, hidden) or None; frames (batch, rows, hidden); both come back alike.

        The last layer may skip what nobody reads: `answered` (rows,) are the frame rows that the channel plans answer
        and that come back (None: all); `answer_text=False` leaves text rows out. With `recompute` nothing of what lies
        between attention and the MLP's output is kept for the backward pass, which computes it anew.
        """
        text_normed = None if text is None else self.input_layernorm(text)
        frames_normed = self.input_layernorm(frames)
        text_out, frame_out = self.attention(
            text_normed,
            frames_normed,
            plan=spatial,
            text_bias=spatial_text_bias,
            cache=cache.spatial if cache else None,
            answer_text=answer_text,
        )
        temporal_out = None
        if temporal is not None:
            _, temporal_out = self.temporal_attention(
                text_normed,
                frames_normed,
                plan=temporal,
                text_bias=temporal_text_bias,
                cache=cache.temporal if cache else None,
                answer_text=False,
            )
        if answered is not None:
            frames = frames.index_select(1, answered)
        frames = self._after_attention(frames, frame_out, temporal_out, recompute)
        if text is not None and text_out is not None:
            text = self._after_attention(text, text_out, None, recompute)
        return text, frames

    def _after_attention(self, x: Tensor, spatial: Tensor, temporal: Tensor | None, recompute: bool) -> Tensor:
        through = partial(checkpoint, self._through_mlp, use_reentrant=False) if recompute else self._through_mlp
        x, made = through(x, spatial, temporal)
        return x + self.fourth_layernorm(made)

    def _through_mlp(self, x: Tensor, spatial: Tensor, temporal: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and what the MLP makes of it."""
        attended = spatial if temporal is None else mix_channels(spatial, temporal, self.mix_logit)
        x = x + self.third_layernorm(attended)
        return x, self.mlp(self.post_attention_layernorm(x))


def mix_channels(spatial: Tensor, temporal: Tensor, mix_logit: Tensor) -> Tensor:
    """Blend the two attention channels on frame rows.

    Shapes: spatial, temporal (batch, rows, hidden); mix_logit (hidden,).
    Source: CogVideo (2205.15868) section 3.2, alpha = sigmoid(mix_logit); text rows never pass here.
    """
    assert spatial.shape == temporal.shape
    return torch.lerp(temporal, spatial, mix_logit.sigmoid().to(spatial.dtype))
