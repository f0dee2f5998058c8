"""All layers in one call for a few rows on a CPU, as decoding needs them; the same as `block.py` to float rounding.

A step of a small batch is over in milliseconds, of which calls of single operations would take most. Several batches,
each with its own cache, text and plan, go through together: the weights are then read once for all. The arithmetic is
in few_rows.cpp; here modules, caches and plans become its structures.
"""

import ctypes
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
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
"""Of a call, together. Beyond it products are worth a call of the big machinery."""
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class _Channel(ctypes.Structure):
    _fields_ = (("query_key_value", Matrix), ("dense", Matrix))


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


class _Kept(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("text_key", "text_value", "frame_key", "frame_value")),
        ("num_places", _LONG),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("kept", "sights", "spatial_bias", "temporal_bias")),
        *((name, _LONG) for name in ("batch", "rows", "text_len")),
        ("cache_kind", ctypes.c_int),
    )


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, _LONG) for name in ("heads", "dim", "num_temporal"))


class Rows(NamedTuple):
    """Frame rows of clips that share a cache and a plan. The cache holds their text already."""

    frames: Tensor
    """(batch, rows, hidden) float32."""
    plan: Plan
    spatial_bias: Tensor
    temporal_bias: Tensor
    """(batch, text_len) float32."""
    cache: KVCache


class Tie:
    """A model's layers and a cache as the kernels take them."""

    def __init__(self, layers: Iterable[nn.Module], cache: KVCache) -> None:
        self._pointed_to: list[object] = []
        made = [self._layer(layer) for layer in layers]  # type: ignore[arg-type]
        self.layers = (_Layer * len(made))(*made)
        kept = [_kept(channel) for layer in cache.layers for channel in (layer.spatial, layer.temporal)]
        self._kept = (_Kept * len(kept))(*kept)
        spatial = cache.layers[0].spatial
        self._batch, _, self._text_len, _ = spatial.text_key.shape
        self._cache_kind = KINDS[spatial.frame_key.dtype]

    def group(self, rows: int, sights: "ctypes.Array[_Sight]", biases: tuple[Tensor, Tensor]) -> _Group:
        """It points into its arguments and into this: keep them."""
        return _Group(
            ctypes.addressof(self._kept),
            ctypes.addressof(sights),
            *map(address, biases),
            self._batch,
            rows,
            self._text_len,
            self._cache_kind,
        )

    def _layer(self, layer: TransformerLayer) -> _Layer:
        made = _Layer(
            self._norm(layer.input_layernorm),
            self._norm(layer.third_layernorm),
            self._norm(layer.post_attention_layernorm),
            self._norm(layer.fourth_layernorm),
            self._channel(layer.attention),
            up=self._matrix(layer.mlp.dense_h_to_4h),
            down=self._matrix(layer.mlp.dense_4h_to_h),
        )
        if hasattr(layer, "temporal_attention"):
            made.temporal = self._channel(layer.temporal_attention)
            made.mix = self._at(layer.mix_logit.sigmoid())
        return made

    def _channel(self, attention: Attention) -> _Channel:
        return _Channel(self._matrix(attention.query_key_value), self._matrix(attention.dense))

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._at(norm.weight), self._at(norm.bias))

    def _matrix(self, linear: Linear) -> Matrix:
        self._pointed_to += (linear.weight, linear.bias, linear.weight_scale)
        return Matrix.of(linear.weight, linear.bias, linear.weight_scale)

    def _at(self, tensor: Tensor) -> int:
        self._pointed_to.append(tensor)
        return tensor.data_ptr()


def _kept(cache: ChannelCache | None) -> _Kept:
    if cache is None:
        return _Kept()
    tensors = (cache.text_key, cache.text_value, cache.frame_key, cache.frame_value)
    return _Kept(*map(address, tensors), cache.frame_key.shape[2])


def _sights(plan: Plan) -> "ctypes.Array[_Sight]":
    channels = (plan.spatial, *plan.temporal)
    return (_Sight * len(channels))(*map(_sight, channels))


def serves(weight_dtype: torch.dtype, groups: Sequence[Rows]) -> bool:
    """Whether `decode_layers` can take these together, with the layers' matrices in that type."""
    channels = {len(group.plan.temporal) for group in groups}
    if len(channels) > 1 or any(group.plan.spatial.runs is None for group in groups):
        return False
    kinds = {group.cache.layers[0].spatial.frame_key.dtype for group in groups}
    if torch.is_grad_enabled() or not kinds <= {torch.float32, torch.float16}:
        return False
    rows = sum(group.frames.shape[0] * group.frames.shape[1] for group in groups)
    return rows <= MAX_ROWS and all(few_rows.serves(group.frames, weight_dtype, MAX_ROWS) for group in groups)


def decode_layers(layers: Iterable[nn.Module], groups: Sequence[Rows]) -> list[Tensor]:
    """What comes out of the last layer, for each group: (batch, rows, hidden), new tensors. Ask `serves` first."""
    kernels = few_rows.library()
    assert kernels is not None
    ties, first = [], groups[0]
    for group in groups:
        if group.cache.tie is None:
            group.cache.tie = Tie(layers, group.cache)
        ties.append(group.cache.tie)
    out = torch.cat([group.frames.flatten(0, 1) for group in groups])  # a copy, also of one
    biases = [(group.spatial_bias.contiguous(), group.temporal_bias.contiguous()) for group in groups]
    sights = [_sights(group.plan) for group in groups]
    made = (_Group * len(groups))(
        *(
            tie.group(group.frames.shape[1], own, bias)
            for tie, group, own, bias in zip(ties, groups, sights, biases, strict=True)
        )
    )
    heads, dim = (first.cache.layers[0].spatial.frame_key.shape[i] for i in (1, 3))
    kernels.cogvideo_layers(
        ties[0].layers,
        len(ties[0].layers),
        made,
        len(made),
        ctypes.byref(_Sizes(heads, dim, len(first.plan.temporal))),
        out.data_ptr(),
        few_rows.threads_for(len(out) * len(ties[0].layers) * 12 * (heads * dim) ** 2),
    )
    ends = np.cumsum([0, *(group.frames.shape[0] * group.frames.shape[1] for group in groups)])
    return [out[a:b].view_as(group.frames) for (a, b), group in zip(pairwise(ends), groups, strict=True)]


def _sight(channel: ChannelPlan) -> _Sight:
    runs, places = channel.runs, channel.places
    assert runs is not None and places is not None
    return _Sight(runs.starts.data_ptr(), runs.runs.data_ptr(), places.data_ptr(), runs.longest)
