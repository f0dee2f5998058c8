"""Captions as a text table, .csv or .tsv, with the quoting and headers that pandas and spreadsheets write.

A quoted field may contain the delimiter, line ends, and quotes that are doubled or follow a backslash. A .csv file may
use semicolons, tabs or vertical bars instead of commas. Without a header line, the columns are video and caption.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from cogvideo.data.readers.records import ReadOptions, Row, listed
from cogvideo.data.readers.textfile import MAX_LINE_BYTES, LineCursor, LongLine, TextRows

VIDEO_TYPES = "mp4 m4v mov mkv webm avi gif mpg mpeg ts m2ts mts wmv flv ogv 3gp mjpeg"
MEDIA_SUFFIXES = frozenset(f".{name}" for name in VIDEO_TYPES.split())
BLANK = ' \t\r\n\ufeff,;|"'
MAX_COLUMNS = 16384
"""As many as spreadsheets can hold."""
csv.field_size_limit(MAX_LINE_BYTES)


class DelimitedRows(TextRows):
    """Records of a table. Positions are the byte offsets of their first lines."""

    is_text = True

    def __init__(self, path: Path, options: ReadOptions, delimiters: str):
        """`delimiters`: those that the header may use, the likeliest first.

        Raises: OSError; ValueError for another encoding, or if the header does not say which column is which.
        """
        super().__init__(path, options)
        self._path, self._options = path, options
        self._literal = delimiters == "\t"  # there are .tsv files without quoting, in which quotes are text
        self._delimiter, self._names, self._first = self._read_header(delimiters)
        named = [number for number, name in enumerate(self._names, 1) if name != _unnamed(number)]
        self._fewest = max(named, default=0)
        """Fewest cells that a row may have: separators after the last named column may be missing."""

    def _read_header(self, delimiters: str) -> tuple[str, list[str], tuple[int, int]]:
        """The delimiter, the names of the columns, and offset and number of the first line of data."""
        with self._text.open() as cursor:
            start = self._skip_blank(cursor)
            tables = []
            for delimiter in delimiters:
                cursor.seek(*start)
                try:
                    cells = self._cells(cursor, delimiter)
                    if cells is not None and len(cells) == 1 and cells[0].startswith("sep=") and delimiter != "\t":
                        return self._read_named_header(cursor, cells[0])
                except _Malformed:
                    cells = [""]
                if len(cells or ()) > MAX_COLUMNS:
                    problem = f"{len(cells or ())} columns; expected at most {MAX_COLUMNS}"
                    raise ValueError(f"{self._path} line {start[1]}: {problem}")
                tables.append((delimiter, _stripped(cells or ()), (cursor.offset, cursor.number)))
        if not any(any(names) for _, names, _ in tables):
            return delimiters[0], ["video", "caption"], start  # an empty file, or a first line that `scan` reports
        for delimiter, names, first in tables:
            if len({"video", "caption"} & self._roles(names).keys()) == 2:
                return delimiter, _distinct(names), first
        delimiter, names, first = max(tables, key=lambda table: len(table[1]))  # the first of equal ones
        return self._without_both(delimiter, names, first, start)

    def _skip_blank(self, cursor: LineCursor) -> tuple[int, int]:
        """Offset and number of the first line that is not blank; separators alone count as blank."""
        cursor.skip_blank()
        start = cursor.offset, cursor.number
        try:
            while (line := cursor.line()) is not None and not line.strip(BLANK):
                start = cursor.offset, cursor.number
        except LongLine:
            pass
        return start

    def _read_named_header(self, cursor: LineCursor, line: str) -> tuple[str, list[str], tuple[int, int]]:
        """The header after a line such as "sep=;", which Excel writes and reads."""
        delimiter = line.removeprefix("sep=").strip('"') or ","
        start = cursor.offset, cursor.number
        names = _stripped(self._cells(cursor, delimiter[0]) or [""])
        if len({"video", "caption"} & self._roles(names).keys()) == 2:
            return delimiter[0], _distinct(names), (cursor.offset, cursor.number)
        return self._without_both(delimiter[0], names, (cursor.offset, cursor.number), start)

    def _without_both(
        self, delimiter: str, names: list[str], first: tuple[int, int], start: tuple[int, int]
    ) -> tuple[str, list[str], tuple[int, int]]:
        """Handle a first line that does not name both columns: it is either data or an error."""
        roles, given = self._roles(names), (self._options.video, self._options.caption)
        has_video_file = any(Path(name).suffix.lower() in MEDIA_SUFFIXES for name in names)
        if given == (None, None) and (has_video_file or (not roles and self._literal)):
            return delimiter, ["video", "caption"], start
        for role, name in zip(("video", "caption"), given, strict=True):
            if role not in roles:
                columns = listed(names)
                if name is not None:
                    raise ValueError(f"{self._path} line 1: no column {name!r}; the columns are: {columns}")
                raise ValueError(
                    f"{self._path} line 1: no {role} column among: {columns}; name it with --{role}-column "
                    "(a file without a header line holds videos and captions only)"
                )
        raise AssertionError("both roles are there")

    def _roles(self, names: list[str]) -> dict[str, str]:
        try:
            return self._options.roles(names)
        except ValueError as error:
            raise ValueError(f"{self._path} line 1: {error}") from None

    def _row(self, cursor: LineCursor) -> Row | None:
        while True:
            offset, place = cursor.offset, cursor.place()
            try:
                cells = self._cells(cursor, self._delimiter)
            except _Malformed as error:
                return Row(offset, place, {}, str(error))
            if cells is None:
                return None
            if any(cell.strip() for cell in cells):
                break
            cursor.skip_blank()
        while len(cells) > len(self._names) and not cells[-1].strip():
            cells.pop()  # spreadsheets pad rows with empty cells
        if self._fewest <= len(cells) < len(self._names):
            cells += [""] * (len(self._names) - len(cells))
        if len(cells) != len(self._names):
            problem = f"expected {len(self._names)} fields ({listed(self._names)}), got {len(cells)}"
            if len(cells) > len(self._names):
                problem += "; put quotes around a caption that holds the separator"
            return Row(offset, place, {}, problem)
        return Row(offset, place, dict(zip(self._names, cells, strict=True)))

    def _cells(self, cursor: LineCursor, delimiter: str) -> list[str] | None:
        """The cells of the record at the cursor, which moves on; None at the end of the file. Raises: _Malformed."""
        start = cursor.offset, cursor.number
        try:
            line = cursor.line()
        except LongLine as error:
            raise _Malformed(str(error)) from None
        if line is None:
            return None
        after = cursor.offset, cursor.number
        if '"' not in line:
            return line.rstrip("\r\n").split(delimiter)
        spaced = re.search(f'{re.escape(delimiter)} +"', line) is not None  # a quote after spaces opens a field too
        strict = partial(csv.reader, delimiter=delimiter, strict=True, skipinitialspace=spaced)
        backslash = partial(strict, doublequote=False, escapechar="\\")
        for parse in (strict, backslash) if '\\"' in line else (strict,):
            cursor.seek(*after)
            try:
                cells = next(parse(_lines(line, cursor, start[0])))
            except (csv.Error, LongLine):
                continue
            if not (self._literal and any(delimiter in cell and "\n" in cell for cell in cells)):
                return cells  # otherwise, two quotes meant as text have swallowed the lines between them
        cursor.seek(*after)
        if self._literal:
            return line.rstrip("\r\n").split(delimiter)
        try:
            return next(csv.reader([line], delimiter=delimiter, strict=line.count('"') % 2 == 1))
        except csv.Error:
            raise _Malformed("a quote is opened and not closed; close it, or double a quote that is text") from None


class _Malformed(Exception):
    """A record that is not a row of a table."""


def _lines(first: str, cursor: LineCursor, start: int) -> Iterator[str]:
    """The first line, then those that follow it, up to the greatest length of a record."""
    yield first
    while cursor.offset - start <= MAX_LINE_BYTES and (line := cursor.line()) is not None:
        yield line


def _stripped(cells: Iterable[str]) -> list[str]:
    return [cell.replace("\ufeff", "").strip() for cell in cells]


def _unnamed(number: int) -> str:
    return f"column {number}"


def _distinct(names: list[str]) -> list[str]:
    """Distinct names: unnamed columns, such as the index that pandas writes, and repeated names are numbered."""
    found: list[str] = []
    known: set[str] = set()  # a set, since an untrusted file may have many columns
    for number, name in enumerate(names, 1):
        found.append(f"{name} {number}" if name in known else name or _unnamed(number))
        known.add(found[-1])
    return found


def csv_rows(path: Path, options: ReadOptions) -> DelimitedRows:
    return DelimitedRows(path, options, ",;\t|")


def tsv_rows(path: Path, options: ReadOptions) -> DelimitedRows:
    return DelimitedRows(path, options, "\t")
