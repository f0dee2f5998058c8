"""What the forward pass keeps for the backward pass, counted by running the model's own code on fake tensors.

Two models of a few layers are traced, and their difference gives what one layer keeps. A fused attention kernel keeps
queries, keys, values, its bias, its output and a sum per row. Autocast keeps a copy of each weight as well, whatever
the batch size, so two batch sizes are traced with it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from cogvideo.checkpoint.load import on_meta
from cogvideo.checkpoint.parameters import TransformerConfig
from cogvideo.model.attention import ATTENTION, AttentionImplementation, attend_block
from cogvideo.model.config import AttentionName, LoraConfig, ModelConfig, Recompute
from cogvideo.model.inputs import TextBias
from cogvideo.model.joined import MIN_HEAD_DIM, JoinedMask, attend_dense
from cogvideo.model.lora import adapter_parameters, add_adapters
from cogvideo.model.loss import token_nll
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.superres.transformer import SuperresTransformer

with contextlib.suppress(ImportError):  # optional, see CONTRIBUTING.md
    from cogvideo.kernels import tiled_attention  # noqa: F401  (adds itself to ATTENTION)

_FEW_LAYERS = 2
"""Windows differ between even and odd layers, so layers are counted in pairs."""

Arithmetic = Literal["bf16", "fp32", "autocast"]
"""`autocast`: bfloat16 matrix products with float32 weights; otherwise weights and activations have this type."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "autocast": torch.float32}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What determines, besides the model and the batch, which tensors the backward pass needs."""

    recompute: Recompute
    frozen_trunk: bool
    arithmetic: Arithmetic = "bf16"
    attention: AttentionName = "auto"
    quantized_trunk: bool = False
    is_gpu: bool = True
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def attention_of(self, config: ModelConfig) -> AttentionName:
        """The implementation that `auto` stands for, as `install_kernels` chooses it."""
        if self.attention != "auto":
            return self.attention
        if self.is_gpu:
            return "flex" if config.head_dim >= MIN_HEAD_DIM else "dense"
        return "cpu" if "cpu" in ATTENTION else "sdpa"


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes on one device for one micro-batch."""

    kept: float
    """From the forward pass to the backward pass."""
    recomputed: float
    """What the backward pass recomputes for one layer, and holds while it processes that layer."""


@lru_cache(maxsize=256)
def count_activations(config: TransformerConfig, micro_batch: int, setting: Setting) -> Activations:
    """Count what training keeps. Takes a few seconds the first time."""
    whole = dataclasses.replace(setting, recompute="nothing")
    layer = _layer_bytes(config, micro_batch, setting)
    few = _model_bytes(config, _FEW_LAYERS, micro_batch, setting)
    return Activations(
        kept=few + (config.num_layers - _FEW_LAYERS) * layer + _loss_bytes(config, micro_batch, setting),
        recomputed=_layer_bytes(config, micro_batch, whole) - layer,
    )


def _layer_bytes(config: TransformerConfig, micro_batch: int, setting: Setting) -> float:
    few, more = (_model_bytes(config, layers, micro_batch, setting) for layers in (_FEW_LAYERS, 2 * _FEW_LAYERS))
    return (more - few) / _FEW_LAYERS


def _model_bytes(config: TransformerConfig, num_layers: int, micro_batch: int, setting: Setting) -> float:
    """Bytes kept by a model of `num_layers` layers, without its loss."""
    one = _trace(config, num_layers, 1, setting)
    per_clip = _trace(config, num_layers, 2, setting) - one if setting.arithmetic == "autocast" else one
    return one + (micro_batch - 1) * per_clip


@lru_cache(maxsize=256)
def _trace(config: TransformerConfig, num_layers: int, batch: int, setting: Setting) -> int:
    config = dataclasses.replace(config, num_layers=num_layers)
    model: Any
    if isinstance(config, SuperresConfig):
        model = on_meta(partial(SuperresTransformer, config))
    else:
        model = on_meta(partial(CogVideoTransformer, config))
        chosen = setting.attention_of(config)
        model.use_attention("counted" if chosen == "flex" else chosen)
        plan = model.plan_clip(torch.device("cpu"), supervised_only=True)
    if setting.lora.rank:
        add_adapters(model, setting.lora)
    model.to(_DTYPES[setting.arithmetic])
    with _fake_device(setting):
        _make_fake(model)
        if setting.frozen_trunk:
            model.freeze_trunk()
        if setting.lora.rank:
            model.requires_grad_(False)
            for _, p in adapter_parameters(model):
                p.requires_grad_()
        if setting.quantized_trunk:
            model.quantize_trunk()
        model.recompute = setting.recompute
        if isinstance(config, SuperresConfig):
            return saved_bytes(model, partial(model, *_superres_inputs(config, batch)))
        text = torch.zeros(batch, config.text_len, dtype=torch.long)
        frames = torch.zeros(batch, config.layout.num_slots, dtype=torch.long)
        bias = TextBias.from_mask(torch.zeros(batch, config.text_len, dtype=torch.bool))
        return saved_bytes(model, partial(model, frames, plan, bias, text=text))


@lru_cache(maxsize=256)
def _loss_bytes(config: TransformerConfig, micro_batch: int, setting: Setting) -> int:
    """Bytes that the loss keeps. It works in chunks of rows, so they are not proportional to the batch."""
    rows, h, codes = supervised_rows(config) * micro_batch, config.hidden_size, config.vocabulary.num_image_tokens
    dtype = _DTYPES[setting.arithmetic]
    if setting.frozen_trunk:
        return rows * h * dtype.itemsize  # the gradient of each row; its many small chunks are not traced
    with _fake_device(setting):
        weight = nn.Parameter(torch.empty(codes, h, dtype=dtype))
        hidden, targets = torch.empty(rows, h, dtype=dtype, requires_grad=True), torch.zeros(rows, dtype=torch.long)
        return saved_bytes(nn.ParameterList([weight]), lambda: token_nll(hidden, weight, targets))


def supervised_rows(config: TransformerConfig) -> int:
    """Rows of a clip or frame that have a loss; for super-resolution, the average over rounds."""
    if isinstance(config, SuperresConfig):
        return max(1, round(float(round_masks(config).sum(1).float().mean())))
    return len(config.layout.supervised_frames) * config.frame_len


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd saves in `forward`, each storage once, without `module`'s own weights."""
    weights = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    storages: dict[int, Any] = {}  # kept alive, so that no address is used twice

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return x

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        out = forward()
    del out
    return sum(storage.nbytes() for storage in storages.values())


@contextlib.contextmanager
def _fake_device(setting: Setting) -> Iterator[None]:
    """Tensors made inside are fake ones on a CPU; autocast is on if it is in training."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting.arithmetic == "autocast")
    norms = FloatNorms() if setting.is_gpu and setting.arithmetic == "autocast" else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), autocast, norms:
        yield


def _make_fake(module: nn.Module) -> None:
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype)))


class FloatNorms(TorchFunctionMode):
    """Make LayerNorms compute and keep float32, as autocast does on a GPU but not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class FusedAttention(TorchFunctionMode):
    """Replace the attention kernel, which fake tensors would decompose, with one that saves what fused kernels save."""

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


def _superres_inputs(config: SuperresConfig, batch: int) -> tuple[Tensor, ...]:
    mask = torch.zeros(batch, config.text_len, dtype=torch.bool)
    text, low, high = (
        torch.zeros(batch, length, dtype=torch.long)
        for length in (config.text_len, config.low_res_len, config.high_res_len)
    )
    return text, mask, low, high
