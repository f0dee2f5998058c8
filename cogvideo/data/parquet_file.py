"""Reads a Parquet file in the worker process (`media.worker`): checks sizes first, then sends rows in parts as JSON.

`readers.parquet` requests them. PyArrow trusts the file's index, and a damaged one can crash the process.
"""

import datetime
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvideo.media.byte_range import FILE_ERRORS
from cogvideo.media.confinement import LIMIT_ERRORS, allow_memory
from cogvideo.media.container import Limits, TooLargeError
from cogvideo.media.worker import Answer

BATCH_ROWS = 4096
ANSWER_BYTES = 4 << 20
"""Limit on one row, or on rows sent together, as JSON."""
PIECE_BYTES = 64 << 20
"""Rows in memory at once, uncompressed, with equal texts counted once."""
MAX_GROUP_BYTES = 1 << 32
"""Limit on the columns read from a row group, uncompressed."""
MAX_VALUES = 1 << 26
"""Limit per column of a row group."""
VALUE_BYTES, VALUE_JSON_BYTES = 8, 2
"""Memory that a value takes besides its text, and the least that it takes as JSON."""
MAX_ROWS, MAX_ROWS_PER_BYTE = 1 << 20, 16
"""More than MAX_ROWS rows require a large enough file, since a few bytes can claim any number of rows."""
BUFFER_BYTES = 1 << 20
"""Read buffer for a column's compressed data."""
MEMORY, MEMORY_PER_BYTE = 384 << 20, 4
"""What reading may take, fixed and per byte of the file; an index is larger in memory than in the file."""

Kind = Literal["text", "seconds", "other"]
"""The kind of a column, which decides how values of types that JSON lacks are sent."""


def describe(path: Path, limits: Limits) -> Iterator[Answer]:
    """Answer with the number of rows, a stamp that differs once the file has changed, and columns as JSON.

    Columns are [name, whether it holds bytes]. Raises: ValueError for a damaged file, or one that is too large.
    """
    file = _open(path, limits)
    columns = json.dumps(file.columns).encode()
    if len(columns) > ANSWER_BYTES:
        raise TooLargeError(f"{path}: its column names take {len(columns)} bytes; expected at most {ANSWER_BYTES}")
    yield {"rows": file.num_rows, "stamp": file.stamp}, (np.frombuffer(columns, np.uint8),)


def read_rows(
    path: Path, limits: Limits, stamp: list[int], kinds: dict[str, Kind], positions: Sequence[int]
) -> Iterator[Answer]:
    """Answer with the rows at `positions`, in order, until they reach ANSWER_BYTES; at least one.

    Each answer covers consecutive rows. It has their number and, as JSON, the column names and a list of values per
    column; or the number of rows that are too large, and no JSON.
    Raises: ValueError if the file has changed or is damaged.
    """
    file, size = _open(path, limits), 0
    if file.stamp != stamp:
        raise ValueError(f"{path}: the file has changed; start again")
    for start, end in _runs(positions):
        while start < end:
            with _damage_named(path):
                count, data = file.encode(start, end, kinds)
            yield {"count": count}, (np.frombuffer(data, np.uint8),) if data else ()
            start, size = start + count, size + len(data)
            if size >= ANSWER_BYTES:
                return


