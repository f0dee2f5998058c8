"""Layers for decoding steps on a GPU: with few rows, speed depends on reading the weights fast, in few kernels.

    layers = decode_layers(model)            # once
    model.decode(step, layers=layers)

The queries, keys and values of both channels are one product, and so are both output layers with the mix of channels:
mixed = a * (Ws x + bs) + (1 - a) * (Wt y + bt) = [a Ws | (1 - a) Wt] [x; y] + a bs + (1 - a) bt, folded in float32 and
rounded to the weights' type. Equal to `TransformerLayer` up to that rounding. The model's own projections become views
of the joint one (those of a trunk shared by several models, views of the last one's); the folded output layer is held
in addition to the model's, which prefill uses.
"""

import torch
from torch import Tensor, nn

from cogvideo.model.attention import Attention, ChannelContext
from cogvideo.model.lora import has_adapters
from cogvideo.model.quantize import Linear
from cogvideo.model.transformer import CogVideoTransformer, TransformerLayer, mix_channels


class DecodeLayer(nn.Module):
    """A layer of both channels for text in the cache; other calls are passed to the layer that it is made of."""

    def __init__(self, layer: TransformerLayer) -> None:
        """The layer's own projections become views of the joint one, so that weights are held once."""
        super().__init__()
        self.layer = layer
        channels = layer.attention, layer.temporal_attention
        self.query_key_value = _stack([channel.query_key_value for channel in channels])
        self.dense = _fold_outputs(channels, layer.mix_logit)

    def forward(
        self,
        text: Tensor | None,
        frames: Tensor,
        spatial: ChannelContext,
        temporal: ChannelContext | None,
        *,
        query_rows: Tensor | None = None,
        update_text: bool = False,
        recompute: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Arguments and result as in `TransformerLayer`."""
        layer = self.layer
        if text is not None or temporal is None:
            options = {"query_rows": query_rows, "update_text": update_text, "recompute": recompute}
            return layer(text, frames, spatial, temporal, **options)
        of_space, of_time = self.query_key_value(layer.input_layernorm(frames)).chunk(2, -1)
        in_space = layer.attention.attend_cached(of_space, spatial)
        in_time = layer.temporal_attention.attend_cached(of_time, temporal)
        if self.dense is not None:
            attended = self.dense(torch.cat([in_space, in_time], -1))
        else:
            outputs = layer.attention.dense(in_space), layer.temporal_attention.dense(in_time)
            attended = mix_channels(*outputs, layer.mix_logit)
        return None, layer.add_outputs(frames, attended)


def decode_layers(model: CogVideoTransformer) -> list[nn.Module]:
    """The model's layers for decoding steps; unchanged if there is one channel, weights are offloaded, or any matrix
    has an adapter, which a joint product would leave out."""
    if has_adapters(model):
        return list(model.layers)

    def convert(layer: TransformerLayer) -> nn.Module:
        is_offloaded = any(isinstance(module, Linear) and module.offloaded for module in layer.modules())
        return layer if is_offloaded or not model.config.has_temporal_channel else DecodeLayer(layer)

    return [convert(layer) for layer in model.layers]  # type: ignore[arg-type]


def _stack(linears: list[Linear]) -> Linear:
    """One layer that computes the outputs of all `linears`, whose weights become views of its own."""
    with torch.device("meta"):
        stacked = Linear(linears[0].in_features, sum(linear.out_features for linear in linears))
    stacked.kernel = linears[0].kernel
    for name in ("weight", "bias", "weight_scale"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            continue
        joint = torch.cat([part.detach() for part in parts])
        is_parameter = isinstance(parts[0], nn.Parameter)
        setattr(stacked, name, nn.Parameter(joint, requires_grad=False) if is_parameter else joint)
        for linear, view in zip(linears, joint.split([len(part) for part in parts]), strict=True):
            setattr(linear, name, nn.Parameter(view, requires_grad=False) if is_parameter else view)
    return stacked


def _fold_outputs(channels: tuple[Attention, Attention], mix_logit: Tensor) -> Linear | None:
    """Both output layers and the mix as one layer; None for quantized weights, whose scales the mix would change."""
    spatial, temporal = (channel.dense for channel in channels)
    if spatial.weight_scale is not None or temporal.weight_scale is not None:
        return None
    alpha = mix_logit.detach().float().sigmoid()
    weight = torch.cat([alpha[:, None] * spatial.weight.float(), (1 - alpha[:, None]) * temporal.weight.float()], 1)
    bias = alpha * spatial.bias.float() + (1 - alpha) * temporal.bias.float()
    with torch.device("meta"):
        folded = Linear(2 * spatial.in_features, spatial.out_features)
    folded.kernel = spatial.kernel
    folded.weight = nn.Parameter(weight.detach().to(spatial.weight.dtype), requires_grad=False)
    folded.bias = nn.Parameter(bias.detach().to(spatial.bias.dtype), requires_grad=False)
    return folded
