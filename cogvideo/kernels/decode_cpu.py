"""A decoding step in one call on a CPU: from tokens to scores; the same as the modules to float rounding.

A step of a small batch is over in milliseconds, of which calls of single operations would take most. Several batches,
each with its own cache and text, go through together: the weights are then read once for all. The arithmetic is in
few_rows.cpp; here modules, caches and sights become its structures.
"""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cogvideo.inference.cache import ChannelCache, KVCache
from cogvideo.kernels import cpu as few_rows
from cogvideo.kernels.cpu import KINDS, Matrix
from cogvideo.model.attention import Attention
from cogvideo.model.block import TransformerLayer
from cogvideo.model.quantize import Linear
from cogvideo.model.sight import Sight, Sights

if TYPE_CHECKING:
    from cogvideo.model.transformer import CogVideoTransformer, Step

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


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", _POINTER),
        *((name, _LONG) for name in ("num_layers", "heads", "dim")),
        ("words", Matrix),
        ("num_words", _LONG),
        *((name, _POINTER) for name in ("first", "later")),
        ("frame_len", _LONG),
        ("final", _Norm),
    )


class _Sight(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("starts", "runs", "places")),
        *((name, _LONG) for name in ("longest", "num_slots")),
    )


class _Kept(ctypes.Structure):
    _fields_ = (("key", _POINTER), ("value", _POINTER), ("num_places", _LONG))


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("kept", "sights", "inputs", "slots", "spatial_bias", "temporal_bias")),
        *((name, _LONG) for name in ("batch", "rows", "text_len", "num_temporal")),
        ("cache_kind", ctypes.c_int),
    )


