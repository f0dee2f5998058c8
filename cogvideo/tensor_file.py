"""A single safetensors file, not a checkpoint: written tensor by tensor; every value in the header is checked.

The safetensors library needs all tensors in memory to write a file, and accepts a header that names a tensor twice. So
we write and read the (simple) header ourselves: 8 bytes of length, JSON, then the data. The library reads the data
through a memory map.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cogvideo.dtypes import CODE_OF_DTYPE, DTYPE_OF_CODE, dtype_name
from cogvideo.files import disk_errors_name, parse_json, torch_errors_as_os_errors

MAX_HEADER_BYTES = 16 << 20
"""About a hundred times the header of a full-size stage; bounds what a hostile file can make us allocate."""
WRITE_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a tensor, as in a header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)}"


def write_tensor_file(path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> str:
    """Write the tensors of `infos`, getting one at a time from `read(name)`, and return the file's sha256.

    Wider types are written first, so that every tensor is aligned; otherwise the order of `infos` is kept. A tensor
    that `read` returns in another dtype is cast chunk by chunk, without a second full copy.
    """
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    header, offset = {}, 0
    for name in order:
        info = infos[name]
        if info.dtype not in CODE_OF_DTYPE:
            raise ValueError(f"tensor {name} is {info.dtype}, which checkpoints cannot hold; cast it first")
        header[name] = {
            "dtype": CODE_OF_DTYPE[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES
    digest = hashlib.sha256()
    with disk_errors_name(path), open(path, "wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for name in order:
            tensor = read(name)
            assert tuple(tensor.shape) == infos[name].shape, name
            for chunk in chunks_as_bytes(tensor, infos[name].dtype):
                digest.update(chunk)
                file.write(chunk)
            del tensor  # before the next is read
    return digest.hexdigest()


def chunks_as_bytes(tensor: Tensor, dtype: torch.dtype) -> Iterable[memoryview]:
    """The tensor's values in `dtype`, row-major, in chunks of bounded size."""
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(WRITE_CHUNK_BYTES // dtype.itemsize):
        raw = piece.to(device="cpu", dtype=dtype).contiguous().view(torch.uint8)
        yield memoryview(raw.numpy())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped. Raises: OSError; ValueError, naming the file, if it is damaged."""
    read_header(path)
    try:
        with torch_errors_as_os_errors():
            return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0][:200]}") from None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Type and shape of every tensor in the file, in the order of their data.

    Raises: ValueError, naming the file and what is wrong; FileNotFoundError.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut short or not a safetensors file: {size} bytes; fetch or write it again")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
        header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is not a JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ValueError(f"{path} is damaged: its header's __metadata__ is not an object with text values")
    spans = sorted((_check_entry(path, name, entry) for name, entry in header.items()), key=lambda span: span[:2])
    position = 0
    for begin, end, name, _ in spans:
        if begin != position:
            raise ValueError(f"{path} is damaged: tensor {name!r} begins at byte {begin}, expected {position}")
        position = end
    if position != size - 8 - length:
        raise ValueError(
            f"{path} is cut short or padded: {size - 8 - length} bytes of data, its header says {position}"
        )
    return {name: info for _, _, name, info in spans}


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int, str, TensorInfo]:
    """Check one entry of a header and return (first byte, end, name, info)."""
    entry_of = f"{path} is damaged: the header's entry for tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{entry_of} does not give dtype, shape and data_offsets")
    dtype = DTYPE_OF_CODE.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(
            f"{entry_of} has dtype {str(entry['dtype'])[:40]!r}; expected one of {', '.join(DTYPE_OF_CODE)}"
        )
    for key in ("shape", "data_offsets"):
        if not isinstance(entry[key], list) or not all(type(n) is int and 0 <= n < 2**63 for n in entry[key]):
            raise ValueError(f"{entry_of} has a {key} that is not a list of non-negative integers")
    if len(entry["data_offsets"]) != 2 or len(entry["shape"]) > 8:
        raise ValueError(f"{entry_of} has too many numbers")
    info = TensorInfo(dtype, tuple(entry["shape"]))
    begin, end = entry["data_offsets"]
    if end - begin != info.nbytes:
        raise ValueError(f"{entry_of} spans {end - begin} bytes, {info} needs {info.nbytes}")
    return begin, end, name, info
