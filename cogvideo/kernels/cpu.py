"""Products of a few rows with a matrix on a CPU, as decoding needs them: `few_rows.cpp`, compiled when first used.

What PyTorch has for this reads weights far below the memory's speed from the second row on, and widens no 16-bit
weights. Where there is no C++ compiler nothing here serves, and the callers go by PyTorch's own functions: the same
results to float rounding. By the same library: whole steps (`decode_step.py`), drawing (`sampling/draw.py`).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cogvideo.logs import get_logger

log = get_logger(__name__)

MAX_ROWS = 32
"""Beyond it a product is worth a call of the big machinery."""
SMALL_CALL = 10_000_000
"""Multiplications, a fraction of a millisecond's worth."""
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, kept in the user's cache folder; None where they cannot be had."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        log.info("no C++ compiler found: decoding goes by PyTorch's own functions, more slowly")
        return None
    try:
        # -march=native: what one machine compiled may not run on another that shares the folder
        key = hashlib.sha256(_SOURCE.read_bytes() + repr((_FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogvideo"
        built = folder / f"few_rows-{key}.so"
        if not built.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            log.info("compiling the decoding kernels for this processor into %s, once, some seconds", folder)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / built.name
                subprocess.run([compiler, *_FLAGS, "-o", made, _SOURCE], check=True, capture_output=True)
                made.replace(built)  # whole or not at all, whoever else compiles it now
        kernels = ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        log.info("no kernels of our own (%s): decoding goes by PyTorch's own functions, more slowly", error)
        return None
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    kernels.cogvideo_linear.argtypes = [*[pointer] * 3, long, integer]
    kernels.cogvideo_step.argtypes = [pointer, pointer, long, pointer, integer]
    kernels.cogvideo_draw.argtypes = [*[pointer] * 4, long, integer]
    kernels.cogvideo_step.restype = integer
    for kernel in (kernels.cogvideo_linear, kernels.cogvideo_draw):
        kernel.restype = None
    return kernels


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def serves(x: Tensor, weight_dtype: torch.dtype) -> bool:
    """Whether the kernels can take these rows (..., features) and such weights, and are worth it for so few."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if weight_dtype not in KINDS:
        return False
    return x.numel() <= MAX_ROWS * x.shape[-1] and library() is not None


class Matrix(ctypes.Structure):
    """A matrix as few_rows.cpp takes it. It points into tensors, which whoever made it must keep."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outs", ctypes.c_long),
        ("ins", ctypes.c_long),
        ("kind", ctypes.c_int),
    )

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> "Matrix":
        """weight (outs, ins) float32, bfloat16, float16 or int8; scale, bias (outs,) float32, applied in this order."""
        assert weight.is_contiguous(), "rows of weights are read one after the other"
        return cls(weight.data_ptr(), address(scale), address(bias), *weight.shape, KINDS[weight.dtype])


def address(tensor: Tensor | None) -> int | None:
    """Where its data lie; None, which C++ takes as null, for None."""
    return None if tensor is None else tensor.data_ptr()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x (..., ins) float32 times weight (outs, ins) -> (..., outs) float32; arguments as `Matrix.of`'s.

    A row's result does not depend on the others.
    """
    kernels = library()
    assert kernels is not None, "ask `serves` first"
    x = x.contiguous()
    outs, ins = weight.shape
    y = x.new_empty(*x.shape[:-1], outs)
    matrix = Matrix.of(weight, bias, scale)
    rows = x.numel() // ins
    kernels.cogvideo_linear(ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), rows, threads_for(rows * outs * ins))
    return y


def threads_for(multiplications: int) -> int:
    """How many threads a call is worth. Small ones are over before a second thread is awake."""
    return 1 if multiplications < SMALL_CALL else torch.get_num_threads()
