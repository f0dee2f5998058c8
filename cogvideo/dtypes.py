"""Number types in one table: their names in torch, in files, and in configs.

Configs and commands name types `fp32`, `bf16`, `fp16`, `int8`, `float8` and `int4`. Not here: which type to use where,
and how weights are quantized (`model/quantize.py`).
"""

from typing import Literal, NamedTuple

import torch

FloatName = Literal["fp32", "bf16", "fp16"]
QuantizedName = Literal["int8", "float8", "int4"]
WeightName = Literal["fp32", "bf16", "fp16", "int8", "float8", "int4"]
WeightChoice = Literal["auto", "fp32", "bf16", "fp16", "int8", "float8", "int4"]
"""`auto`: the type that suits the device."""


class FileType(NamedTuple):
    """How files name a number type."""

    dtype: torch.dtype
    safetensors_code: str
    storage: type
    """The class that a pickle of torch.save names."""


FILE_TYPES = (
    FileType(torch.float64, "F64", torch.DoubleStorage),
    FileType(torch.float32, "F32", torch.FloatStorage),
    FileType(torch.float16, "F16", torch.HalfStorage),
    FileType(torch.bfloat16, "BF16", torch.BFloat16Storage),
    FileType(torch.int64, "I64", torch.LongStorage),
    FileType(torch.int32, "I32", torch.IntStorage),
    FileType(torch.int16, "I16", torch.ShortStorage),
    FileType(torch.int8, "I8", torch.CharStorage),
    FileType(torch.uint8, "U8", torch.ByteStorage),
    FileType(torch.bool, "BOOL", torch.BoolStorage),
)
"""Every type that a checkpoint can hold."""
DTYPE_OF_CODE = {entry.safetensors_code: entry.dtype for entry in FILE_TYPES}
CODE_OF_DTYPE = {entry.dtype: entry.safetensors_code for entry in FILE_TYPES}
STORAGE_OF_DTYPE = {entry.dtype: entry.storage for entry in FILE_TYPES}

FLOAT_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Floating-point types by `FloatName`."""
QUANTIZED_DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
    "int4": torch.uint8,
}
"""The type of a quantized weight tensor in memory; int4 packs two numbers into a byte."""
STORED_DTYPES: dict[str, torch.dtype] = {**FLOAT_DTYPES, **QUANTIZED_DTYPES}
"""The type of a weight tensor in memory by `WeightName`."""
ACTIVATION_DTYPES: dict[str, torch.dtype] = {**FLOAT_DTYPES, **dict.fromkeys(QUANTIZED_DTYPES, torch.bfloat16)}
"""The type that an accelerator computes in, by `WeightName`; a CPU computes in float32."""


def dtype_name(dtype: torch.dtype) -> str:
    """The type's name without the module: `float32`."""
    return str(dtype).removeprefix("torch.")
