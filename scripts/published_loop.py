"""A stand-in for the published decoding loop, to time against ours on the same machine: the same work, other code.

One token per forward pass; a cache that torch.cat copies in every layer; a dense mask over all of it in both channels;
a guide as a second row; the cluster sampler by full softmax and sort. Logits are computed for image tokens only, as the
published speed implies.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.model.attention import Attention
from cogvideo.model.transformer import CogVideoTransformer, mix_channels


def _attend(channel: Attention, x: Tensor, cached: Tensor) -> Tensor:
    projected = F.linear(x, channel.query_key_value.weight, channel.query_key_value.bias)
    query, fresh = projected.split([x.shape[-1], 2 * x.shape[-1]], dim=-1)
    keys, values = torch.cat([cached, fresh], dim=1).chunk(2, dim=-1)

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (channel.num_heads, -1)).transpose(1, 2).contiguous()

    mask = torch.ones(1, 1, 1, keys.shape[1])
    scores = heads(query) / x.shape[-1] ** 0.5 @ heads(keys).transpose(-1, -2)
    weights = (scores * mask - 10000.0 * (1.0 - mask)).softmax(-1)
    context = (weights @ heads(values)).transpose(1, 2).flatten(2)
    return F.linear(context, channel.dense.weight, channel.dense.bias)


@torch.inference_mode()
def step_seconds(model: CogVideoTransformer, rows: int, cached: int, *, temporal: bool, repeats: int = 4) -> float:
    """Median time of a step on a batch of `rows` (guides included) with `cached` slots in the cache."""
    hidden, codes = model.config.hidden_size, model.config.vocabulary.num_image_tokens
    # one per layer and channel: a shared one would stay in the processor's cache
    caches = [torch.randn(2 if temporal else 1, rows, cached, 2 * hidden) for _ in model.layers]
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        x = model.word_embeddings(torch.zeros(rows, 1, dtype=torch.int64)) + model.position_embeddings.weight[0]
        for layer, of_layer in zip(model.layers, caches, strict=True):
            normed = layer.input_layernorm(x)
            out = _attend(layer.attention, normed, of_layer[0])
            if temporal:
                out = mix_channels(out, _attend(layer.temporal_attention, normed, of_layer[1]), layer.mix_logit)
            x = x + layer.third_layernorm(out)
            up, down = layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h
            inner = F.gelu(F.linear(layer.post_attention_layernorm(x), up.weight, up.bias), approximate="tanh")
            x = x + layer.fourth_layernorm(F.linear(inner, down.weight, down.bias))
        logits = F.linear(model.final_layernorm(x), model.word_embeddings.weight[:codes]).float()[:, -1]
        clusters = torch.zeros(rows, 500).index_add_(1, torch.arange(codes) % 500, logits.softmax(-1))
        torch.multinomial(clusters, 1)
        torch.multinomial(logits.softmax(-1).sort(descending=True).values, 1)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
