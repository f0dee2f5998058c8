"""The training step of the first CogVideo trainers, as a baseline: everything dense, nothing skipped.

Text and frames are one sequence. Each channel computes (rows x rows) scores for every head, with an additive mask and
the softmax that kept fp16 in range ("PB-relax"); text rows go through the temporal channel too. Logits are computed for
the whole vocabulary at all rows, and float32 losses for all rows, before a loss mask is applied. It uses our model's
parameters and gives the same loss. Written for scripts/bench_train.py from the paper's description alone.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.model.attention import Attention
from cogvideo.model.masks import channel_masks
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import Batch, frame_inputs

PB_RELAX = 16.0
HIDDEN_SCORE = -1e4


class DenseStep:
    """Computes the mean loss of supervised tokens of a batch without padding."""

    def __init__(self, model: CogVideoTransformer) -> None:
        self.model, config = model, model.config
        layout = config.layout
        spatial, temporal = channel_masks(layout, config.window_size)
        slots = np.arange(layout.num_slots)

        def additive(allowed: np.ndarray) -> Tensor:
            whole = torch.zeros(config.text_len + len(slots), config.text_len + len(slots), dtype=torch.bool)
            whole[:, : config.text_len] = True
            whole[config.text_len :, config.text_len :] = torch.from_numpy(allowed)
            return torch.zeros(whole.shape).masked_fill_(~whole, HIDDEN_SCORE / PB_RELAX)

        self.spatial = additive(spatial.allowed(slots[:, None], slots[None]))
        self.temporal = [additive(mask.allowed(slots[:, None], slots[None])) for mask in temporal]
        supervised = torch.zeros(layout.num_frames, layout.frame_len)
        supervised[list(layout.supervised_frames)] = 1.0
        self.loss_mask = torch.cat([torch.zeros(config.text_len), supervised.flatten()])

    def __call__(self, batch: Batch) -> Tensor:
        model, config = self.model, self.model.config
        words = config.text_len
        assert batch.text.shape[1] == words, "text must fill its rows"
        tokens = torch.cat([batch.text, frame_inputs(batch.frames, config.vocabulary.start_of_image)], dim=1)
        first = config.frame_position_start
        positions = torch.cat(
            [
                model.position_embeddings.weight[:words],
                model.position_embeddings.weight[first : first + config.frame_len],
                model.extra_position_embeddings.weight[: config.layout.num_slots - config.frame_len],
            ]
        )
        x = model.word_embeddings(tokens) + positions
        for i, layer in enumerate(model.layers):
            normed = layer.input_layernorm(x)
            out = attend(layer.attention, normed, self.spatial)
            plus = attend(layer.temporal_attention, normed, self.temporal[i % len(self.temporal)])
            alpha = layer.mix_logit.sigmoid()
            out = torch.cat([out[:, :words], alpha * out[:, words:] + (1 - alpha) * plus[:, words:]], dim=1)
            x = x + layer.third_layernorm(out)
            x = x + layer.fourth_layernorm(layer.mlp(layer.post_attention_layernorm(x)))
        logits = F.linear(model.final_layernorm(x), model.word_embeddings.weight)
        logits = logits[..., : config.vocabulary.num_image_tokens].float()
        labels = torch.cat([torch.zeros_like(batch.text), batch.frames.flatten(1)], dim=1)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return (losses * self.loss_mask).sum() / (self.loss_mask.sum() * len(losses))


def attend(attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
    """(batch, rows, hidden) -> the same; mask (rows, rows), added."""
    q, k, v = (
        part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for part in attention.query_key_value(x).chunk(3, dim=2)
    )
    scores = (q / (math.sqrt(q.shape[-1]) * PB_RELAX)) @ k.transpose(-1, -2) + mask
    scores = (scores - scores.detach().amax(-1, keepdim=True)) * PB_RELAX
    context = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return attention.dense(context.transpose(1, 2).flatten(2))
