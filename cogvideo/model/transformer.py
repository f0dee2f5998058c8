"""The dual-channel text-to-video transformer: embeddings, layers, logits and loss, for training and decoding alike.

What makes it a text-to-image trunk, stage 1 or stage 2 is its config's layout; nothing below asks. Decoding loops,
guidance and samplers live in `cogvideo.sampling`; optimisation in `cogvideo.training`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvideo.inference.cache import KVCache
from cogvideo.kernels.decode_cpu import decode_step, serves
from cogvideo.kernels.graphs import DecodeOne, replayed
from cogvideo.model.block import TransformerLayer
from cogvideo.model.config import ModelConfig, Recompute
from cogvideo.model.loss import token_nll
from cogvideo.model.plan import Plan, plan_training
from cogvideo.model.quantize import Embedding
from cogvideo.model.sight import Sights
from cogvideo.model.trunk import OnTrunk
from cogvideo.sequence.batch import Batch, frame_inputs


class TextBias(NamedTuple):
    """Added to the scores of text keys, -inf on padding; (batch, text_len) a channel."""

    spatial: Tensor
    temporal: Tensor

    @classmethod
    def of(
        cls, text_mask: Tensor, spatial_bonus: float | Tensor = 0.0, temporal_bonus: float | Tensor = 0.0
    ) -> "TextBias":
        """From a mask (batch, text_len), False on padding.

        The bonuses are sampling's "attention upweighting", one for all or (batch, 1); training has none.
        """
        padding = ~text_mask

        def biased(bonus: float | Tensor) -> Tensor:
            return (torch.zeros(text_mask.shape, device=text_mask.device) + bonus).masked_fill_(padding, float("-inf"))

        return cls(biased(spatial_bonus), biased(temporal_bonus))


class Step(NamedTuple):
    """A forward of a few slots of a batch of clips whose text is in the cache."""

    inputs: Tensor
    """(batch, rows) token ids."""
    slots: Tensor
    """(rows,)."""
    sights: Sights
    text_bias: TextBias
    cache: KVCache


class CogVideoTransformer(OnTrunk):
    """Source: CogVideo (2205.15868). docs/architecture.md lists the parameters; the trunk is all but the temporal."""

    added = ("extra_position_embeddings.", ".temporal_attention.", ".mix_logit")

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
        """What the backward pass computes anew instead of keeping it."""
        self._compiled: DecodeOne | None = None
        self._training_plan = plan_training(config)

    def forward(
        self,
        frame_tokens: Tensor,
        plan: Plan,
        text_bias: TextBias,
        *,
        text: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states of frame rows after the final LayerNorm.

        Shapes: frame_tokens (batch, rows), the inputs of plan.slots; text (batch, text_len) ids, given once: in
        training, or in the first forward on a cache; -> (batch, rows that the plan answers, hidden). `logits` turns
        them into scores.
        With a cache, keys and values of these rows are added to it, and those of earlier forwards are seen.
        """
        assert cache is not None or not plan.needs_cache, "this plan's rows find their keys in a cache only"
        frames = self._embedded(frame_tokens, self._frame_positions(plan.slots))
        words = None
        if text is not None:
            # counted from the first real token; padding takes position 0 and is masked
            positions = (text_bias.spatial > float("-inf")).cumsum(1).sub(1).clamp(min=0)
            words = self._embedded(text, self.position_embeddings(positions))
        final = len(self.layers) - 1
        recompute = self.recompute if self.training and torch.is_grad_enabled() else "nothing"
        for i, layer in enumerate(self.layers):
            last = plan.last if i == final else None
            run = partial(
                layer,
                spatial=last.spatial if last else plan.spatial,
                temporal=last.temporal if last else plan.temporal_of(i),
                spatial_text_bias=text_bias.spatial,
                temporal_text_bias=text_bias.temporal,
                cache=cache.layers[i] if cache else None,
                answered=last.answered if last else None,
                answer_text=i < final,
                recompute=recompute == "mlp",
            )
            if recompute == "layer":
                words, frames = checkpoint(run, words, frames, use_reentrant=False)
            else:
                words, frames = run(words, frames)
        return self.final_layernorm(frames)

    def decode(self, steps: Sequence[Step]) -> list[Tensor]:
        """Scores of image tokens after steps of several batches: (batch, rows, num_image_tokens) float32 of each.

        A CPU reads the weights once for all. In what is drawn they do not matter to each other.
        """
        if serves(self, steps):
            return decode_step(self, steps)
        if self._compiled is None:
            return [self.decode_by_modules(*step) for step in steps]
        return [replayed(self._compiled, step) for step in steps]

    def compile_decoding(self) -> None:
        """On a GPU: steps are compiled when they first come, and replayed as CUDA graphs."""
        self._compiled = torch.compile(self.decode_by_modules)

    def decode_by_modules(
        self, inputs: Tensor, slots: Tensor, sights: Sights, text_bias: TextBias, cache: KVCache
    ) -> Tensor:
        """`decode` of one `Step`, by `forward`: the reference, and what a GPU runs."""
        return self.logits(self(inputs, sights.plan(slots), text_bias, cache=cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of image tokens, float32: (..., hidden) -> (..., num_image_tokens). Text is never predicted."""
        return self.word_embeddings.scores(hidden, self.config.vocabulary.num_image_tokens)

    def token_losses(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of every supervised token: (batch, supervised frames, frame_len), float32.

        Logits exist for supervised rows only, a chunk of rows at a time.
        """
        inputs = frame_inputs(batch.frames, self.config.vocabulary.start_of_image)
        hidden = self(inputs, self._plan_on(inputs.device), TextBias.of(batch.text_mask), text=batch.text)
        hidden = rearrange(hidden, "b (f n) h -> b f n h", n=self.config.frame_len)
        labels = batch.frames[:, list(self.config.layout.supervised_frames)]
        weight = self.word_embeddings.output_weight(hidden, self.config.vocabulary.num_image_tokens)
        return token_nll(hidden.flatten(0, 2), weight, labels.flatten()).view(labels.shape)

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        words = self.word_embeddings(ids).to(positions.dtype)  # int8 rows come out in float32
        return self.embedding_dropout(words + positions)

    def _frame_positions(self, slots: Tensor) -> Tensor:
        """Slots of frame 0 read the trunk's table, later ones the extra table: (rows,) -> (rows, hidden)."""
        n = self.config.frame_len
        first = self.position_embeddings(slots.clamp(max=n - 1) + self.config.frame_position_start)
        if not self.config.has_temporal_channel:
            return first
        later = self.extra_position_embeddings((slots - n).clamp(min=0))
        return torch.where((slots < n)[:, None], first, later)

    def _plan_on(self, device: torch.device) -> Plan:
        if self._training_plan.slots.device != device:
            self._training_plan = self._training_plan.to(device)
        return self._training_plan


def is_temporal(parameter_name: str) -> bool:
    """Whether a parameter belongs to what CogVideo adds to the trunk: the temporal channel, its mixing vectors and the
    extra positions."""
    return CogVideoTransformer.is_added(parameter_name)
