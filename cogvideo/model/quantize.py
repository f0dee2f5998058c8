"""Linear layers and embeddings whose weights may be stored in fewer bits than the activations have.

    convert_weights(model, "int8")       # for sampling: weights int8, activations float32
    stream_layers(model)                 # ... and matrices too large for a GPU stay where they are
    linear.narrow()                      # for training beside it: frozen, int8, activations as they come

Decoding reads all weights for every step, so its speed is that of their bytes. Matrices are stored as asked for;
vectors, position tables and all that flows through the model are float32, or what an accelerator computes in. In
training int8 saves memory alone: a matrix is widened where it is used, and anew in the backward pass.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cogvideo.kernels import cpu as few_rows

WeightDtype = Literal["fp32", "bf16", "fp16", "int8", "int4"]
_ROWS_AT_ONCE = 4096
"""Narrowed and widened, so that what is between the types is small beside the result."""
_STORED = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,  # two numbers a byte
}
_GROUP = 64
"""Columns that share a scale in int4."""


class _Matrix(nn.Module):
    """A layer whose weight may be int8, or two int4 a byte, to be multiplied by scales."""

    weight: Tensor
    weight_scale: Tensor | None
    """float32, of int8 (rows,), of int4 (rows, groups of columns); None: the weight is what it says."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("weight_scale", None, persistent=False)

    stays = False
    """Whether the weight stays where it is, when the rest moves, and is copied to where it is used, each time."""

    def narrow(self, bits: Literal[8, 4] = 8) -> None:
        """Hold the weight in int8 or int4; it learns no more."""
        scale, narrow = (quantised if bits == 8 else _quantised_to_4)(self.weight.detach())
        self.weight_scale = scale
        self.weight = nn.Parameter(narrow, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Matrix":
        """Scales move with the weights, but stay float32 where `fn` makes all floats bf16, as some DeepSpeeds do."""
        scale, weight = self.weight_scale, self.weight
        if self.stays:
            del self.weight
        super()._apply(fn, recurse)
        if self.stays:
            self.weight = weight
        if scale is not None:
            self.weight_scale = scale.to(self.weight.device)
        return self


class Linear(_Matrix, nn.Linear):
    """`nn.Linear`, quick for a few rows; after `convert_weights` its weight may be narrower than input and output."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and few_rows.serves(x, self.weight.dtype):
            return few_rows.linear(x, self.weight, self.bias, self.weight_scale)
        weight = self.weight.to(x.device)
        if self.weight_scale is not None:
            scale = self.weight_scale.to(x.device)
            return _NarrowLinear.apply(x.to(_product_dtype(x)), weight, scale, self.bias)
        return F.linear(x, weight.to(x.dtype), self.bias)


class Embedding(_Matrix, nn.Embedding):
    """`nn.Embedding` whose table also scores: the tied output layer."""

    activations: torch.dtype | None = None
    """What rows come out in, whatever they are stored in; None: as stored, and float32 for what has scales."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.weight_scale is None:
            rows = super().forward(ids)
        else:
            flat = ids.flatten()
            rows = _widened(self.weight[flat], self.weight_scale[flat], torch.float32).view(*ids.shape, -1)
        return rows if self.activations is None else rows.to(self.activations)

    def output_weight(self, hidden: Tensor, count: int) -> Tensor:
        """The first `count` rows, to multiply with `hidden`, widened if they have scales: (count, embedding_dim)."""
        weight = self.weight[:count]
        if self.weight_scale is None:
            return weight
        return _widened(weight, self.weight_scale[:count], _product_dtype(hidden))

    def scores(self, hidden: Tensor, count: int) -> Tensor:
        """Products with the first `count` rows, float32: (..., embedding_dim) -> (..., count)."""
        weight, scale = self.weight[:count], None if self.weight_scale is None else self.weight_scale[:count]
        if not torch.is_grad_enabled() and few_rows.serves(hidden, weight.dtype):
            return few_rows.linear(hidden, weight, None, scale)
        return F.linear(hidden, _widened(weight, scale, hidden.dtype)).float()


class _NarrowLinear(torch.autograd.Function):
    """`F.linear` of a frozen narrow weight: what autograd would keep of it, the wide copy, is made twice instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _widened(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return grad @ _widened(weight, scale, grad.dtype), None, None, None


def _product_dtype(x: Tensor) -> torch.dtype:
    """The type of a matrix product with x: autocast's, where it is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def _widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiplied by the scales in float32, then rounded to `dtype`: as weights that were stored so."""
    if scale is None:
        return weight.to(dtype)
    packed, rows = weight.dtype == torch.uint8, _ROWS_AT_ONCE
    wide = weight.new_empty(len(weight), weight.shape[1] * (2 if packed else 1), dtype=dtype)
    for out, some, its_scale in zip(wide.split(rows), weight.split(rows), scale.split(rows), strict=True):
        if packed:
            numbers = torch.stack([some & 15, some >> 4], dim=-1).view(*its_scale.shape, -1).to(torch.int8) - 8
            out.copy_((numbers * its_scale.unsqueeze(-1)).flatten(1))
        else:
            torch.mul(some, its_scale[:, None], out=out)
    return wide


@torch.no_grad()
def convert_weights(model: nn.Module, dtype: WeightDtype, activations: torch.dtype = torch.float32) -> None:
    """Store the matrices of `model` in `dtype`, in place, for inference; all else in `activations`, as it computes.

    int8 and int4 are weight-only and symmetric, with a scale for each output row, and in int4 for every 64 columns of
    it. Matrices that are stored so already stay where they are, mapped files included. Raises: ValueError for weights
    that are int8 or int4 and are to be something else.
    """
    stored = _STORED[dtype]
    matrices = [module for module in model.modules() if isinstance(module, Linear | Embedding)]
    owned = {id(module.weight) for module in matrices}
    for module in matrices:
        if isinstance(module, Embedding):
            module.activations = activations
        if module.weight.dtype == stored:
            continue
        if module.weight_scale is not None:
            held = "int8" if module.weight.dtype == torch.int8 else "int4"
            raise ValueError(f"the weights are {held} already; load the model again for {dtype}")
        if dtype in ("int8", "int4"):
            module.narrow(8 if dtype == "int8" else 4)
        else:
            module.weight = nn.Parameter(module.weight.detach().to(stored), requires_grad=False)
        owned.add(id(module.weight))
    for parameter in model.parameters():
        if id(parameter) not in owned:
            parameter.data = parameter.data.to(activations)


def stream_layers(model: nn.Module) -> None:
    """Let the layers' matrices stay where they are, on disk if they are mapped: `model.to(gpu)` moves the rest.

    A GPU then holds one of them at a time, for as long as it is used, and a step takes as long as copying them all.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.stays = True


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (rows,) float32 and the weights over them, int8."""
    scales, narrow = weight.new_empty(len(weight), dtype=torch.float32), torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        some = weight[part].float()
        scale = some.abs().amax(dim=1).clamp(min=1e-30) / 127
        scales[part] = scale
        narrow[part] = (some / scale[:, None]).round().to(torch.int8)
    return scales, narrow


def _quantised_to_4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (rows, groups) float32 and the weights over them, -7 to 7, two a byte: (rows, columns / 2) uint8."""
    rows, columns = weight.shape
    group = _GROUP if columns % _GROUP == 0 else columns
    scales = weight.new_empty(rows, columns // group, dtype=torch.float32)
    packed = weight.new_empty(rows, columns // 2, dtype=torch.uint8)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        some = weight[part].float().unflatten(1, (-1, group))
        scale = some.abs().amax(dim=-1).clamp(min=1e-30) / 7
        numbers = ((some / scale[..., None]).round() + 8).to(torch.uint8).flatten(1)
        scales[part], packed[part] = scale, numbers[:, 0::2] | numbers[:, 1::2] << 4
    return scales, packed
