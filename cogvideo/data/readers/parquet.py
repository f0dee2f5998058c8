"""Captions as a Parquet file, which PyArrow parses in another process; the extra `[parquet]` installs it."""

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from cogvideo.data import parquet_file
from cogvideo.data.parquet_file import ANSWER_BYTES, BATCH_ROWS, Kind
from cogvideo.data.readers.records import ReadOptions, Row
from cogvideo.media.container import Limits
from cogvideo.media.sandbox import Parser, damaged_answers, last_answer, run
from cogvideo.media.worker import Answer

PYARROW = Parser("PyArrow", "write it again")
SECONDS, SECONDS_PER_MB = 30, 2
"""Processor time per request for a few thousand rows; a large row group may have to be read up to those rows."""
MAX_BYTES, MAX_BYTES_PER_BYTE = 128 << 20, 1024
"""More than MAX_BYTES of rows, as JSON, require a large enough file: a text stored once may be in every row."""


class ParquetRows:
    """Records of a Parquet file. Positions are row numbers; a few megabytes of rows are in memory at a time."""

    is_text = False

    def __init__(self, path: Path, options: ReadOptions):
        """Raises: OSError; ValueError without PyArrow, for a damaged file, or for one without the needed columns."""
        if find_spec("pyarrow") is None:
            raise ValueError(
                f"{path}: reading .parquet needs PyArrow, which is not installed; pip install -e '.[parquet]'"
            )
        with open(path, "rb") as file:
            self._size = file.seek(0, 2)
        self._path, self._limits = path, Limits(cpu_seconds=SECONDS + SECONDS_PER_MB * self._size // 10**6)
        fields, arrays = last_answer(path, self._ask(parquet_file.describe))
        with damaged_answers(path):
            self._num_rows, self._stamp = int(fields["rows"]), fields["stamp"]
            columns = [(str(name), bool(holds_bytes)) for name, holds_bytes in json.loads(arrays[0].tobytes())]
        names = [name for name, _ in columns]
        try:
            roles = options.roles(names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for role in ("video", "caption"):
            if role not in roles:
                raise ValueError(f"{path}: {options.missing(role, names)}")
            if (roles[role], True) in columns:
                raise ValueError(f"{path}: column {roles[role]!r} holds bytes; expected text, such as paths of videos")
        self._kinds: dict[str, Kind] = {
            name: "text" if role in ("video", "caption") else "seconds" for role, name in roles.items()
        }

    def scan(self) -> Iterator[Row]:
        total, most = 0, max(MAX_BYTES, MAX_BYTES_PER_BYTE * self._size)
        for rows, num_bytes in self._parts(range(self._num_rows)):
            total += num_bytes
            if total > most:
                problem = f"its {self._size} bytes unpack to more than {most >> 20} MiB of rows"
                raise ValueError(f"{self._path}: {problem}; is it a captions file?")
            yield from rows

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        for rows, _ in self._parts(positions):
            yield from rows

    def _parts(self, positions: Iterable[int]) -> Iterator[tuple[list[Row], int]]:
        """The rows at `positions`, a few megabytes at a time, each part with its size in bytes as JSON."""
        rest = iter(positions)
        while wanted := list(islice(rest, BATCH_ROWS)):
            while wanted:
                rows, num_bytes = self._first(wanted)
                yield rows, num_bytes
                wanted = wanted[len(rows) :]

    def _first(self, positions: list[int]) -> tuple[list[Row], int]:
        """The first of the rows at `positions`, at least one, and their size in bytes as JSON. Raises: ValueError."""
        rows: list[Row] = []
        num_bytes = 0
        arguments = {"stamp": self._stamp, "kinds": self._kinds, "positions": positions}
        for fields, arrays in self._ask(parquet_file.read_rows, **arguments):
            with damaged_answers(self._path):
                numbers = positions[len(rows) : len(rows) + fields["count"]]
                num_bytes += arrays[0].nbytes if arrays else 0
                if not numbers or num_bytes > 2 * ANSWER_BYTES:
                    raise TypeError
                rows += _rows(numbers, arrays[0].tobytes()) if arrays else map(_too_large, numbers)
        with damaged_answers(self._path):
            rows[0]
        return rows, num_bytes

    def _ask(self, operation: Any, **arguments: Any) -> Iterator[Answer]:
        request = {"path": self._path, "limits": self._limits, **arguments}
        return run(self._path, operation, request, max_bytes=ANSWER_BYTES, parser=PYARROW)


def _rows(numbers: list[int], data: bytes) -> list[Row]:
    """Raises: TypeError, ValueError, RecursionError for data that is not these rows."""
    names, columns = json.loads(data)
    records = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return [_row(number, fields) for number, fields in zip(numbers, records, strict=True)]


def _row(number: int, fields: dict[str, Any]) -> Row:
    return Row(number, f"row {number + 1}", fields)


def _too_large(number: int) -> Row:
    return Row(number, f"row {number + 1}", {}, f"it takes more than {ANSWER_BYTES} bytes")
