"""The CPU kernels of cpu.cpp, compiled when first used, and every C structure that is passed to them.

They multiply a few rows by a matrix, decode whole steps (decode_cpu.py) and draw tokens (`inference.sampler`): for two
or more rows, PyTorch reads weights far below memory bandwidth, and it cannot multiply 16-bit weights without converting
them first. Without a C++ compiler `library()` is None and callers use PyTorch: the same results up to float rounding.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cogvideo.files import code_cache, is_private
from cogvideo.logs import get_logger

log = get_logger(__name__)

MAX_ROWS = 32
"""Above this, PyTorch's GEMM is faster."""
SMALL_CALL = 10_000_000
"""Number of multiplications that take a fraction of a millisecond."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""Weight types and their numbers in cpu.cpp."""
_SAMPLER_COST = 100
"""Number of multiplications that take as long as the sampler's work on one logit."""
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class Matrix(ctypes.Structure):
    """A weight with its scale and bias. It points into tensors, which its owner must keep alive."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scale", "bias")),
        *((name, _LONG) for name in ("out_features", "in_features")),
        ("dtype", _INT),
    )

    @classmethod
    def from_tensors(cls, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> "Matrix":
        """weight (out_features, in_features) float32, bfloat16, float16 or int8; products are multiplied by scale
        (out_features,) float32, then bias (out_features,) float32 is added."""
        assert weight.is_contiguous(), "kernels read rows of weights one after the other"
        return cls(weight.data_ptr(), address(scale), address(bias), *weight.shape, DTYPES[weight.dtype])


class Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class Channel(ctypes.Structure):
    _fields_ = (("query_key_value", Matrix), ("dense", Matrix))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Norm) for name in ("input_norm", "third_norm", "post_attention_norm", "fourth_norm")),
        *((name, Channel) for name in ("spatial", "temporal")),
        ("mix", _POINTER),
        *((name, Matrix) for name in ("up", "down")),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("layers", _POINTER),
        *((name, _LONG) for name in ("num_layers", "num_heads", "head_dim")),
        ("token_table", Matrix),
        ("num_tokens", _LONG),
        *((name, _POINTER) for name in ("first_positions", "extra_positions")),
        ("frame_len", _LONG),
        ("final_norm", Norm),
    )


class KeyTable(ctypes.Structure):
    """`model.plan.VisibleKeys`."""

    _fields_ = (
        *((name, _POINTER) for name in ("starts", "runs", "positions")),
        *((name, _LONG) for name in ("max_keys", "num_slots")),
    )


class KVBuffer(ctypes.Structure):
    """Keys and values of one channel of one layer."""

    _fields_ = (("key", _POINTER), ("value", _POINTER), ("num_positions", _LONG))


class StepGroup(ctypes.Structure):
    """The rows of one `DecodeInputs`."""

    _fields_ = (
        *((name, _POINTER) for name in ("buffers", "tables", "tokens", "slots", "spatial_bias", "temporal_bias")),
        *((name, _LONG) for name in ("batch", "rows", "text_len", "num_temporal")),
        ("cache_dtype", _INT),
    )


class Clusters(ctypes.Structure):
    """Image tokens by cluster, and the sampler's settings."""

    _fields_ = (
        *((name, _POINTER) for name in ("labels", "tokens", "starts")),
        *((name, _LONG) for name in ("num_tokens", "num_clusters", "top_k")),
        *((name, _FLOAT) for name in ("temperature", "token_temperature")),
    )


