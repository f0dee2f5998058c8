"""Linear layers and embeddings whose weights may be stored in fewer bits than the activations.

    convert_weights(model, "int8")      # for sampling: int8 weights, float32 activations
    offload_layers(model)               # ... and matrices too large for a GPU stay where they are
    linear.quantize()                   # for training other parameters: frozen int8 weight, activations of any dtype

Decoding reads all weights in every step, so its speed depends on their size. Matrices are stored in the requested
dtype; vectors, position tables and activations are float32, or the dtype that an accelerator computes in. In training,
int8 only saves memory: a matrix is dequantized where it is used, and again in the backward pass. So is a float8 matrix,
except on newer GPUs, which multiply it as it is, with inputs and gradients rounded to float8 as well.
"""

from collections.abc import Callable
from typing import Any, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cogvideo.dtypes import QUANTIZED_DTYPES, STORED_DTYPES, QuantizedName, WeightName

_CHUNK_ROWS = 4096
"""Rows quantized or dequantized at a time, so that intermediates stay small compared with the result."""
_LARGEST = {"int8": 127, "float8": 448}
"""The largest value of the type, to which the largest magnitude of each row is scaled."""
_INT4_GROUP = 64
"""Columns that share a scale in int4."""


class LinearKernel(Protocol):
    """A matrix product for a few rows that is faster than PyTorch's; used only without gradients."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor | None:
        """Shapes: x (..., in_features), weight (out_features, in_features) -> (..., out_features) float32.

        None if the product is not supported: the caller then uses PyTorch's.
        """
        ...


class LowRank(nn.Module):
    """A low-rank update of a matrix, scale * B A; for a table, whose rows are looked up, the transpose of that."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        """For a table `in_features` is its number of rows, `out_features` their length."""
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """The update's product with x (..., in_features), or its rows for ids of any shape: (..., out_features)."""
        if x.is_floating_point():
            low = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))
        else:
            low = F.embedding(x, self.A.T)
        return F.linear(low, self.B.to(low.dtype)) * self.scale

    def rows(self, count: int, dtype: torch.dtype) -> Tensor:
        """The first `count` rows of a table's update: (count, out_features)."""
        return F.linear(self.A[:, :count].T.to(dtype), self.B.to(dtype)) * self.scale


class _Matrix(nn.Module):
    """A layer whose weight may be int8, float8, or int4 with two values per byte, to be multiplied by scales."""

    weight: Tensor
    weight_scale: Tensor | None
    """float32, (rows,), for int4 (rows, groups of columns); None: the weight is not quantized."""
    kernel: LinearKernel | None = None
    offloaded = False
    """Whether the weight stays where it is when the module moves, and is copied to the input's device for each use."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("weight_scale", None, persistent=False)
        self.lora: LowRank | None = None
        """An update that is computed beside the weight. Code that reads `weight` directly must take it into account."""

    @property
    def quantized_as(self) -> QuantizedName | None:
        """How the weight is quantized; None: not at all."""
        if self.weight_scale is None:
            return None
        return next(name for name in get_args(QuantizedName) if QUANTIZED_DTYPES[name] == self.weight.dtype)

    def quantize(self, name: QuantizedName = "int8") -> None:
        """Store the weight in fewer bits; it can no longer be trained."""
        scale, quantized = quantize(self.weight.detach(), name)
        self.weight_scale = scale
        self.weight = nn.Parameter(quantized, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Matrix":
        """Move scales with the weights, but keep the stored types of both if `fn` casts floats, as DeepSpeed does."""
        scale, weight = self.weight_scale, self.weight
        is_float8 = weight.dtype == torch.float8_e4m3fn
        if self.offloaded:
            del self.weight
        elif is_float8:
            self.weight = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.offloaded:
            self.weight = weight
        elif is_float8:
            self.weight = nn.Parameter(self.weight.view(weight.dtype), requires_grad=False)
        if scale is not None:
            self.weight_scale = scale.to(self.weight.device)
        return self


class Linear(_Matrix, nn.Linear):
    """`nn.Linear` whose weight may have fewer bits than its input and output."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = self.kernel(x, self.weight, self.bias, self.weight_scale)
            if y is not None:
                return y if self.lora is None else y + self.lora(x)
        weight = self.weight.to(x.device)
        if self.weight_scale is not None:
            scale, x = self.weight_scale.to(x.device), x.to(_product_dtype(x))
            if x.is_cuda and weight.dtype in (torch.int8, torch.float8_e4m3fn) and not torch.is_grad_enabled():
                y = scaled_product(x, weight, scale, self.bias)
            elif multiplies_float8(x, weight):
                y = Float8Linear.apply(x, weight, scale, self.bias)  # type: ignore[no-untyped-call]
            else:
                y = _QuantizedLinear.apply(x, weight, scale, self.bias)  # type: ignore[no-untyped-call]
        else:
            y = F.linear(x, weight.to(x.dtype), self.bias)
        return y if self.lora is None else y + self.lora(x)


