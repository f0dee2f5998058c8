"""Products and attention for a few rows on a CPU, as decoding needs them: `few_rows.cpp`, compiled when first used.

What PyTorch has for this reads weights far below the memory's speed from the second row on, widens no 16-bit weights,
and attends to scattered keys by copying them. Where there is no C++ compiler nothing here serves, and the callers
go by PyTorch's own functions: the same results to float rounding.
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
from cogvideo.model.cache import ChannelCache
from cogvideo.model.runs import KeyRuns

log = get_logger(__name__)

MAX_ROWS = 32
"""Beyond it a product is worth a call of the big machinery."""
MAX_QUERIES = 1024
"""Attention of each query by itself: beyond it, and for long runs of queries that see alike, blocks serve better."""
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


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
    kernels.cogvideo_linear.argtypes = [integer, *[pointer] * 5, *[long] * 3, integer]
    kernels.cogvideo_attend.argtypes = [*[pointer] * 10, *[long] * 7, integer]
    kernels.cogvideo_linear.restype = kernels.cogvideo_attend.restype = None
    return kernels


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def serves(x: Tensor, max_rows: int = MAX_ROWS) -> bool:
    """Whether the kernels can take these rows (..., features), and are worth it for so few."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return x.numel() <= max_rows * x.shape[-1] and library() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x (..., ins) float32 times weight (outs, ins), float32, bfloat16, float16 or int8 -> (..., outs) float32.

    scale (outs,), bias (outs,) float32: applied in this order. A row's result does not depend on the others.
    """
    kernels = library()
    assert kernels is not None and weight.is_contiguous(), "ask `serves` first"
    x = x.contiguous()
    outs, ins = weight.shape
    y = x.new_empty(*x.shape[:-1], outs)
    kernels.cogvideo_linear(
        _KINDS[weight.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // ins,
        outs,
        ins,
        torch.get_num_threads(),
    )
    return y


def attend(projected: Tensor, slots: Tensor, runs: KeyRuns, text_bias: Tensor, cache: ChannelCache) -> Tensor:
    """Store the rows' keys and values at their slots, then attend from each row to text and to the slots it sees.

    Shapes: projected (batch, rows, 3 * hidden), queries, keys, values side by side; slots (rows,); text_bias
    (batch, text_len) float32 -> (batch, rows, hidden), float32 like all of the cache.
    """
    kernels = library()
    assert kernels is not None and cache.frame_key.dtype == torch.float32, "ask `serves` first"
    batch, rows, width = projected.shape
    _, heads, num_slots, dim = cache.frame_key.shape
    out = projected.new_empty(batch, rows, width // 3)
    kernels.cogvideo_attend(
        projected.contiguous().data_ptr(),
        cache.text_key.data_ptr(),
        cache.text_value.data_ptr(),
        text_bias.contiguous().data_ptr(),
        cache.frame_key.data_ptr(),
        cache.frame_value.data_ptr(),
        slots.data_ptr(),
        runs.starts.data_ptr(),
        runs.runs.data_ptr(),
        out.data_ptr(),
        batch,
        rows,
        heads,
        dim,
        cache.text_key.shape[2],
        num_slots,
        runs.longest,
        torch.get_num_threads(),
    )
    return out
