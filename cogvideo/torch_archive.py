"""The .pt files of torch.save: memory-mapped and read without running any code in them; written tensor by tensor.

Reading always uses `weights_only=True`, and checks the archive first, because torch trusts the sizes in it. We write
files ourselves because torch.save needs every tensor in memory at once; the layout is that of torch since 1.6.
"""

import io
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from cogvideo.dtypes import CODE_OF_DTYPE, STORAGE_OF_DTYPE
from cogvideo.files import disk_errors_name
from cogvideo.tensor_file import TensorInfo, chunks_as_bytes

MAX_PICKLE_BYTES = 4 << 20
"""About twenty times that of a full-size stage. One byte of a pickle can create a list, so this bounds memory too."""
MAX_TUPLE_ITEMS = 4096
"""Most items in a tuple, nested tuples included: Python hashes a dict key recursively, without a depth limit."""
ALIGNMENT = 64
LEGACY_NUMBER = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""A magic number in the first `LEGACY_BYTES` of files that torch before 1.6 wrote."""
LEGACY_BYTES = 32

# Training checkpoints also hold the state of a random generator as numpy arrays of plain numbers. We do not use it.
NUMPY_GLOBALS: list[Any] = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *[(np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")],
]
ALLOWED_GLOBALS = {
    *[f"torch {storage.__name__}" for storage in STORAGE_OF_DTYPE.values()],
    *[f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter")],
    *[f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")],
    "collections OrderedDict",
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",
    *[f"{builtins} set" for builtins in ("__builtin__", "builtins")],
    "torch Size",
    "torch device",
    *[str(dtype).replace(".", " ") for dtype in STORAGE_OF_DTYPE],
}
"""Everything a pickle may name: tensors, and what DeepSpeed stores beside them (shapes of flattened parameters, sets of
module names). Shorter than torch's own list, which has types that allocate as much memory as the pickle asks for.
"""


def read_module(path: Path) -> dict[str, Tensor]:
    """The tensors under 'module', memory-mapped: a published checkpoint, or the published image tokenizer.

    Raises: ValueError if the file is damaged, holds objects other than tensors and plain containers (the message names
    them, they are never created), or claims sizes larger than the file.
    """
    check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_GLOBALS):
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise ValueError(f"{path} is damaged or refused by torch: {_first_line(error)}") from None
    module = state.get("module") if isinstance(state, dict) else None
    if not isinstance(module, dict):
        raise ValueError(f"{path} holds no dict of tensors under 'module'; expected published weights")
    storages: dict[int, int] = {}
    for name, tensor in module.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: 'module' has a key that is a {type(name).__name__}, expected names of tensors")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: module[{name[:100]!r}] is a {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in CODE_OF_DTYPE:
            raise ValueError(f"{path}: tensor {name[:100]} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{path}: tensor {name[:100]} is not contiguous; expected published weights")
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if sum(storages.values()) > path.stat().st_size:
        raise ValueError(
            f"{path} claims {sum(storages.values())} bytes of tensors, more than the file has; fetch it again"
        )
    return {name: tensor.detach() for name, tensor in module.items()}


def check_archive(path: Path, *, checksums: bool = False) -> None:
    """Refuse archives that torch would read without enough checks; with `checksums`, also those with a changed byte."""
    with open(path, "rb") as file:
        try:
            _check_records(path, file, checksums)
        except _Refused:
            raise
        except Exception as error:  # zipfile raises a dozen exception types for damaged files
            reason = _first_line(error)
            raise _Refused(_not_an_archive(path, file, reason)) from None


def _not_an_archive(path: Path, file: BinaryIO, reason: str) -> str:
    file.seek(0)
    if LEGACY_NUMBER not in file.read(LEGACY_BYTES):
        return f"{path} is cut short, or not in the torch.save format of PyTorch 1.6 and later ({reason})"
    name = repr(path.name)
    return (
        f"{path} is in the torch.save format from before PyTorch 1.6; write it again with Python, in its folder: "
        f"torch.save(torch.load({name}, map_location='cpu', weights_only=True), {name})"
    )


class _Refused(ValueError):
    """Carries a message that is ready for the user."""


def _check_records(path: Path, file: BinaryIO, checksums: bool) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > size:
            raise _Refused(f"{path} claims more data than its {size} bytes; it is not a checkpoint")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise _Refused(f"{path} is compressed, which torch.save never does; it is not a checkpoint")
        for record in records:
            if record.filename.lower().endswith(".pkl"):
                if record.file_size > MAX_PICKLE_BYTES:
                    raise _Refused(f"{path} has a pickle of {record.file_size} bytes; it is not a checkpoint")
                _check_pickle(path, archive.read(record))
        broken = archive.testzip() if checksums else None
    if broken:
        raise _Refused(f"{path} is damaged: the checksum of its record {broken} is wrong; fetch it again")


def _check_pickle(path: Path, data: bytes) -> None:
    """Refuse a pickle that names anything but tensors and plain containers; nothing in it is created here."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and argument not in ALLOWED_GLOBALS:
            name = str(argument).replace(" ", ".")[:200]
            raise _Refused(f"{path} is refused: it holds {name}, and only tensors and plain containers are read")
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise _Refused(f"{path} is refused: its pickle names objects by {opcode.name}, which torch.save never does")
    if _largest_tuple(data) > MAX_TUPLE_ITEMS:
        raise _Refused(f"{path} is refused: its pickle nests tuples too deeply; it is not a checkpoint")


