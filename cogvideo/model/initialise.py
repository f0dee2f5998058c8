"""Initial weights, all set here: random ones, and those inherited from a text-to-image trunk.

| parameter                                   | random                  | inherited from a trunk                      |
|---------------------------------------------|-------------------------|---------------------------------------------|
| embeddings, query_key_value, dense_h_to_4h  | N(0, 0.02)              | trunk: copied                               |
| attention.dense, dense_4h_to_h              | N(0, 0.02 / sqrt(2 L))  | trunk: copied                               |
| LayerNorm                                   | weight 1, bias 0        | trunk: copied                               |
| temporal query_key_value                    | N(0, 0.02)              | the trunk's, layer by layer                 |
| temporal dense                              | N(0, 0.02)              | `qkv`: kept; `qkv_and_dense`: the trunk's   |
| extra positions                             | N(0, 0.02)              | the trunk's frame positions, tiled by frame |
| mix_logit                                   | the given value         | kept                                        |
| other biases                                | 0                       | as their weights                            |
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cogvideo.model.transformer import CogVideoTransformer, TrunkModel, is_temporal

TemporalInit = Literal["qkv", "qkv_and_dense"]


@torch.no_grad()
def initialise(model: TrunkModel, generator: torch.Generator, *, mix_logit: float = 0.0) -> None:
    """Set random weights, drawn in the order of the parameters' names."""
    small = 0.02 / math.sqrt(2 * len(model.layers))
    for name, p in sorted(model.named_parameters()):
        if name.endswith("mix_logit"):
            p.fill_(mix_logit)
        elif "layernorm" in name:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            p.zero_()
        else:
            into_residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) and not is_temporal(name)
            p.copy_(torch.randn(p.shape, generator=generator) * (small if into_residual else 0.02))


@torch.no_grad()
def copy_trunk(model: TrunkModel, trunk: Mapping[str, Tensor]) -> None:
    """Copy a text-to-image trunk's tensors (our names) into a model that has them; others are ignored.

    Raises: ValueError naming a tensor that is missing or of another shape; the model is unchanged then.
    """
    parameters = list(model.trunk_parameters())
    for name, p in parameters:
        if name not in trunk:
            raise ValueError(f"the trunk lacks {name}; inherit from a text-to-image checkpoint of the same depth")
        if trunk[name].shape != p.shape:
            raise ValueError(
                f"the trunk's {name} has shape {tuple(trunk[name].shape)}, this model's has {tuple(p.shape)}; "
                "use equal sizes and vocabularies"
            )
    for name, p in parameters:
        p.copy_(trunk[name])


@torch.no_grad()
def inherit_trunk(
    model: CogVideoTransformer, trunk: Mapping[str, Tensor], *, temporal_init: TemporalInit = "qkv_and_dense"
) -> None:
    """Start a video model from a text-to-image trunk's tensors (our names).

    `qkv` is what the published code does; `qkv_and_dense` copies the output layer as well, so that the temporal channel
    starts as the same function as the spatial one. Raises: ValueError as `copy_trunk`.
    """
    config = model.config
    copy_trunk(model, trunk)
    own = dict(model.named_parameters())
    parts = ("query_key_value", "dense") if temporal_init == "qkv_and_dense" else ("query_key_value",)
    for i in range(config.num_layers):
        for part in parts:
            for kind in ("weight", "bias"):
                own[f"layers.{i}.temporal_attention.{part}.{kind}"].copy_(own[f"layers.{i}.attention.{part}.{kind}"])
    first = config.frame_position_start
    frame_positions = own["position_embeddings.weight"][first : first + config.frame_len]
    own["extra_position_embeddings.weight"].copy_(frame_positions.repeat(config.num_frames, 1))
