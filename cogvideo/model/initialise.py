"""All initial weights: random ones, and those inherited from a text-to-image trunk.

| parameter                                   | random                  | inherited from a trunk                      |
|---------------------------------------------|-------------------------|---------------------------------------------|
| embeddings, query_key_value, dense_h_to_4h  | N(0, 0.02)              | trunk: copied                               |
| attention.dense, dense_4h_to_h              | N(0, 0.02 / sqrt(2 L))  | trunk: copied                               |
| LayerNorm                                   | weight 1, bias 0        | trunk: copied                               |
| temporal query_key_value                    | N(0, 0.02)              | the trunk's, layer by layer                 |
| temporal dense                              | N(0, 0.02)              | `qkv`: kept; `qkv_and_dense`: the trunk's   |
| extra positions                             | N(0, 0.02)              | the trunk's frame positions, tiled by frame |
| image tokens' embeddings, from codebooks    | `codebook_embeddings`   |                                             |
| mix_logit                                   | the given value         | kept                                        |
| other biases                                | 0                       | as their weights                            |
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cogvideo.model.transformer import CogVideoTransformer, TrunkModel, is_temporal

TemporalInit = Literal["qkv", "qkv_and_dense"]


STD = 0.02
"""Standard deviation of random matrices and embeddings."""
_SKIP_AT_ONCE = 1 << 20
"""Random numbers drawn at a time while skipping them."""


@torch.no_grad()
def initialise(model: TrunkModel, generator: torch.Generator, *, mix_logit: float = 0.0) -> None:
    """Set random weights, drawn in the order of the parameters' names."""
    parameters = dict(model.named_parameters())
    for name, value in draw_parameters(model, generator, mix_logit=mix_logit):
        parameters[name].copy_(value)


def draw_parameters(
    model: TrunkModel, generator: torch.Generator, *, mix_logit: float = 0.0, skip: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, float32 value) of every parameter that is not in `skip`, one at a time, in the order of names.

    The values do not depend on `skip`. Only the parameters' shapes are read, so the model may be on the meta device.
    """
    small = STD / math.sqrt(2 * len(model.layers))
    shapes = sorted((name, p.shape) for name, p in model.named_parameters())
    random_left = sum(_is_random(name) and name not in skip for name, _ in shapes)
    for name, shape in shapes:
        if not _is_random(name):
            if name not in skip:
                one = name.endswith("layernorm.weight")
                yield name, torch.full(shape, mix_logit if name.endswith("mix_logit") else float(one))
        elif name not in skip:
            random_left -= 1
            into_residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) and not is_temporal(name)
            yield name, torch.randn(shape, generator=generator).mul_(small if into_residual else STD)
        elif random_left:
            _skip_normal(shape.numel(), generator)


def codebook_embeddings(codebooks: Sequence[Tensor], hidden_size: int, generator: torch.Generator) -> Tensor:
    """Initial embeddings (codes, hidden_size) of image tokens, similar for similar codes.

    The sum of random projections of the codebooks, each (codes, embedding_dim), with the standard deviation of random
    embeddings. With two codebooks, of small and large frames, a model can still read each: hidden_size is larger.
    """
    rows = []
    for codebook in codebooks:
        codes = (codebook - codebook.mean(0)).float()
        projection = torch.randn(codes.shape[1], hidden_size, generator=generator)
        rows.append(codes @ projection)
    return STD / math.sqrt(len(rows)) * torch.stack([row / row.std() for row in rows]).sum(0)


def _is_random(name: str) -> bool:
    return name.endswith("weight") and "layernorm" not in name


def _skip_normal(count: int, generator: torch.Generator) -> None:
    """Advance the generator as `torch.randn(count)` does, in half the time and without allocating the numbers."""
    if count < 16:
        torch.randn(count, generator=generator)
        return
    # randn draws 32 bits per number, and redraws the last 16 numbers if they do not end on a multiple of 16
    left = count + (16 if count % 16 else 0)
    buffer = torch.empty(min(left, _SKIP_AT_ONCE), dtype=torch.uint8)
    while left:
        part = buffer[: min(left, len(buffer))]
        part.random_(generator=generator)
        left -= len(part)


def trunk_values(model: TrunkModel, trunk: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """A reader for each trunk parameter of the model, from the tensors of a text-to-image trunk (under our names).

    Raises: ValueError naming a tensor that is missing or has another shape.
    """
    parameters = list(model.trunk_parameters())
    for name, p in parameters:
        if name not in trunk:
            raise ValueError(f"the trunk lacks {name}; inherit from a text-to-image checkpoint of the same depth")
        if trunk[name].shape != p.shape:
            raise ValueError(
                f"the trunk's {name} has shape {tuple(trunk[name].shape)}, this model's has {tuple(p.shape)}; "
                "use the same sizes and vocabulary"
            )
    return {name: partial(trunk.__getitem__, name) for name, _ in parameters}


def inherited_values(
    model: CogVideoTransformer, trunk: Mapping[str, Tensor], *, temporal_init: TemporalInit = "qkv_and_dense"
) -> dict[str, Callable[[], Tensor]]:
    """A reader for each parameter that a video model inherits from the tensors of a text-to-image trunk (our names).

    `qkv` is what the published code does; `qkv_and_dense` copies the output layer as well, so that the temporal channel
    starts out as the same function as the spatial one. Raises: ValueError as `trunk_values`.
    """
    config, values = model.config, trunk_values(model, trunk)
    parts = ("query_key_value", "dense") if temporal_init == "qkv_and_dense" else ("query_key_value",)
    for i in range(config.num_layers):
        for part in parts:
            for kind in ("weight", "bias"):
                name = f"layers.{i}.attention.{part}.{kind}"
                values[name.replace(".attention.", ".temporal_attention.")] = values[name]

    def tiled_positions() -> Tensor:
        first = config.frame_position_start
        frame_positions = values["position_embeddings.weight"]()[first : first + config.frame_len]
        return frame_positions.repeat(config.num_frames, 1)

    return values | {"extra_position_embeddings.weight": tiled_positions}


@torch.no_grad()
def inherit_trunk(
    model: CogVideoTransformer, trunk: Mapping[str, Tensor], *, temporal_init: TemporalInit = "qkv_and_dense"
) -> None:
    """Copy what `inherited_values` reads into a model. Raises: ValueError, with the model unchanged."""
    own = dict(model.named_parameters())
    for name, read in inherited_values(model, trunk, temporal_init=temporal_init).items():
        own[name].copy_(read())
