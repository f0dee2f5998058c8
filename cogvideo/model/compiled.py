"""How functions are compiled here: one graph without breaks, with static shapes, for every shape that occurs."""

import os
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._triton import has_triton

from cogvideo.files import code_cache

RECOMPILE_LIMIT = 256
"""Maximum number of shapes per compiled function. PyTorch's own limit of 8 is for shapes that should be dynamic;
here they are few by construction (texts padded to multiples), but each stage, batch size and schedule has its own."""
_Inputs = ParamSpec("_Inputs")
_Output = TypeVar("_Output")


def check_compiler(device: torch.device) -> None:
    """Raises: ValueError if torch.compile has no compiler for this device."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError(
                "torch.compile needs a C++ compiler on a CPU; install g++, or set train.compile=false"
            ) from None
    elif not has_triton():
        raise ValueError(f"torch.compile needs Triton on {device.type}; install it, or set train.compile=false")


def compile_static(
    function: Callable[_Inputs, _Output], backend: str | Callable[..., object] = "inductor"
) -> Callable[_Inputs, _Output]:
    """Compile a function once per shape of its inputs.

    Code that cannot be one graph is an error, and so are too many shapes: nothing silently falls back to eager.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():  # torch may have set it
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    @wraps(function)
    def call(*args: _Inputs.args, **kwargs: _Inputs.kwargs) -> _Output:
        if not torch.compiler.is_compiling():
            _raise_limits()
        return compiled(*args, **kwargs)

    return call


def _raise_limits() -> None:
    """Raise PyTorch's limits for this thread: from 2.13 on, each thread starts with the defaults."""
    config = torch._dynamo.config
    if config.recompile_limit < RECOMPILE_LIMIT:  # setting takes longer than reading
        config.recompile_limit = RECOMPILE_LIMIT
    if config.accumulated_recompile_limit < 4 * RECOMPILE_LIMIT:
        config.accumulated_recompile_limit = 4 * RECOMPILE_LIMIT


@cache
def _inductor_cache() -> str:
    """Where PyTorch caches compiled code. Its own choice is a folder in /tmp, which another user can create first."""
    try:
        return str(code_cache() / "inductor")
    except OSError:
        return _temporary_folder().name


@cache
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """A private folder, removed when this process ends."""
    return tempfile.TemporaryDirectory()
