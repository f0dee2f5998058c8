"""The transformer in one slow page: float64, dense masks, no cache, no blocks. It takes a state dict in our names.

It follows the paper's description and the published numbers, not the package's code, and shares nothing with it but
the configuration.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.model.config import ModelConfig
from tests.reference.masks import spatial_mask, temporal_mask


def forward(
    weights: dict[str, Tensor], config: ModelConfig, text: Tensor, text_mask: Tensor, frames: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Logits of every frame slot (batch, slots, image tokens), and the hidden rows [text, frames] after each layer."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    num_frames = 1 if config.task == "image" else config.num_frames
    task = "sequential" if config.task == "image" else config.task
    side, n, words = config.frame_side, config.frame_side**2, text.shape[1]

    tokens = [text]
    for f in range(num_frames):
        tokens += [torch.full_like(text[:, :1], config.vocabulary.start_of_image), frames[:, f, :-1]]
    positions = [(text_mask.long().cumsum(1) - 1).clamp(min=0)]
    positions += [(config.frame_position_start + torch.arange(num_frames * n)).expand(len(text), -1)]
    table = w["position_embeddings.weight"][: config.frame_position_start + n]
    if config.has_temporal_channel:
        table = torch.cat([table, w["extra_position_embeddings.weight"]])
    x = w["word_embeddings.weight"][torch.cat(tokens, 1)] + table[torch.cat(positions, 1)]

    def linear(z: Tensor, name: str) -> Tensor:
        return F.linear(z, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(z: Tensor, name: str) -> Tensor:
        return F.layer_norm(z, (config.hidden_size,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def attend(z: Tensor, name: str, allowed: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
            for part in linear(z, f"{name}.query_key_value").chunk(3, -1)
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)).masked_fill(~allowed, float("-inf"))
        return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.dense")

    def with_text(frame_mask: Tensor) -> Tensor:
        """(batch, 1, rows, rows): text sees real text, frames see real text and what `frame_mask` lets them."""
        allowed = torch.zeros(len(text), words + num_frames * n, words + num_frames * n, dtype=torch.bool)
        allowed[:, :, :words] = text_mask[:, None, :]
        allowed[:, words:, words:] = frame_mask
        return allowed[:, None]

    spatial = with_text(torch.from_numpy(spatial_mask(task, num_frames, side)))
    after = []
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        z = norm(x, f"{layer}.input_layernorm")
        out = attend(z, f"{layer}.attention", spatial)
        if config.has_temporal_channel:
            shift = (config.window_size or 0) // 2 if i % 2 else 0
            mask = torch.from_numpy(temporal_mask(task, num_frames, side, config.window_size, shift))
            plus = attend(z, f"{layer}.temporal_attention", with_text(mask))
            alpha = w[f"{layer}.mix_logit"].sigmoid()
            mixed = alpha * out[:, words:] + (1 - alpha) * plus[:, words:]
            out = torch.cat([out[:, :words], mixed], 1)
        x = x + norm(out, f"{layer}.third_layernorm")
        z = F.gelu(
            linear(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.dense_h_to_4h"), approximate="tanh"
        )
        x = x + norm(linear(z, f"{layer}.mlp.dense_4h_to_h"), f"{layer}.fourth_layernorm")
        after.append(x)
    frame_rows = norm(x, "final_layernorm")[:, words:]
    return frame_rows @ w["word_embeddings.weight"][: config.vocabulary.num_image_tokens].T, after