STRUCTURES = (Matrix, Norm, Channel, Layer, Model, KeyTable, KVBuffer, StepGroup, Clusters)
"""In the order of `cogvideo_structure_sizes` in cpu.cpp."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, kept in the user's private cache folder; None if they are not available."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        log.info("no C++ compiler found: decoding uses PyTorch alone, which is slower")
        return None
    try:
        # -march=native: code compiled on one machine may not run on another that shares the folder
        key = hashlib.sha256(_SOURCE.read_bytes() + repr((_FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
        folder = code_cache()
        path = folder / f"cpu-{key}.so"
        if not (path.is_file() and is_private(path)):
            log.info("compiling the decoding kernels for this processor into %s, once; takes a few seconds", folder)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                compiled = Path(scratch) / path.name
                command = [*shlex.split(compiler), *_FLAGS, "-o", str(compiled), str(_SOURCE)]
                subprocess.run(command, check=True, capture_output=True)
                compiled.chmod(0o700)
                compiled.replace(path)  # atomic, in case another process compiles it at the same time
        kernels = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        log.info("CPU kernels are not available (%s): decoding uses PyTorch alone, which is slower", error)
        return None
    return _declare(kernels)


def _declare(kernels: ctypes.CDLL) -> ctypes.CDLL | None:
    """Set the functions' types, or return None if the two sides disagree about the structures."""
    count = len(STRUCTURES)
    sizes = (_LONG * (count + 1))()
    kernels.cogvideo_structure_sizes(sizes, count + 1)
    expected = [*map(ctypes.sizeof, STRUCTURES), 0]
    if list(sizes) != expected:
        log.info("CPU kernels are not used: structure sizes are %s in C++, %s in Python", list(sizes), expected)
        return None
    kernels.cogvideo_linear.argtypes = [*[_POINTER] * 3, _LONG, _INT]
    kernels.cogvideo_decode_step.argtypes = [_POINTER, _POINTER, _LONG, _POINTER, _INT]
    kernels.cogvideo_sample_clusters.argtypes = [*[_POINTER] * 4, _LONG, _INT]
    kernels.cogvideo_decode_step.restype = _INT
    for kernel in (kernels.cogvideo_linear, kernels.cogvideo_sample_clusters):
        kernel.restype = None
    return kernels


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """`model.quantize.LinearKernel`: x (..., in_features) float32 of at most `MAX_ROWS` rows, on the CPU.

    Other arguments as in `Matrix.from_tensors`. A row's result does not depend on the other rows.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype not in DTYPES:
        return None
    if x.numel() > MAX_ROWS * x.shape[-1] or (kernels := library()) is None:
        return None
    x = x.contiguous()
    out_features, in_features = weight.shape
    y = x.new_empty(*x.shape[:-1], out_features)
    matrix = Matrix.from_tensors(weight, bias, scale)
    rows = x.numel() // in_features
    threads = threads_for(rows * out_features * in_features)
    kernels.cogvideo_linear(ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), rows, threads)
    return y


def sample_clusters(
    logits: Tensor,
    uniforms: Tensor,
    labels: Tensor,
    tokens: Tensor,
    starts: Tensor,
    *,
    temperature: float,
    top_k: int,
    token_temperature: float,
) -> Tensor | None:
    """What `inference.sampler.ClusterSampler` does in PyTorch, up to float rounding; None if it is not supported.

    Shapes: logits (..., num_tokens) float32; uniforms (..., 2) float64; labels (num_tokens,) the cluster of each token;
    tokens (num_tokens,) ordered by cluster, those of cluster c at tokens[starts[c]:starts[c + 1]] -> (...) int64.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or (kernels := library()) is None:
        return None
    logits, uniforms = logits.contiguous(), uniforms.to(torch.float64).contiguous()
    assert logits.shape[-1] == len(labels) and uniforms.shape == (*logits.shape[:-1], 2)
    clusters = Clusters(
        *map(address, (labels, tokens, starts)),
        *(len(labels), len(starts) - 1, top_k),
        *(temperature, token_temperature),
    )
    sampled = torch.empty(logits.shape[:-1], dtype=torch.int64)
    pointers = (ctypes.byref(clusters), *map(address, (logits, uniforms, sampled)))
    kernels.cogvideo_sample_clusters(*pointers, sampled.numel(), threads_for(_SAMPLER_COST * logits.numel()))
    return sampled


def address(tensor: Tensor | None) -> int | None:
    """The address of a tensor's data; None, a null pointer in C++, for None."""
    return None if tensor is None else tensor.data_ptr()


def threads_for(multiplications: int) -> int:
    """How many threads to use for a call. Small ones finish before a second thread has woken up."""
    return 1 if multiplications < SMALL_CALL else torch.get_num_threads()
