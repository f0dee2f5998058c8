"""Captions as a Parquet file, read in batches with PyArrow, which the extra `[parquet]` installs."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from cogvideo.data.readers.records import ReadOptions, Row

BATCH_ROWS = 4096
PIECE_BYTES = 128 << 20
"""Of rows that are in memory at once, uncompressed, equal texts counted once."""
MAX_GROUP_BYTES = 1 << 32
"""Of the columns of a row group that are read, uncompressed."""
MAX_TEXT_BYTES = 16 << 20
"""Texts that become Python's at once, those of one row at least."""
MAX_VALUES = 1 << 26
"""In a column of a row group."""
VALUE_BYTES = 8
"""What a value takes besides its text."""
MAX_ROWS, MAX_ROWS_PER_BYTE = 1 << 20, 16
"""More rows than the first need a file that is large enough: they can be claimed in a few bytes."""


class ParquetRows:
    """Records of a Parquet file. Positions are row numbers; one row group, or a part of a large one, is in memory.

    Columns of bytes, such as embedded media, are left out. Texts stay in dictionaries, so that one that is repeated in
    many rows is held once.
    """

    is_text = False

    def __init__(self, path: Path, options: ReadOptions):
        """Raises: OSError; ValueError without PyArrow, for a damaged file, or for one without the needed columns."""
        try:
            import pyarrow
            import pyarrow.parquet
            import pyarrow.types
        except ImportError:
            problem = f"{path}: reading .parquet needs PyArrow, which is not installed; pip install -e '.[parquet]'"
            raise ValueError(problem) from None
        self._tables = pyarrow.Table
        self._path, self._errors = path, (pyarrow.ArrowException, OSError, UnicodeDecodeError, RuntimeError)
        with open(path, "rb"):
            pass  # PyArrow's message for a missing file is not one line
        try:
            plain = pyarrow.parquet.ParquetFile(path)
            columns = [plain.schema.column(number) for number in range(len(plain.schema))]
            self._paths = [column.path for column in columns]
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
            self._file: Any = pyarrow.parquet.ParquetFile(path, read_dictionary=texts, pre_buffer=False)
            schema, types = plain.schema_arrow, pyarrow.types
            names = list(schema.names)
        except self._errors as error:
            raise self._damaged(error) from None
        binary = {field.name for field in schema if _holds_bytes(field.type, types)}
        self._columns = [name for name in dict.fromkeys(names) if name not in binary]
        try:
            roles = options.roles(names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for role in ("video", "caption"):
            if role not in roles:
                raise ValueError(f"{path}: {options.missing(role, names)}")
            if roles[role] in binary:
                raise ValueError(f"{path}: column {roles[role]!r} holds bytes; expected text, such as paths of videos")
        metadata, size = self._file.metadata, path.stat().st_size
        if metadata.num_rows > max(MAX_ROWS, MAX_ROWS_PER_BYTE * size):
            raise ValueError(f"{path} claims {metadata.num_rows} rows in {size} bytes; is it a captions file?")
        try:
            self._groups = [self._group(number) for number in range(metadata.num_row_groups)]
        except self._errors as error:
            raise self._damaged(error) from None
        self._ends = list(accumulate(group.rows for group in self._groups))
        self._pieces: Iterator[_Piece] = iter(())
        self._piece: _Piece | None = None

    def scan(self) -> Iterator[Row]:
        number = 0
        try:
            for group in range(len(self._groups)):
                for piece in self._pieces_of(group):
                    for start in range(0, piece.table.num_rows, BATCH_ROWS):
                        for fields in _records(piece.table.slice(start, BATCH_ROWS)):
                            yield _row(number, fields)
                            number += 1
        except self._errors as error:
            raise self._damaged(error) from None

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        for number in positions:
            try:
                piece = self._piece_with(number)
                (fields,) = _records(piece.table.slice(number - piece.start, 1))
            except self._errors as error:
                raise self._damaged(error) from None
            yield _row(number, fields)

    def _piece_with(self, number: int) -> "_Piece":
        """The part of a row group with this row: the one in memory, one of those that follow it, or read anew."""
        group = bisect_right(self._ends, number)
        if group == len(self._ends):
            raise ValueError(f"{self._path}: the file has changed; start again")
        piece, self._piece = self._piece, None  # free the last one first
        if piece is None or piece.group != group or number < piece.start:
            piece = None
            self._pieces = self._pieces_of(group)
        while piece is None or number >= piece.start + piece.table.num_rows:
            piece = next(self._pieces, None)
            if piece is None:
                raise ValueError(f"{self._path}: the file has changed; start again")
        self._piece = piece
        return piece

    def _pieces_of(self, number: int) -> Iterator["_Piece"]:
        """A row group as a whole, or in parts if it is large."""
        group = self._groups[number]
        start = self._ends[number] - group.rows
        if group.bytes <= PIECE_BYTES:
            yield _Piece(number, start, self._file.read_row_group(number, columns=self._columns, use_threads=False))
            return
        rows = max(1, PIECE_BYTES * group.rows // group.bytes)
        for batch in self._file.iter_batches(rows, [number], columns=self._columns, use_threads=False):
            yield _Piece(number, start, self._tables.from_batches([batch]))
            start += batch.num_rows

    def _group(self, number: int) -> "_Group":
        """A row group's size. Raises: ValueError if it is too large."""
        row_group, names = self._file.metadata.row_group(number), tuple(f"{name}." for name in self._columns)
        leaves = [leaf for leaf, path in enumerate(self._paths) if f"{path}.".startswith(names)]
        # PyArrow ends the process for some damaged columns, unless it has met the damage while it reads them.
        next(self._file.iter_batches(1, [number], columns=self._columns, use_threads=False), None)
        columns = [row_group.column(leaf) for leaf in leaves]
        values = max((column.num_values for column in columns), default=0)
        size = sum(column.total_uncompressed_size + VALUE_BYTES * column.num_values for column in columns)
        if size > MAX_GROUP_BYTES:
            most = f"{MAX_GROUP_BYTES >> 20} MiB"
            raise ValueError(f"{self._path}: a row group of {size >> 20} MiB; write it in row groups of at most {most}")
        if values > MAX_VALUES:
            problem = f"a row group with {values} values in a column; write it in row groups of at most {MAX_VALUES}"
            raise ValueError(f"{self._path}: {problem}")
        return _Group(row_group.num_rows, size)

    def _damaged(self, error: Exception) -> ValueError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ValueError(f"{self._path} is not a readable Parquet file ({reason}); write it again")


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


def _records(table: Any) -> Iterator[dict[str, Any] | None]:
    """The fields of each row; None for one whose texts are too long."""
    texts = sum(_text_bytes(chunk) for column in table.columns for chunk in column.chunks)
    if texts <= MAX_TEXT_BYTES:
        yield from table.to_pylist()
    elif table.num_rows == 1:
        yield None
    else:
        half = table.num_rows // 2
        yield from _records(table.slice(0, half))
        yield from _records(table.slice(half))


def _text_bytes(values: Any) -> int:
    """Bytes of all texts in an array, those in lists and dictionaries included."""
    import pyarrow.compute as compute
    from pyarrow import types

    kind = values.type
    if types.is_dictionary(kind):
        used = values.indices.unique()  # the dictionary is that of many rows
        lengths = compute.binary_length(values.dictionary.take(used))
        return compute.sum(lengths.take(compute.index_in(values.indices, used))).as_py() or 0
    if types.is_struct(kind):
        return sum(map(_text_bytes, values.flatten()))
    if types.is_map(kind):  # has no `flatten`
        first, last = values.offsets[0].as_py(), values.offsets[-1].as_py()
        return sum(_text_bytes(part.slice(first, last - first)) for part in (values.keys, values.items))
    return _text_bytes(values.flatten()) if types.is_nested(kind) else 0


def _holds_bytes(kind: Any, types: Any) -> bool:
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    return types.is_nested(kind) and any(_holds_bytes(kind.field(i).type, types) for i in range(kind.num_fields))


def _row(number: int, fields: dict[str, Any] | None) -> Row:
    if fields is None:
        return Row(number, f"row {number + 1}", {}, f"its texts take more than {MAX_TEXT_BYTES} bytes")
    return Row(number, f"row {number + 1}", {name: _without_nan(value) for name, value in fields.items()})


def _without_nan(value: Any) -> Any:
    """pandas writes missing numbers as nan."""
    return None if isinstance(value, float) and math.isnan(value) else value