class Tie:
    """A model and a cache as the kernels take them. It keeps what it points to, and is good while they stay."""

    def __init__(self, model: "CogVideoTransformer", cache: KVCache) -> None:
        self._pointed_to: list[object] = []
        config = model.config
        layers = [self._layer(layer) for layer in model.layers]  # type: ignore[arg-type]
        self._layers = (_Layer * len(layers))(*layers)
        table, positions = model.word_embeddings, model.position_embeddings.weight
        words = self._matrix(table.weight, None, table.weight_scale)
        words.outs = config.vocabulary.num_image_tokens
        self.model = _Model(
            ctypes.addressof(self._layers),
            *(len(layers), config.num_heads, config.head_dim),
            words,
            len(table.weight),
            self._at(positions[config.frame_position_start :]),
            self._at(model.extra_position_embeddings.weight) if config.has_temporal_channel else None,
            config.frame_len,
            self._norm(model.final_layernorm),
        )
        kept = [_kept(channel) for layer in cache.layers for channel in (layer.spatial, layer.temporal)]
        self._kept = (_Kept * len(kept))(*kept)
        spatial = cache.layers[0].spatial
        self._text_len, self._cache_kind = spatial.text_len, KINDS[spatial.key.dtype]
        self._sights: tuple[Sights, ctypes.Array[_Sight]] | None = None

    def group(self, step: "Step") -> _Group:
        """It points into the step and into this."""
        if self._sights is None or self._sights[0] is not step.sights:
            channels = (step.sights.spatial, *step.sights.temporal)
            self._sights = step.sights, (_Sight * len(channels))(*map(_sight, channels))
        pointers = (step.inputs, step.slots, *step.text_bias)
        kinds = [tensor.dtype for tensor in pointers if tensor.is_contiguous()]
        assert kinds == [torch.int64, torch.int64, torch.float32, torch.float32], "read as such, one after the other"
        batch, rows = len(step.cache.layers[0].spatial.key), len(step.slots)
        assert step.inputs.shape == (batch, rows) and len(step.text_bias.spatial) == batch
        return _Group(
            ctypes.addressof(self._kept),
            ctypes.addressof(self._sights[1]),
            *(tensor.data_ptr() for tensor in pointers),
            *(*step.inputs.shape, self._text_len, len(step.sights.temporal)),
            self._cache_kind,
        )

    def _layer(self, layer: TransformerLayer) -> _Layer:
        made = _Layer(
            self._norm(layer.input_layernorm),
            self._norm(layer.third_layernorm),
            self._norm(layer.post_attention_layernorm),
            self._norm(layer.fourth_layernorm),
            self._channel(layer.attention),
            up=self._linear(layer.mlp.dense_h_to_4h),
            down=self._linear(layer.mlp.dense_4h_to_h),
        )
        if hasattr(layer, "temporal_attention"):
            made.temporal = self._channel(layer.temporal_attention)
            made.mix = self._at(layer.mix_logit.sigmoid())
        return made

    def _channel(self, attention: Attention) -> _Channel:
        return _Channel(self._linear(attention.query_key_value), self._linear(attention.dense))

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._at(norm.weight), self._at(norm.bias))

    def _linear(self, linear: Linear) -> Matrix:
        return self._matrix(linear.weight, linear.bias, linear.weight_scale)

    def _matrix(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Matrix:
        self._pointed_to += (weight, bias, scale)
        return Matrix.of(weight, bias, scale)

    def _at(self, tensor: Tensor) -> int:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        self._pointed_to.append(tensor)
        return tensor.data_ptr()


def _kept(cache: ChannelCache | None) -> _Kept:
    if cache is None:
        return _Kept()
    return _Kept(cache.key.data_ptr(), cache.value.data_ptr(), cache.key.shape[2])


def _sight(sight: Sight) -> _Sight:
    tables = (sight.starts, sight.runs, sight.places)
    return _Sight(*(table.data_ptr() for table in tables), sight.longest, len(sight.places))


def serves(model: "CogVideoTransformer", steps: Sequence["Step"]) -> bool:
    """Whether `decode_step` can take these together."""
    words, rows = model.word_embeddings.weight, sum(step.inputs.numel() for step in steps)
    if words.device.type != "cpu" or words.dtype not in KINDS or rows > MAX_ROWS or torch.is_grad_enabled():
        return False
    if model.final_layernorm.weight.dtype != torch.float32 or len({len(step.sights.temporal) for step in steps}) > 1:
        return False
    kinds = {step.cache.layers[0].spatial.key.dtype for step in steps}
    return kinds <= {torch.float32, torch.float16} and few_rows.library() is not None


def decode_step(model: "CogVideoTransformer", steps: Sequence["Step"]) -> list[Tensor]:
    """Scores of each step's slots: (batch, rows, num_image_tokens) float32, new tensors. Ask `serves` first.

    A row's scores do not depend on the others, neither of its step nor of other steps, to the last bit.
    Raises: IndexError, before anything is computed, for a token that is none, or a slot with keys outside its cache.
    """
    kernels, ties = few_rows.library(), []
    assert kernels is not None
    for step in steps:
        step.cache.tie = step.cache.tie or Tie(model, step.cache)
        ties.append(step.cache.tie)
    groups = (_Group * len(steps))(*(tie.group(step) for tie, step in zip(ties, steps, strict=True)))
    config = model.config
    ends = np.cumsum([0, *(step.inputs.numel() for step in steps)])
    scores = torch.empty(int(ends[-1]), config.vocabulary.num_image_tokens)
    weights = len(model.layers) * 12 * config.hidden_size**2 + scores.shape[1] * config.hidden_size
    done = kernels.cogvideo_step(
        *(ctypes.byref(ties[0].model), groups, len(steps)),
        *(scores.data_ptr(), few_rows.threads_for(len(scores) * weights)),
    )
    if not done:
        raise IndexError("a step has a token outside the table, or a slot that sees more than its cache holds")
    own = [scores[first:behind] for first, behind in pairwise(ends)]
    return [part.view(*step.inputs.shape, -1) for part, step in zip(own, steps, strict=True)]
