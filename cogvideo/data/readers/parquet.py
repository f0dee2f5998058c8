"""Captions as a Parquet file, read in batches with PyArrow, which the extra `[parquet]` installs."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cogvideo.data.readers.records import ReadOptions, Row

BATCH_ROWS = 4096
MAX_GROUP_BYTES = 1 << 32
"""Of the columns of a row group that are read, uncompressed."""


class ParquetRows:
    """Records of a Parquet file. Positions are row numbers; one row group at a time is in memory.

    Columns of bytes, such as embedded media, are left out.
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
        self._path, self._errors = path, (pyarrow.ArrowException, OSError, UnicodeDecodeError)
        with open(path, "rb"):
            pass  # PyArrow's message for a missing file is not one line
        try:
            self._file: Any = pyarrow.parquet.ParquetFile(path)
            schema, types = self._file.schema_arrow, pyarrow.types
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
        metadata = self._file.metadata
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._cached: tuple[int, Any] = (-1, None)

    def scan(self) -> Iterator[Row]:
        number = 0
        try:
            for batch in self._file.iter_batches(BATCH_ROWS, columns=self._columns):
                for fields in batch.to_pylist():
                    yield _row(number, fields)
                    number += 1
        except self._errors as error:
            raise self._damaged(error) from None

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        for number in positions:
            group = bisect_right(self._starts, number) - 1
            if group >= len(self._starts) - 1:
                raise ValueError(f"{self._path}: the file has changed; start again")
            table = self._group(group)
            try:
                (fields,) = table.slice(number - self._starts[group], 1).to_pylist()
            except self._errors as error:
                raise self._damaged(error) from None
            yield _row(number, fields)

    def _group(self, group: int) -> Any:
        if self._cached[0] != group:
            if (size := self._group_bytes(group)) > MAX_GROUP_BYTES:
                most = MAX_GROUP_BYTES >> 20
                raise ValueError(
                    f"{self._path}: a row group of {size >> 20} MiB; write it in row groups of at most {most} MiB"
                )
            self._cached = -1, None  # free the last one first
            try:
                self._cached = group, self._file.read_row_group(group, columns=self._columns)
            except self._errors as error:
                raise self._damaged(error) from None
        return self._cached[1]

    def _group_bytes(self, group: int) -> int:
        """Uncompressed bytes of the columns that are read."""
        row_group, names = self._file.metadata.row_group(group), tuple(f"{name}." for name in self._columns)
        columns = map(row_group.column, range(row_group.num_columns))
        return sum(
            column.total_uncompressed_size for column in columns if f"{column.path_in_schema}.".startswith(names)
        )

    def _damaged(self, error: Exception) -> ValueError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ValueError(f"{self._path} is not a readable Parquet file ({reason}); write it again")


def _holds_bytes(kind: Any, types: Any) -> bool:
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    return types.is_nested(kind) and any(_holds_bytes(kind.field(i).type, types) for i in range(kind.num_fields))


def _row(number: int, fields: dict[str, Any]) -> Row:
    return Row(number, f"row {number + 1}", {name: _without_nan(value) for name, value in fields.items()})


def _without_nan(value: Any) -> Any:
    """pandas writes missing numbers as nan."""
    return None if isinstance(value, float) and math.isnan(value) else value
