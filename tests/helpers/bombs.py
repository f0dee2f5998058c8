"""Small files of every format but media that unpack to far more than they hold, or claim to: `bombs()`.

`scripts/check_hostile.py --readers` reads them and measures what that takes. Media are in hostile.py.
"""

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save

MILLION = 10**6


@dataclass(frozen=True)
class Bomb:
    """A file for a reader of `tests/helpers/readers.py`."""

    reader: str
    name: str
    make: Callable[[], bytes]


def bombs() -> list[Bomb]:
    """The largest file has 64 MiB."""
    lists = partial(repeated, b"[", b"[],", 10 * MILLION, b"0]")
    caption_lists = partial(repeated, b'{"video": "a.mp4", "caption": [', b"[],", MILLION // 4, b"0]}")
    made: dict[str, dict[str, Callable[[], bytes]]] = {
        "captions-json": {
            "lists": lists,
            "objects": partial(repeated, b"[", b'{"a":1},', 4 * MILLION, b"0]"),
            "paths": partial(repeated, b"{", b'"a.mp4":"x",', MILLION // 4, b'"b.mp4":"y"}'),
            "one-entry": partial(repeated, b'{"a": [', b"[],", 10 * MILLION, b"0]}"),
            "columns": partial(repeated, b'{"video": [', b"[],", 10 * MILLION, b'0], "caption": ["x"]}'),
            "wide-text": lambda: b'{"a": "' + b"x" * (64 << 20) + '\U0001f600"}'.encode(),
        },
        "captions-jsonl": {
            "lists": partial(repeated, caption_lists(), b"\n", 1),
            "blank-lines": partial(repeated, b"", b"\n", 16 << 20),
            "captions": partial(
                repeated, b"", repeated(b'{"video":"a.mp4","caption":[', b'"",', 300_000, b'"x"]}\n'), 20
            ),
        },
        "captions-csv": {
            "columns": partial(repeated, b"path,caption" + b"," * 500_000 + b"\n", b"," * 500_000 + b"\n", 10),
            "open-quote": partial(repeated, b'path,caption\n"', b"x\n", 8 << 20),
            "bad-rows": partial(repeated, b"path,caption\n", b"a,b,c\n", 2 * MILLION),
        },
        "captions-tar": {
            "long-name": partial(tar_header, tarfile.GNUTYPE_LONGNAME, tarfile.GNU_FORMAT),
            "pax-header": partial(tar_header, tarfile.XHDTYPE, tarfile.USTAR_FORMAT),
            "members": partial(tar_members, 40_000, "{}.txt"),
            "links": partial(tar_members, 40_000, "{}.mp4", tarfile.SYMTYPE),
            "one-sample": partial(tar_members, 40_000, "a.x{}"),
            "sparse": sparse_tar,
        },
        "captions-parquet": {
            "rows": partial(parquet, 20 * MILLION, "x"),
            "long-text": partial(parquet, 200_000, "x" * 60_000),
            "longer-text": partial(parquet, 100_000, "x" * 30 * MILLION),
            "list": parquet_list,
        },
        "sidecar": {"lists": partial(repeated, b"[", b"[],", 300_000, b"0]")},
        "prompts": {
            "lines": partial(repeated, b"", b"x\n", 2 << 20),
            "blank-lines": partial(repeated, b"", b"\n", 64 << 20),
        },
        "published-checkpoint": {
            "records": partial(archive, b"\x80\x02}.", 60_000),
            "lists": partial(archive, pickle_of(b"]")),
            "dicts": partial(archive, pickle_of(b"}")),
        },
        "published-image-tokenizer": {"dicts": partial(archive, pickle_of(b"}"))},
        "config-train": {
            "aliases": aliases,
            "keys": lambda: b"".join(b"k%d: 1\n" % number for number in range(80_000)),
            "lists": partial(repeated, b"a: [", b"[],", 300_000, b"]"),
        },
        "config-sampling": {"aliases": aliases},
        "json-shard": {
            "lists": partial(repeated, b'{"rows": [', b"[],", 10 * MILLION, b"0]}"),
            "texts": partial(repeated, b'{"rows": [', b'"ab",', 6 * MILLION, b"0]}"),
            "keys": lambda: b"{" + b",".join(b'"%d":0' % number for number in range(3 * MILLION)) + b"}",
        },
        "metrics": {
            "line": partial(repeated, b'{"step": ', b"1", 64 << 20),
            "lists": partial(repeated, b'{"step": [', b"[],", 5 * MILLION, b"0]}\n"),
        },
        "npy": {
            "objects": objects,
            "claim": partial(npy_header, "(1099511627776, 3)"),
            "dimensions": partial(npy_header, "(" + "1," * 30_000 + ")"),
            "nested": partial(npy_header, "(" * 30_000),
        },
        "npz": {"members": partial(npz_members, 60_000), "zeros": npz_zeros},
        "tensors": {
            "lists": lambda: with_length(repeated(b'{"a":[', b"[],", 5 * MILLION, b"0]}")),
            "tensors": lambda: with_length(tensor_entries(250_000)),
        },
        "tokens": {
            "lists": lambda: with_length(repeated(b'{"a":[', b"[],", 5 * MILLION, b"0]}")),
            "samples": partial(tokens_with_samples, 200_000),
        },
        "text-model": {"pieces": partial(repeated, b"", b"\n\x00", 8 << 20)},
    }
    return [Bomb(reader, name, make) for reader, kinds in made.items() for name, make in kinds.items()]


def repeated(start: bytes, part: bytes, count: int, end: bytes = b"") -> bytes:
    return start + part * count + end


def aliases() -> bytes:
    """YAML in which ten million values are aliases of aliases."""
    levels = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}' if level else 'x'] * 10)}]" for level in range(8)]
    return "\n".join(levels).encode()


def parquet(rows: int, text: str) -> bytes:
    """A text that is stored once, and in all rows; b"" without PyArrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return b""
    stream = io.BytesIO()
    first = pyarrow.array(np.zeros(rows, np.int32))
    columns = {
        name: pyarrow.DictionaryArray.from_arrays(first, pyarrow.array([value]))
        for name, value in (("video", "a.mp4"), ("caption", text))
    }
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, stream, row_group_size=rows, compression="zstd", store_schema=False)
    return stream.getvalue()


def parquet_list() -> bytes:
    """A row whose caption is a list of many numbers."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return b""
    stream = io.BytesIO()
    numbers = pyarrow.array(np.zeros(100 * MILLION, np.int64))
    captions = pyarrow.ListArray.from_arrays([0, len(numbers)], numbers)
    pyarrow.parquet.write_table(pyarrow.table({"video": ["a.mp4"], "caption": captions}), stream, compression="zstd")
    return stream.getvalue()


def tar_header(kind: bytes, format: Literal[0, 1, 2]) -> bytes:
    """A header that claims 1 GiB of names or attributes."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 1 << 30
    return info.tobuf(format) + bytes(1024)


def tar_members(count: int, name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    stream = io.BytesIO()
    for number in range(count):
        info = tarfile.TarInfo(name.format(number))
        info.type, info.linkname = kind, "/etc/passwd"
        stream.write(info.tobuf())
    return stream.getvalue() + bytes(1024)


def sparse_tar() -> bytes:
    """A sparse member that claims 8 GiB and has 20,000 headers."""
    info = tarfile.TarInfo("a.mp4")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482], header[483:495] = 1, b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    extension = bytearray(512)
    extension[504] = 1
    return bytes(header) + bytes(extension) * 20_000


def npy_header(shape: str, kind: str = "<u2") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def objects() -> bytes:
    """An array of Python objects, which are pickled."""
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], object), allow_pickle=True)
    return stream.getvalue()


def npz_members(count: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number}.npy", npy_header("(0,)"))
    return stream.getvalue()


def npz_zeros() -> bytes:
    """A megabyte that unpacks to a gigabyte."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        member.write(npy_header(f"({1 << 30},)", "|u1"))
        for _ in range(1 << 10):
            member.write(bytes(1 << 20))
    return stream.getvalue()


def pickle_of(opcode: bytes) -> bytes:
    """A pickle of as many empty lists or dicts as the limit on pickles allows."""
    return b"\x80\x02(" + opcode * ((4 << 20) - 10) + b"l."


def archive(pickled: bytes, records: int = 0) -> bytes:
    """A file of torch.save."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for number in range(records):
            archive.writestr(f"x/data/{number}", b"")
    return stream.getvalue()


def with_length(header: bytes) -> bytes:
    """A header of safetensors."""
    return len(header).to_bytes(8, "little") + header


def tensor_entries(count: int) -> bytes:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % number for number in range(count)) + b"}"


def tokens_with_samples(count: int) -> bytes:
    tokens = {"tokens": torch.zeros(1, 2, 4, dtype=torch.uint8), "seconds": torch.tensor(4.0)}
    return save(tokens, {"samples": json.dumps([{"prompt": "a", "number": 0}] * count)})
