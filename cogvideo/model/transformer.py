"""The dual-channel text-to-video transformer: MLP, layer, trunk split, embeddings, logits and losses.

Whether a model is a text-to-image trunk, stage 1 or stage 2 is decided by its config's layout; the only branch below is
`has_temporal_channel`.
Decoding loops, caches and samplers are in `cogvideo.inference`, optimisation in `cogvideo.training`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvideo.dtypes import QuantizedName
from cogvideo.model.attention import ATTENTION, Attention, ChannelContext
from cogvideo.model.compiled import compile_static
from cogvideo.model.config import ModelConfig, Recompute
from cogvideo.model.inputs import Cache, DecodeInputs, TextBias
from cogvideo.model.loss import token_nll
from cogvideo.model.plan import Plan, PlanType, plan_clip, with_text
from cogvideo.model.quantize import Embedding, Linear
from cogvideo.sequence.batch import Batch, frame_inputs


class MLP(nn.Module):
    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(hidden_size, 4 * hidden_size)
        self.dense_4h_to_h = Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh")))


class TransformerLayer(nn.Module):
    """Sandwich LayerNorm around dual-channel attention and an MLP.

        x <- x + LN3(Attention(LN1(x)))        x <- x + LN4(MLP(LN2(x)))

    Text and frame rows are two tensors: text attends to text alone, so it never depends on frames, and with a frozen
    trunk it needs no gradient at all.
    Source: CogVideo (2205.15868) section 3.2; sandwich LayerNorm from CogView (2105.13290).
    """

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
        spatial: ChannelContext,
        temporal: ChannelContext | None,
        *,
        query_rows: Tensor | None = None,
        update_text: bool = True,
        recompute: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Shapes: text (batch, text_len, hidden) or None; frames (batch, rows, hidden); outputs likewise.

        The last layer skips what is not needed: `query_rows` (query rows,) are the frame rows that have an output
        (None: all), and without `update_text` text is returned unchanged. With `recompute` everything between attention
        and the MLP's output is recomputed in the backward pass instead of being kept.
        """
        text_normed = None if text is None else self.input_layernorm(text)
        frames_normed = self.input_layernorm(frames)
        text_out, frames_out = self.attention(text_normed, frames_normed, spatial, update_text=update_text)
        temporal_out = None
        if temporal is not None:
            _, temporal_out = self.temporal_attention(text_normed, frames_normed, temporal, update_text=False)
        if query_rows is not None:
            frames = frames.index_select(1, query_rows)
        frames = self.add_outputs(frames, frames_out, temporal_out, recompute)
        if text is not None and text_out is not None:
            text = self.add_outputs(text, text_out, recompute=recompute)
        return text, frames

    def add_outputs(
        self, x: Tensor, spatial: Tensor, temporal: Tensor | None = None, recompute: bool = False
    ) -> Tensor:
        """Add the outputs of attention (of two channels: mixed) and of the MLP to the residual stream."""
        through_mlp = partial(checkpoint, self._through_mlp, use_reentrant=False) if recompute else self._through_mlp
        x, mlp_out = through_mlp(x, spatial, temporal)
        return x + self.fourth_layernorm(mlp_out)

    def _through_mlp(self, x: Tensor, spatial: Tensor, temporal: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and the MLP's output for it."""
        attended = spatial if temporal is None else mix_channels(spatial, temporal, self.mix_logit)
        x = x + self.third_layernorm(attended)
        return x, self.mlp(self.post_attention_layernorm(x))


def mix_channels(spatial: Tensor, temporal: Tensor, mix_logit: Tensor) -> Tensor:
    """Blend the two attention channels on frame rows.

    Shapes: spatial, temporal (batch, rows, hidden); mix_logit (hidden,).
    Source: CogVideo (2205.15868) section 3.2, alpha = sigmoid(mix_logit); text rows are not mixed.
    """
    assert spatial.shape == temporal.shape
    return torch.lerp(temporal, spatial, mix_logit.sigmoid().to(spatial.dtype))


RunLayer = Callable[..., Any]
"""Runs a layer, given the layer and the arguments of its `forward`."""


def compile_layer(layer: type[nn.Module], backend: str | Callable[..., object] = "inductor") -> RunLayer:
    """Compile a class of layers: one function for all layers of equal shapes, since their parameters are its inputs."""
    return compile_static(layer.forward, backend)


class TrunkModel(nn.Module):
    """A model built on a text-to-image trunk: the trunk's parameters under the trunk's names, and extra ones."""

    extra_names: ClassVar[tuple[str, ...]]
    """Substrings that only the names of extra parameters have."""
    layers: nn.ModuleList
    _train_layer: RunLayer | None = None
    """Runs a layer in training; None: the layer is called directly."""

    def compile_layers(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Let training run compiled layers, see `compile_layer`. Nothing else is affected."""
        self._train_layer = compile_layer(type(self.layers[0]), backend)

    @classmethod
    def is_extra(cls, parameter_name: str) -> bool:
        """Whether a parameter is not part of the trunk; adapters of the trunk's matrices are not."""
        return any(part in parameter_name for part in (*cls.extra_names, ".lora."))

    def extra_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the model adds to the trunk."""
        return ((name, p) for name, p in self.named_parameters() if self.is_extra(name))

    def trunk_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that a text-to-image trunk has under the same names."""
        return ((name, p) for name, p in self.named_parameters() if not self.is_extra(name))

    def freeze_trunk(self, frozen: bool = True) -> None:
        """Freeze the trunk or make it trainable. Text rows need no gradient while it is frozen, as published."""
        for _, parameter in self.trunk_parameters():
            parameter.requires_grad_(not frozen)

    def quantize_trunk(self, stored: QuantizedName = "int8") -> None:
        """Store the trunk's matrices with a float32 scale per output row; they can no longer be trained."""
        for name, module in self.named_modules():
            if isinstance(module, Linear | Embedding) and not self.is_extra(f"{name}.weight"):
                module.quantize(stored)


class CogVideoTransformer(TrunkModel):
    """Source: CogVideo (2205.15868). docs/concepts/model.md lists the parameters."""

    extra_names = ("extra_position_embeddings.", ".temporal_attention.", ".mix_logit")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = Embedding(config.vocabulary.size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.num_positions, config.hidden_size)
        if config.has_temporal_channel:
            self.extra_position_embeddings = nn.Embedding(config.num_extra_positions, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.recompute: Recompute = "nothing"
        """Which activations the backward pass recomputes instead of keeping them."""
        self.use_attention("sdpa")
        self._clip_plans: dict[tuple[bool, PlanType], Plan] = {}

    def use_attention(self, name: str) -> None:
        """Compute attention with an implementation of `attention.ATTENTION`."""
        self._attention = ATTENTION[name]
        for module in self.modules():
            if isinstance(module, Attention):
                module.implementation = self._attention

    @property
    def is_joined(self) -> bool:
        """Whether passes over many rows are planned over text and frames as one sequence."""
        return self._attention.attend_joined is not None

    def forward(
        self,
        frame_tokens: Tensor,
        plan: Plan,
        text_bias: TextBias,
        *,
        text: Tensor | None = None,
        cache: Cache | None = None,
        layers: Iterable[nn.Module] | None = None,
        run_layer: RunLayer | None = None,
    ) -> Tensor:
        """Hidden states of frame rows after the final LayerNorm.

        Shapes: frame_tokens (batch, rows), the input tokens of `plan.slots`; text (batch, text_len) ids, required
        without a cache and in the first forward pass with one; -> (batch, query rows of the plan, hidden). `logits`
        maps them to scores. With a cache, keys and values of these rows are added to it, and those of earlier passes
        are visible. `layers`: used in place of the model's own, with the same arguments. `run_layer`: from
        `compile_layer`, to run compiled layers.
        """
        assert cache is not None or not plan.needs_cache, "this plan needs a cache: its keys are cache positions"
        frames = self._embed(frame_tokens, self._frame_positions(plan.slots))
        words = None
        if text is not None:
            # counted from the first real token; padding has position 0 and is masked
            positions = (text_bias.spatial > float("-inf")).cumsum(1).sub(1).clamp(min=0)
            words = self._embed(text, self.position_embeddings(positions))
        text_len, final = text_bias.spatial.shape[1], len(self.layers) - 1
        recompute = self.recompute if self.training and torch.is_grad_enabled() else "nothing"
        for i, layer in enumerate(self.layers if layers is None else layers):
            last = plan.last if i == final else None
            spatial, temporal = (last.spatial, last.temporal) if last else (plan.spatial, plan.temporal_at(i))
            spatial_cache = cache.channel(i, "spatial") if cache else None
            temporal_cache = cache.channel(i, "temporal") if cache else None
            in_space = ChannelContext(with_text(spatial, text_len), text_bias.spatial, spatial_cache)
            in_time = None
            if temporal is not None:
                in_time = ChannelContext(with_text(temporal, text_len), text_bias.temporal, temporal_cache)
            run = partial(
                layer if run_layer is None else partial(run_layer, layer),
                spatial=in_space,
                temporal=in_time,
                query_rows=last.query_rows if last else None,
                update_text=text is not None and i < final,
                recompute=recompute == "mlp",
            )
            if recompute == "layer":
                words, frames = checkpoint(run, words, frames, use_reentrant=False)
            else:
                words, frames = run(words, frames)
        return self.final_layernorm(frames)

    def decode(
        self,
        step: DecodeInputs,
        *,
        layers: Iterable[nn.Module] | None = None,
        run_layer: RunLayer | None = None,
        key_blocks: bool = False,
    ) -> Tensor:
        """Logits of image tokens after one decoding step: (batch, rows, num_image_tokens) float32.

        `layers` and `run_layer` as in `forward`. With `key_blocks` FlexAttention reads only the blocks of the cache
        that the rows see.
        """
        plan = step.masks.plan(step.slots)
        if key_blocks:
            channels = step.cache.channel(0, "spatial"), step.cache.channel(0, "temporal")
            num_keys = [0 if channel is None else channel.key.shape[2] for channel in channels]
            plan = plan.with_key_blocks(step.text_bias.spatial.shape[1], *num_keys)
        hidden = self(step.input_tokens(), plan, step.text_bias, cache=step.cache, layers=layers, run_layer=run_layer)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of image tokens, float32: (..., hidden) -> (..., num_image_tokens). Text is never predicted."""
        return self.word_embeddings.logits(hidden, self.config.vocabulary.num_image_tokens)

    def token_losses(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of every supervised token: (batch, supervised frames, frame_len), float32.

        Logits are computed for supervised rows only, a chunk of rows at a time.
        """
        inputs = frame_inputs(batch.frames, self.config.vocabulary.start_of_image)
        plan = self.plan_clip(inputs.device, supervised_only=True)
        run_layer = self._train_layer if self.training else None
        bias = TextBias.from_mask(batch.text_mask)
        hidden = self(inputs, plan, bias, text=batch.text, run_layer=run_layer)
        hidden = rearrange(hidden, "b (f n) h -> b f n h", n=self.config.frame_len)
        labels = torch.stack([batch.frames[:, frame] for frame in self.config.layout.supervised_frames], 1)
        weight = self.word_embeddings.output_weight(hidden, self.config.vocabulary.num_image_tokens)
        return token_nll(hidden.flatten(0, 2), weight, labels.flatten()).view(labels.shape)

    def plan_clip(self, device: torch.device, *, supervised_only: bool = False) -> Plan:
        """The plan of a pass over a whole clip, of the type that this model's attention runs fastest on `device`."""
        plan_type = self._attention.plan_type(device, self.config.attention_dropout if self.training else 0.0)
        key = supervised_only, plan_type
        plan = self._clip_plans.get(key)
        if plan is None or plan.slots.device != device:
            with torch.inference_mode(False):  # also used in training, where indices are saved for backward
                plan = plan_clip(self.config, supervised_only=supervised_only, plan_type=plan_type).to(device)
            self._clip_plans[key] = plan
        return plan

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        words = self.word_embeddings(ids).to(positions.dtype)  # rows of int8 tables are float32
        return self.embedding_dropout(words + positions)

    def _frame_positions(self, slots: Tensor) -> Tensor:
        """Position embeddings (rows, hidden) of slots (rows,): the trunk's table for frame 0, then the extra table."""
        n = self.config.frame_len
        first = self.position_embeddings(slots.clamp(max=n - 1) + self.config.frame_position_start)
        if not self.config.has_temporal_channel:
            return first
        later = self.extra_position_embeddings((slots - n).clamp(min=0))
        return torch.where((slots < n)[:, None], first, later)


def is_temporal(parameter_name: str) -> bool:
    """Whether a parameter is one that CogVideo adds to the trunk: temporal channel, mixing vectors, extra positions."""
    return CogVideoTransformer.is_extra(parameter_name)
