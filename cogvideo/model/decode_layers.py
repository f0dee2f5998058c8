"""All layers in one call for a few rows on a CPU, as decoding needs them; the same as `block.py` to float rounding.

A step of a small batch is over in milliseconds, of which calls of single operations would take most. The arithmetic is
in few_rows.cpp; here modules, caches and plans become its structures.
"""

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cogvideo.model import few_rows
from cogvideo.model.attention import Attention
from cogvideo.model.block import TransformerLayer
from cogvideo.model.cache import ChannelCache, KVCache
from cogvideo.model.few_rows import KINDS, Matrix, address
from cogvideo.model.linear import Linear
from cogvideo.model.plan import ChannelPlan, Plan

MAX_ROWS = 256
"""Of a batch together. Beyond it products are worth a call of the big machinery."""
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class _Channel(ctypes.Structure):
    _fields_ = (
        ("query_key_value", Matrix),
        ("dense", Matrix),
        ("text_key", _POINTER),
        ("text_value", _POINTER),
        ("frame_key", _POINTER),
        ("frame_value", _POINTER),
        ("num_places", _LONG),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input", _Norm),
        ("third", _Norm),
        ("post_attention", _Norm),
        ("fourth", _Norm),
        ("spatial", _Channel),
        ("temporal", _Channel),
        ("mix", _POINTER),
        ("up", Matrix),
        ("down", Matrix),
    )


class _Sight(ctypes.Structure):
    _fields_ = (("starts", _POINTER), ("runs", _POINTER), ("places", _POINTER), ("longest", _LONG))


class _Sizes(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("batch", "rows", "heads", "dim", "text_len")),
        ("cache_kind", ctypes.c_int),
    )


class DecodeLayers:
    """A model's layers tied to a cache that already holds the text."""

    def __init__(self, layers: Iterable[nn.Module], cache: KVCache) -> None:
        self._kept: list[object] = [cache]  # what the structures point into
        made = [self._layer(layer, own) for layer, own in zip(layers, cache.layers, strict=True)]  # type: ignore[arg-type]
        self._layers = (_Layer * len(made))(*made)
        key = cache.layers[0].spatial.frame_key
        self._batch, self._heads, _, self._dim = key.shape
        self._text_len = cache.layers[0].spatial.text_key.shape[2]
        self._cache_kind = KINDS[key.dtype]

    def __call__(self, frames: Tensor, plan: Plan, spatial_bias: Tensor, temporal_bias: Tensor) -> Tensor:
        """Shapes: frames (batch, rows, hidden) float32; biases (batch, text_len) float32 -> as frames, a new tensor."""
        kernels = few_rows.library()
        assert kernels is not None and plan.spatial.runs is not None, "ask `serves` first"
        out = frames.contiguous().clone()
        channels = (plan.spatial, *plan.temporal)
        sights = (_Sight * len(channels))(*map(_sight, channels))
        sizes = _Sizes(self._batch, frames.shape[1], self._heads, self._dim, self._text_len, self._cache_kind)
        kernels.cogvideo_layers(
            self._layers,
            len(self._layers),
            sights,
            len(plan.temporal),
            spatial_bias.contiguous().data_ptr(),
            temporal_bias.contiguous().data_ptr(),
            ctypes.byref(sizes),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _layer(self, layer: TransformerLayer, cache: object) -> _Layer:
        made = _Layer(
            self._norm(layer.input_layernorm),
            self._norm(layer.third_layernorm),
            self._norm(layer.post_attention_layernorm),
            self._norm(layer.fourth_layernorm),
            self._channel(layer.attention, cache.spatial),  # type: ignore[attr-defined]
            up=self._matrix(layer.mlp.dense_h_to_4h),
            down=self._matrix(layer.mlp.dense_4h_to_h),
        )
        if cache.temporal is not None:  # type: ignore[attr-defined]
            made.temporal = self._channel(layer.temporal_attention, cache.temporal)  # type: ignore[attr-defined]
            made.mix = self._at(layer.mix_logit.sigmoid())
        return made

    def _channel(self, attention: Attention, cache: ChannelCache) -> _Channel:
        return _Channel(
            self._matrix(attention.query_key_value),
            self._matrix(attention.dense),
            *map(address, (cache.text_key, cache.text_value, cache.frame_key, cache.frame_value)),
            cache.frame_key.shape[2],
        )

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._at(norm.weight), self._at(norm.bias))

    def _matrix(self, linear: Linear) -> Matrix:
        self._kept += (linear.weight, linear.bias, linear.weight_scale)
        return Matrix.of(linear.weight, linear.bias, linear.weight_scale)

    def _at(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def serves(frames: Tensor, plan: Plan, cache: KVCache) -> bool:
    """Whether `DecodeLayers` can take this forward."""
    if plan.spatial.runs is None or cache.layers[0].spatial.frame_key.dtype not in (torch.float32, torch.float16):
        return False
    return not torch.is_grad_enabled() and few_rows.serves(frames, MAX_ROWS)


def _sight(channel: ChannelPlan) -> _Sight:
    runs, places = channel.runs, channel.places
    assert runs is not None and places is not None
    return _Sight(runs.starts.data_ptr(), runs.runs.data_ptr(), places.data_ptr(), runs.longest)
