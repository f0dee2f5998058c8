"""Compile the device; imports no PyTorch, which must come after it."""

import ctypes
import subprocess
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parent / "device.cpp"


def torch_folder() -> Path:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def has_cuda_build() -> bool:
    """Whether PyTorch brings its own CUDA, which this device cannot replace."""
    return (torch_folder() / "lib/libtorch_cuda.so").exists()


def build(library: Path) -> None:
    """Raises: CalledProcessError with the compiler's messages, FileNotFoundError without a compiler."""
    torch = torch_folder()
    command = [
        "g++",
        "-std=c++20",
        "-O0",
        "-shared",
        "-fPIC",
        f"-I{torch / 'include'}",
        str(SOURCE),
        "-o",
        str(library),
    ]
    command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    subprocess.run(command, check=True, capture_output=True, text=True)


def load(library: Path) -> None:
    """Call this before the first import of PyTorch."""
    ctypes.CDLL(str(library))
