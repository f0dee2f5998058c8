"""A decoding step in one call on a CPU, from tokens to logits; equal to the model's own up to float rounding.

A step of a small batch takes milliseconds, and the overhead of separate operations would be most of that. Several
steps, each with its own cache and text, run together, so that the weights are read once for all of them. The arithmetic
is in cpu.cpp; this module turns modules, caches and decode masks into its structures.
"""

import ctypes
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from cogvideo.kernels import cpu
from cogvideo.kernels.cpu import DTYPES, Channel, KeyTable, KVBuffer, Layer, Matrix, Model, Norm, StepGroup
from cogvideo.model.attention import Attention
from cogvideo.model.inputs import Cache, ChannelCache, DecodeInputs
from cogvideo.model.lora import has_adapters
from cogvideo.model.plan import DecodeMasks, VisibleKeys
from cogvideo.model.quantize import Linear
from cogvideo.model.transformer import CogVideoTransformer, TransformerLayer

MAX_ROWS = 256
"""Most rows of all steps together; above this, PyTorch's GEMM is faster."""


class NativeHandle:
    """A model and a cache as C structures. It keeps the model's tensors alive, but not the cache's."""

    def __init__(self, model: CogVideoTransformer, cache: Cache) -> None:
        self._tensors: list[Tensor | None] = []
        config = model.config
        layers = [self._layer(layer) for layer in model.layers]  # type: ignore[arg-type]
        self._layers = (Layer * len(layers))(*layers)
        table, positions = model.word_embeddings, model.position_embeddings.weight
        token_table = self._matrix(table.weight, None, table.weight_scale)
        token_table.out_features = config.vocabulary.num_image_tokens
        self.model = Model(
            ctypes.addressof(self._layers),
            *(len(layers), config.num_heads, config.head_dim),
            token_table,
            len(table.weight),
            self._address(positions[config.frame_position_start :]),
            self._address(model.extra_position_embeddings.weight) if config.has_temporal_channel else None,
            config.frame_len,
            self._norm(model.final_layernorm),
        )
        channels = [(cache.channel(i, "spatial"), cache.channel(i, "temporal")) for i in range(len(layers))]
        buffers = [_buffer(channel) for pair in channels for channel in pair]
        self._buffers = (KVBuffer * len(buffers))(*buffers)
        spatial = channels[0][0]
        assert spatial is not None
        self._batch, self._text_len, self._cache_dtype = len(spatial.key), spatial.text_len, DTYPES[spatial.key.dtype]
        self._tables: tuple[DecodeMasks, ctypes.Array[KeyTable]] | None = None
        self._step_tokens: Tensor | None = None
        """Input tokens of the last step, kept alive here because they may have been created for it."""

    def group(self, step: DecodeInputs) -> StepGroup:
        """A step on this handle's cache. The structure points into the step and into this handle."""
        if self._tables is None or self._tables[0] is not step.masks:
            channels = (step.masks.spatial, *step.masks.temporal)
            self._tables = step.masks, (KeyTable * len(channels))(*map(_key_table, channels))
        tokens = self._step_tokens = step.input_tokens()
        inputs = (tokens, step.slots, *step.text_bias)
        dtypes = [tensor.dtype for tensor in inputs if tensor.is_contiguous()]
        assert dtypes == [torch.int64, torch.int64, torch.float32, torch.float32], "kernels read contiguous arrays"
        assert tokens.shape == step.shape == (self._batch, len(step.slots))
        assert all(bias.shape == (self._batch, self._text_len) for bias in step.text_bias)
        return StepGroup(
            ctypes.addressof(self._buffers),
            ctypes.addressof(self._tables[1]),
            *(tensor.data_ptr() for tensor in inputs),
            *(*step.shape, self._text_len, len(step.masks.temporal)),
            self._cache_dtype,
        )

    def _layer(self, layer: TransformerLayer) -> Layer:
        native = Layer(
            self._norm(layer.input_layernorm),
            self._norm(layer.third_layernorm),
            self._norm(layer.post_attention_layernorm),
            self._norm(layer.fourth_layernorm),
            self._channel(layer.attention),
            up=self._linear(layer.mlp.dense_h_to_4h),
            down=self._linear(layer.mlp.dense_4h_to_h),
        )
        if hasattr(layer, "temporal_attention"):
            native.temporal = self._channel(layer.temporal_attention)
            native.mix = self._address(layer.mix_logit.sigmoid())
        return native

    def _channel(self, attention: Attention) -> Channel:
        return Channel(self._linear(attention.query_key_value), self._linear(attention.dense))

    def _norm(self, norm: nn.LayerNorm) -> Norm:
        return Norm(self._address(norm.weight), self._address(norm.bias))

    def _linear(self, linear: Linear) -> Matrix:
        return self._matrix(linear.weight, linear.bias, linear.weight_scale)

    def _matrix(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Matrix:
        self._tensors += (weight, bias, scale)
        return Matrix.from_tensors(weight, bias, scale)

    def _address(self, tensor: Tensor) -> int:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _buffer(cache: ChannelCache | None) -> KVBuffer:
    if cache is None:
        return KVBuffer()
    return KVBuffer(cache.key.data_ptr(), cache.value.data_ptr(), cache.key.shape[2])


def _key_table(keys: VisibleKeys) -> KeyTable:
    tables = (keys.starts, keys.runs, keys.positions)
    return KeyTable(*(table.data_ptr() for table in tables), keys.max_keys, len(keys.positions))


def is_supported(model: CogVideoTransformer, steps: Sequence[DecodeInputs]) -> bool:
    """Whether `decode_step` can compute these steps together. It reads the weights alone, so not with adapters."""
    if has_adapters(model):
        return False
    weight, rows = model.word_embeddings.weight, sum(math.prod(step.shape) for step in steps)
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or rows > MAX_ROWS or torch.is_grad_enabled():
        return False
    if model.final_layernorm.weight.dtype != torch.float32 or len({len(step.masks.temporal) for step in steps}) > 1:
        return False
    channels = [step.cache.channel(0, "spatial") for step in steps]
    dtypes = {channel.key.dtype for channel in channels if channel is not None}
    return dtypes <= {torch.float32, torch.float16} and cpu.library() is not None


def decode_step(
    model: CogVideoTransformer, steps: Sequence[DecodeInputs], handles: Sequence[NativeHandle]
) -> list[Tensor]:
    """Logits of each step's slots: (batch, rows, num_image_tokens) float32, new tensors.

    `handles`: those of the steps' caches. Check `is_supported` first. A row's logits are the same to the last bit
    whatever the other rows, of the same step or of others.
    Raises: IndexError, before anything is computed, for a token outside the vocabulary, or a slot with keys outside its
    cache.
    """
    kernels = cpu.library()
    assert kernels is not None
    groups = (StepGroup * len(steps))(*(handle.group(step) for handle, step in zip(handles, steps, strict=True)))
    config = model.config
    ends = np.cumsum([0, *(math.prod(step.shape) for step in steps)])
    logits = torch.empty(int(ends[-1]), config.vocabulary.num_image_tokens)
    weights = len(model.layers) * 12 * config.hidden_size**2 + logits.shape[1] * config.hidden_size
    computed = kernels.cogvideo_decode_step(
        *(ctypes.byref(handles[0].model), groups, len(steps)),
        *(logits.data_ptr(), cpu.threads_for(len(logits) * weights)),
    )
    if not computed:
        raise IndexError("a decoding step has a token outside the vocabulary, or a slot with keys outside its cache")
    parts = [logits[start:end] for start, end in pairwise(ends)]
    return [part.view(*step.shape, -1) for part, step in zip(parts, steps, strict=True)]