def _largest_tuple(data: bytes) -> int:
    """Number of items in a pickle's largest tuple, including those of nested tuples.

    Runs the pickle's stack machine on sizes instead of objects: every value on the stack and in the memo is the number
    of items that the object would have.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[str, int] = {}
    largest = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif "PUT" in opcode.name:
            memo[str(argument)] = stack[-1]
        elif opcode.name == "MEMOIZE":
            memo[str(len(memo))] = stack[-1]
        elif "GET" in opcode.name:
            stack.append(memo[str(argument)])
        else:
            to_mark = pickletools.markobject in opcode.stack_before  # takes all values above the last mark
            begin = marks.pop() if to_mark else len(stack)
            begin -= len(opcode.stack_before) - 2 * to_mark
            if begin < 0:
                raise ValueError("its pickle pops more than it pushed")
            size = 1 + sum(stack[begin:]) if opcode.name.startswith("TUPLE") else 1
            largest = max(largest, size)
            stack[begin:] = [size] * len(opcode.stack_after)
    return largest


def _first_line(error: Exception) -> str:
    boilerplate = ("Weights only load failed", "(1)", "(2)", "Please file an issue", "Check the documentation")
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line[:300] for line in lines if line and not line.startswith(boilerplate)), type(error).__name__)


class _PendingTensor:
    """A tensor that is not in memory yet; pickled as torch.save pickles the tensor itself."""

    def __init__(self, key: str, info: TensorInfo) -> None:
        self.key, self.info = key, info


class _PendingStorage:
    """The storage of a `_PendingTensor`; the pickle holds a reference to its record in the archive."""

    def __init__(self, tensor: _PendingTensor) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _PendingStorage):
            return None
        info = obj.tensor.info
        return ("storage", STORAGE_OF_DTYPE[info.dtype], obj.tensor.key, "cpu", info.numel)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _PendingTensor):
            return NotImplemented
        shape = obj.info.shape
        stride = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (_PendingStorage(obj), 0, shape, stride, False, OrderedDict())


def write_module(
    path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], rest: Mapping[str, Any]
) -> None:
    """Write {'module': tensors of `infos`} | `rest` as torch.save would, asking `read` for one tensor at a time."""
    tensors = {name: _PendingTensor(str(i), info) for i, (name, info) in enumerate(infos.items())}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump({"module": tensors, **rest})
    root = path.stem
    with (
        disk_errors_name(path),
        open(path, "wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):

        def add_record(name: str, nbytes: int, chunks: Iterable[bytes | memoryview]) -> None:
            info = zipfile.ZipInfo(f"{root}/{name}")
            is_large = nbytes > 1 << 30  # zipfile then adds a zip64 field of 20 bytes
            # the data follows the local header (30 bytes, the name, extra fields); padding aligns it as torch does
            start = file.tell() + 30 + len(info.filename) + 4 + (20 if is_large else 0)
            padding = -start % ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w", force_zip64=is_large) as out:
                for chunk in chunks:
                    out.write(chunk)

        add_record("data.pkl", pickled.tell(), [pickled.getvalue()])
        add_record("byteorder", 6, [b"little"])
        for name, tensor in tensors.items():
            add_record(f"data/{tensor.key}", tensor.info.nbytes, chunks_as_bytes(read(name), tensor.info.dtype))
        add_record("version", 2, [b"3\n"])