class _File:
    """An open file, and the rows that were read last.

    Columns of bytes, such as embedded media, are left out. Texts stay dictionary-encoded, so that one that many rows
    repeat is held once.
    """

    def __init__(self, path: Path):
        """Raises: ValueError, and PyArrow's errors for a damaged file."""
        from pyarrow import parquet, types

        self.stamp = _stamp(path)
        plain = parquet.ParquetFile(path)
        leaves = [plain.schema.column(number) for number in range(len(plain.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        self._file = parquet.ParquetFile(path, read_dictionary=texts, pre_buffer=False, buffer_size=BUFFER_BYTES)
        self.columns = [(field.name, _holds_bytes(field.type, types)) for field in plain.schema_arrow]
        binary = {name for name, holds_bytes in self.columns if holds_bytes}
        self._names = [name for name in dict.fromkeys(plain.schema_arrow.names) if name not in binary]
        metadata, size = self._file.metadata, path.stat().st_size
        self.num_rows = metadata.num_rows
        if self.num_rows > max(MAX_ROWS, MAX_ROWS_PER_BYTE * size):
            raise TooLargeError(f"{path} claims {self.num_rows} rows in {size} bytes; is it a captions file?")
        prefixes = tuple(f"{name}." for name in self._names)
        wanted = [number for number, leaf in enumerate(leaves) if f"{leaf.path}.".startswith(prefixes)]
        self._groups = [_group(path, metadata.row_group(n), wanted) for n in range(metadata.num_row_groups)]
        self._ends = list(accumulate(group.rows for group in self._groups))
        self._pieces: Iterator[_Piece] = iter(())
        self._piece: _Piece | None = None
        self._batch_rows = BATCH_ROWS

    def encode(self, start: int, end: int, kinds: dict[str, Kind]) -> tuple[int, bytes]:
        """Rows from `start` on, at most up to `end` -> their number, and columns as JSON; b"" if they are too large."""
        piece = self._piece_with(start)
        first = start - piece.start
        sizes = piece.sizes[first : first + min(end - start, BATCH_ROWS)]
        if sizes[0] > ANSWER_BYTES:
            return _count(sizes > ANSWER_BYTES), b""
        count = min(_count(np.cumsum(sizes) <= ANSWER_BYTES), self._batch_rows)
        while True:
            data = _columns_as_json(piece.table.slice(first, count), kinds)
            if len(data) <= ANSWER_BYTES:
                self._batch_rows = min(BATCH_ROWS, 2 * count)
                return count, data
            if count == 1:
                return 1, b""
            count //= 2

    def _piece_with(self, number: int) -> "_Piece":
        """The part of a row group that has this row: the one in memory, a later one of its group, or one read anew."""
        group = bisect_right(self._ends, number)
        if group == len(self._ends):
            raise RuntimeError("it has fewer rows than its index says")
        piece, self._piece = self._piece, None  # free the last one first
        if piece is None or piece.group != group or number < piece.start:
            piece = None
            self._pieces = self._pieces_of(group)
        while piece is None or number >= piece.start + len(piece.sizes):
            piece = next(self._pieces, None)
            if piece is None:
                raise RuntimeError("it has fewer rows than its index says")
        self._piece = piece
        return piece

    def _pieces_of(self, number: int) -> Iterator["_Piece"]:
        """A row group as a whole, or in parts if it is large."""
        from pyarrow import Table

        group = self._groups[number]
        start = self._ends[number] - group.rows
        if group.bytes <= PIECE_BYTES:
            table = self._file.read_row_group(number, columns=self._names, use_threads=False)
            yield _Piece(number, start, table, _row_bytes(table))
            return
        rows = max(1, PIECE_BYTES * group.rows // group.bytes)
        for batch in self._file.iter_batches(rows, [number], columns=self._names, use_threads=False):
            table = Table.from_batches([batch])
            yield _Piece(number, start, table, _row_bytes(table))
            start += batch.num_rows


class _Group(NamedTuple):
    """The size of a row group."""

    rows: int
    bytes: int


class _Piece(NamedTuple):
    """Rows of a row group."""

    group: int
    start: int
    """Number of its first row in the file."""
    table: Any
    sizes: NDArray[np.int64]
    """Estimated bytes of each row as JSON; a row may take more."""


_opened: tuple[Path, _File] | None = None
"""The file opened last; the next request probably continues reading it."""


def _open(path: Path, limits: Limits) -> _File:
    """Return the open file, opening it if needed, and limit memory. Raises: ValueError."""
    global _opened
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet
    import pyarrow.types  # noqa: F401  (before the limit, which is for the file)

    allow_memory(min(limits.memory, MEMORY + MEMORY_PER_BYTE * path.stat().st_size))
    if _opened is None or _opened[0] != path or _opened[1].stamp != _stamp(path):
        _opened = None
        with _damage_named(path):
            _opened = path, _File(path)
    return _opened[1]


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn PyArrow's errors, which are of many types, into one line that names the file. Raises: ValueError."""
    try:
        yield
    except (MemoryError, TooLargeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (*FILE_ERRORS, *LIMIT_ERRORS):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} is not a readable Parquet file ({reason}); write it again") from None


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _group(path: Path, row_group: Any, leaves: list[int]) -> _Group:
    """A row group's size. Raises: TooLargeError."""
    columns = [row_group.column(leaf) for leaf in leaves]
    values = max((column.num_values for column in columns), default=0)
    size = sum(column.total_uncompressed_size + VALUE_BYTES * column.num_values for column in columns)
    if size > MAX_GROUP_BYTES:
        most = f"{MAX_GROUP_BYTES >> 20} MiB"
        raise TooLargeError(f"{path}: a row group of {size >> 20} MiB; write it in row groups of at most {most}")
    if values > MAX_VALUES:
        problem = f"a row group with {values} values in a column; write it in row groups of at most {MAX_VALUES}"
        raise TooLargeError(f"{path}: {problem}")
    return _Group(row_group.num_rows, size)


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges (start, end) of consecutive positions."""
    numbers = np.array(positions, np.int64)
    cuts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    return [(positions[start], positions[end - 1] + 1) for start, end in pairwise(cuts)]


def _count(flags: NDArray[np.bool_]) -> int:
    """The number of leading true flags, at least 1."""
    return len(flags) if flags.all() else max(1, int(np.argmin(flags)))


def _columns_as_json(table: Any, kinds: dict[str, Kind]) -> bytes:
    parts = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        default = OTHER_TYPES[kinds.get(name, "other")]
        parts.append(json.dumps(column.to_pylist(), ensure_ascii=False, default=default))
    return f"[{json.dumps(table.column_names)}, [{', '.join(parts)}]]".encode()


def _as_seconds(value: Any) -> float | str:
    if isinstance(value, datetime.time):
        since_midnight = datetime.datetime.combine(datetime.date.min, value) - datetime.datetime.min
        return since_midnight.total_seconds()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    return float(value) if isinstance(value, Decimal) else str(value)


def _as_no_text(value: Any) -> dict[str, str]:
    """What messages show for a value that should be text."""
    return {type(value).__name__: str(value)}


OTHER_TYPES: dict[Kind, Callable[[Any], Any]] = {"text": _as_no_text, "seconds": _as_seconds, "other": str}
"""Converters for values of types that JSON lacks, by kind of column."""


def _row_bytes(table: Any) -> NDArray[np.int64]:
    """Estimate the bytes of each row as JSON; a row may take more."""
    sizes = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        sizes += np.concatenate([np.zeros(0, np.int64), *map(_value_bytes, column.chunks)])
    return sizes


def _value_bytes(values: Any) -> NDArray[np.int64]:
    """The same for each value of an array."""
    from pyarrow import compute, types

    kind = values.type
    if types.is_dictionary(kind):
        lengths = _value_bytes(values.dictionary)
        used = compute.fill_null(values.indices, 0).to_numpy(zero_copy_only=False)
        return lengths[used] if len(lengths) else np.zeros(len(values), np.int64)
    if types.is_struct(kind):
        return np.sum([np.zeros(len(values), np.int64), *map(_value_bytes, values.flatten())], 0)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        items = _value_bytes(values.values)
        ends = values.offsets.to_numpy(zero_copy_only=False)
        return np.diff(np.concatenate([[0], np.cumsum(items)])[ends])
    if types.is_fixed_size_list(kind):
        items = _value_bytes(values.values).reshape(-1, kind.list_size)
        return items[values.offset : values.offset + len(values)].sum(1)
    if types.is_string_view(kind):
        values = values.cast("large_string")
    if types.is_string(values.type) or types.is_large_string(values.type):
        return compute.fill_null(compute.binary_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.full(len(values), VALUE_JSON_BYTES, np.int64)


def _holds_bytes(kind: Any, types: Any) -> bool:
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    return types.is_nested(kind) and any(_holds_bytes(kind.field(i).type, types) for i in range(kind.num_fields))