def scaled_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` with an int8 or float8 weight whose scales multiply the sums, not the matrix: for inference on a GPU.

    Both types are exact in bfloat16, so nothing is rounded before the sums; converting the matrix takes one kernel, or
    none where a compiler fuses it into the product. torchao's weight-only types have no kernels of their own either.
    """
    return torch.addcmul(bias.to(x.dtype), F.linear(x, weight.to(x.dtype)), scale.to(x.dtype))


class Embedding(_Matrix, nn.Embedding):
    """`nn.Embedding` whose table is also the output layer (tied weights)."""

    activation_dtype: torch.dtype | None = None
    """The dtype of looked-up rows; None: as stored, float32 for quantized tables."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.weight_scale is None:
            rows = super().forward(ids)
        else:
            flat = ids.flatten()
            rows = _dequantize(self.weight[flat], self.weight_scale[flat], torch.float32).view(*ids.shape, -1)
        if self.lora is not None:
            rows = rows + self.lora(ids)
        return rows if self.activation_dtype is None else rows.to(self.activation_dtype)

    def output_weight(self, hidden: Tensor, count: int) -> Tensor:
        """The first `count` rows, dequantized for a product with `hidden`: (count, embedding_dim)."""
        weight = self.weight[:count]
        if self.weight_scale is not None:
            weight = _dequantize(weight, self.weight_scale[:count], _product_dtype(hidden))
        return weight if self.lora is None else weight + self.lora.rows(count, weight.dtype)

    def logits(self, hidden: Tensor, count: int) -> Tensor:
        """Products with the first `count` rows, float32: (..., embedding_dim) -> (..., count)."""
        weight, scale = self.weight[:count], None if self.weight_scale is None else self.weight_scale[:count]
        if self.kernel is not None and not torch.is_grad_enabled():
            y = self.kernel(hidden, weight, None, scale)
            if y is not None:
                return y if self.lora is None else y + F.linear(hidden, self.lora.rows(count, hidden.dtype))
        whole = _dequantize(weight, scale, hidden.dtype)
        return F.linear(hidden, whole if self.lora is None else whole + self.lora.rows(count, whole.dtype)).float()


class _QuantizedLinear(torch.autograd.Function):
    """`F.linear` with a frozen quantized weight, dequantized again in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return grad @ _dequantize(weight, scale, grad.dtype), None, None, None


def multiplies_float8(x: Tensor, weight: Tensor) -> bool:
    """Whether x, in bfloat16, is rounded to float8 and multiplied with this float8 weight as it is."""
    fits = weight.dtype == torch.float8_e4m3fn and x.dtype == torch.bfloat16
    # the kernel needs sizes that are multiples of 16
    return fits and not any(size % 16 for size in weight.shape) and has_float8_products(x.device)


def has_float8_products(device: torch.device) -> bool:
    """Whether the device can multiply float8, as GPUs can since Ada and Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Float8Linear(torch.autograd.Function):
    """`F.linear` with a frozen float8 weight; inputs, and gradients in the backward pass, are rounded to float8 too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return _float8_product(x, weight, scale, x.dtype) + bias.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        # this product sums over the weight's rows, so their scales go into the gradient before it is rounded
        turned = weight.t().contiguous()
        return _float8_product(grad * scale, turned, scale.new_ones(len(turned)), grad.dtype), None, None, None


def _float8_product(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`F.linear` with a float8 weight, of rows rounded to float8, each with its own scale; the result is in `dtype`."""
    rows = x.flatten(0, -2)
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True).float()
    row_scale = largest.clamp(min=1e-30) / _LARGEST["float8"]
    rounded = (rows / row_scale).to(weight.dtype)
    y = torch._scaled_mm(rounded, weight.t(), row_scale, scale[None], out_dtype=dtype)
    return y.unflatten(0, x.shape[:-1])


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x: autocast's where it is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def _dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply by the scales in float32, then round to `dtype`."""
    if scale is None:
        return weight.to(dtype)
    packed, rows = weight.dtype == torch.uint8, _CHUNK_ROWS
    result = weight.new_empty(len(weight), weight.shape[1] * (2 if packed else 1), dtype=dtype)
    for out, part, part_scale in zip(result.split(rows), weight.split(rows), scale.split(rows), strict=True):
        if packed:
            # the low half of a byte is the even column, the high half the odd one; both are offset by 8
            values = torch.stack([part & 15, part >> 4], dim=-1).view(*part_scale.shape, -1).to(torch.int8) - 8
            out.copy_((values * part_scale.unsqueeze(-1)).flatten(1))
        else:
            torch.mul(part.float(), part_scale[:, None], out=out)
    return result


@torch.no_grad()
def convert_weights(model: nn.Module, dtype: WeightName, activations: torch.dtype = torch.float32) -> None:
    """Store the matrices of `model` in `dtype`, in place, for inference, and everything else in `activations`.

    int8, float8 and int4 are weight-only and symmetric, with a scale per output row, for int4 per 64 columns of a row.
    Matrices that already have the dtype are left untouched, memory-mapped ones included. Raises: ValueError if weights
    are already quantized to another dtype.
    """
    storage_dtype = STORED_DTYPES[dtype]
    matrices = [module for module in model.modules() if isinstance(module, Linear | Embedding)]
    owned = {id(module.weight) for module in matrices}
    for module in matrices:
        if isinstance(module, Embedding):
            module.activation_dtype = activations
        if module.weight.dtype == storage_dtype:
            continue
        if module.weight_scale is not None:
            raise ValueError(
                f"the weights are already {module.quantized_as}; reload the model to store them as {dtype}"
            )
        if dtype == "int8" or dtype == "float8" or dtype == "int4":
            module.quantize(dtype)
        else:
            module.weight = nn.Parameter(module.weight.detach().to(storage_dtype), requires_grad=False)
        owned.add(id(module.weight))
    for parameter in model.parameters():
        if id(parameter) not in owned:
            parameter.data = parameter.data.to(activations)


def offload_layers(model: nn.Module) -> None:
    """Keep the layers' matrices where they are, on disk if memory-mapped, when `model.to(gpu)` moves the rest.

    The GPU then holds one matrix at a time, while it is used, and a step takes as long as copying all of them.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.offloaded = True


def set_linear_kernel(model: nn.Module, kernel: LinearKernel | None) -> None:
    """Let all matrices of `model` use a kernel where it supports their inputs; None: PyTorch only."""
    for module in model.modules():
        if isinstance(module, _Matrix):
            module.kernel = kernel


def quantize(weight: Tensor, name: QuantizedName) -> tuple[Tensor, Tensor]:
    """Scales (rows,) float32, in int4 (rows, groups of columns), and the weight divided by them, as it is stored."""
    if name == "int4":
        return _quantize_int4(weight)
    scales = weight.new_empty(len(weight), dtype=torch.float32)
    quantized = torch.empty_like(weight, dtype=QUANTIZED_DTYPES[name])
    for start in range(0, len(weight), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        values = weight[part].float()
        scale = values.abs().amax(dim=1).clamp(min=1e-30) / _LARGEST[name]
        scales[part] = scale
        divided = values / scale[:, None]
        quantized[part] = (divided.round() if name == "int8" else divided).to(quantized.dtype)
    return scales, quantized


def _quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (rows, groups) float32, and the weight divided by them, -7 to 7, packed: (rows, columns / 2) uint8."""
    rows, columns = weight.shape
    group = _INT4_GROUP if columns % _INT4_GROUP == 0 else columns
    scales = weight.new_empty(rows, columns // group, dtype=torch.float32)
    packed = weight.new_empty(rows, columns // 2, dtype=torch.uint8)
    for start in range(0, rows, _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        values = weight[part].float().unflatten(1, (-1, group))
        scale = values.abs().amax(dim=-1).clamp(min=1e-30) / 7
        shifted = ((values / scale[..., None]).round() + 8).to(torch.uint8).flatten(1)
        scales[part], packed[part] = scale, shifted[:, 0::2] | shifted[:, 1::2] << 4
    return scales, packed
