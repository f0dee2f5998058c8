"""What the forward pass keeps for the backward pass, counted on meta tensors: the model's own code, without its memory.

Two models of a few layers are traced, and their difference is that of one layer. Attention is that of a GPU: one fused
call per channel, which keeps queries, keys, values, its output and a sum per row.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cogvideo.checkpoint.load import on_meta
from cogvideo.checkpoint.parameters import TransformerConfig
from cogvideo.model.attention import ATTENTION, AttentionImplementation, attend_block
from cogvideo.model.config import Recompute
from cogvideo.model.inputs import TextBias
from cogvideo.model.joined import JoinedMask, attend_dense
from cogvideo.model.loss import token_nll
from cogvideo.model.transformer import CogVideoTransformer, TrunkModel
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.superres.transformer import SuperresTransformer

M = TypeVar("M", bound=TrunkModel)

_FEW_LAYERS = 2
"""Windows differ between even and odd layers, so layers are counted in pairs."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes on one device for one micro-batch."""

    kept: float
    """From the forward to the backward pass."""
    recomputed: float
    """What the backward pass computes again for one layer, and holds while it is in it."""


@lru_cache(maxsize=256)
def count_activations(
    config: TransformerConfig,
    micro_batch: int,
    recompute: Recompute,
    *,
    frozen_trunk: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> Activations:
    """Count what training keeps with weights and activations in `dtype`. Takes a second or two the first time."""

    def per_layer(what: Recompute) -> float:
        few, more = (_trace(config, layers, what, frozen_trunk) for layers in (_FEW_LAYERS, 2 * _FEW_LAYERS))
        return (more - few) / _FEW_LAYERS

    scale = micro_batch * dtype.itemsize / torch.bfloat16.itemsize
    layer, whole = per_layer(recompute), per_layer("nothing")
    few = _trace(config, _FEW_LAYERS, recompute, frozen_trunk)
    layers = few + (config.num_layers - _FEW_LAYERS) * layer
    return Activations(
        kept=scale * layers + _loss_bytes(config, micro_batch, frozen_trunk, dtype),
        recomputed=scale * (whole - layer),
    )


@lru_cache(maxsize=64)
def _trace(config: TransformerConfig, num_layers: int, recompute: Recompute, frozen_trunk: bool) -> int:
    """Bytes kept by a model of so many layers, its loss not included, for one clip or frame in bfloat16."""
    config = dataclasses.replace(config, num_layers=num_layers)
    if isinstance(config, SuperresConfig):
        superres = _meta_model(lambda: SuperresTransformer(config), frozen_trunk)
        superres.recompute = recompute
        return saved_bytes(superres, lambda: superres(*_superres_inputs(config)))
    model = _meta_model(lambda: CogVideoTransformer(config), frozen_trunk)
    model.recompute = recompute
    model.use_attention("counted")
    text = _meta(config.text_len, dtype=torch.long)
    frames = _meta(config.layout.num_slots, dtype=torch.long)
    bias = TextBias.from_mask(_meta(config.text_len, dtype=torch.bool))
    plan = model.plan_clip(frames.device, supervised_only=True)
    return saved_bytes(model, lambda: model(frames, plan, bias, text=text))


@lru_cache(maxsize=256)
def _loss_bytes(config: TransformerConfig, micro_batch: int, frozen_trunk: bool, dtype: torch.dtype) -> int:
    """Bytes that the loss keeps. It works in chunks of rows, so they are not in proportion to the batch."""
    rows, h, codes = supervised_rows(config) * micro_batch, config.hidden_size, config.vocabulary.num_image_tokens
    if frozen_trunk:
        return rows * h * dtype.itemsize  # the gradient of each row; its many small chunks are not traced
    weight = nn.Parameter(_meta(codes, h, dtype=dtype)[0])
    hidden, targets = _meta(rows, h, dtype=dtype)[0].requires_grad_(), _meta(rows, dtype=torch.long)[0]
    return saved_bytes(nn.ParameterList([weight]), lambda: token_nll(hidden, weight, targets))


def supervised_rows(config: TransformerConfig) -> int:
    """Rows of a clip or frame that have a loss; for super-resolution, of the average round."""
    if isinstance(config, SuperresConfig):
        return max(1, round(float(round_masks(config).sum(1).float().mean())))
    return len(config.layout.supervised_frames) * config.frame_len


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd saves in `forward`, each storage once; `module`'s own weights do not count."""
    weights = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    storages: dict[int, Any] = {}  # kept, so that no address is used twice

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return x

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        out = forward()
    del out
    return sum(storage.nbytes() for storage in storages.values())


class FusedAttention(TorchFunctionMode):
    """Replace attention's kernel, which meta tensors would take apart, by one that saves what the fused ones do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value, *rest = args
            bias = rest[0] if rest else (kwargs or {}).get("attn_mask")
            return _Attend.apply(query, key, value, bias)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, sums)
        return out


def _attend_joined(
    query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, mask: JoinedMask, dropout: float
) -> Tensor:
    if dropout:
        return attend_dense(query, key, value, text_bias, mask, dropout)
    out: Tensor = _Attend.apply(query, key, value, None)  # type: ignore[no-untyped-call]
    return out


ATTENTION["counted"] = AttentionImplementation(attend_block, attend_joined=_attend_joined)


def _meta_model(make: Callable[[], M], frozen_trunk: bool) -> M:
    model = on_meta(make).bfloat16()
    if frozen_trunk:
        model.freeze_trunk()
    return model


def _superres_inputs(config: SuperresConfig) -> tuple[Tensor, ...]:
    text, mask = _meta(config.text_len, dtype=torch.long), _meta(config.text_len, dtype=torch.bool)
    return text, mask, _meta(config.low_res_len, dtype=torch.long), _meta(config.high_res_len, dtype=torch.long)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A batch of one."""
    return torch.empty(1, *shape, dtype=dtype, device="meta")
