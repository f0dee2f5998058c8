"""Captions as one JSON value: a list of objects, an object that maps paths to captions, or columns as pandas writes.

[{"video": "a.mp4", "caption": "..."}, ...]
{"a.mp4": "...", "b.mp4": ["...", "..."], "c.mp4": {"caption": "...", "start": 2.0}}
{"video": {"0": "a.mp4"}, "caption": {"0": "..."}}     also with lists: {"video": [...], "caption": [...]}

Lists and objects of paths are read entry by entry, and only the entries' offsets are kept; columns are held in memory.
"""

import codecs
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.data.captions import MAX_BAD
from cogvideo.data.readers.jsonl import parse_line
from cogvideo.data.readers.records import ReadOptions, Row, Rows
from cogvideo.data.readers.textfile import LineRows, TextFile
from cogvideo.files import check_counts

MAX_ENTRY = 4 << 20
"""Limit on the characters of an entry."""
MAX_COLUMNS = 64
MAX_COLUMNS_BYTES = 32 << 20
MAX_COLUMN_VALUES = 1 << 20
"""More in columns would take hundreds of megabytes of memory; .jsonl has no limit."""
CHUNK = 1 << 16
LONGEST_TOKEN = 12
"""Characters of the longest token, strings aside, that a chunk may end within: two escapes of one character."""
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
CLOSING = {"[": "]", "{": "}"}
FORMS = "expected a list of objects, or an object of path to caption"


class JsonRows:
    """Records of a JSON file. Positions are record indices; each takes 8 bytes of memory, unless in columns."""

    is_text = False

    def __init__(self, path: Path, options: ReadOptions):
        """Raises: OSError; ValueError if the file is not JSON of one of these forms."""
        self._path, self._options, self._text = path, options, TextFile(path, options.encoding)
        self._columns: list[dict[str, Any]] | None = None
        """The records of a file of columns."""
        with _Cursor(self._text) as cursor:
            names = self._index(cursor)
        if names is None or self._holds_columns(names):
            self._columns = self._read_columns()

    def _index(self, cursor: "_Cursor") -> list[str] | None:
        """Find the entries -> an object's names, at most MAX_COLUMNS + 1 of them; None if an entry is too long."""
        first = cursor.peek()
        if not first:
            raise ValueError(f"{self._path} holds no captions; {FORMS}")
        if first not in CLOSING:
            cursor.value()
            raise ValueError(f"{self._path}: {FORMS}")
        self._is_object = first == "{"
        offsets, hashes = array("q"), array("q")
        names: list[str] = []
        num_bad = 0
        try:
            for offset in cursor.entries():
                if self._is_object:
                    name = cursor.name()
                    hashes.append(hash(name))
                    names += [name] if len(names) <= MAX_COLUMNS else []
                value = cursor.value()
                offsets.append(offset)
                if not self._is_object and not self._is_record(value):
                    num_bad += 1
                    if num_bad > MAX_BAD:
                        fields = "a video and a caption; name their fields with --video-column and --caption-column"
                        raise ValueError(f"{self._path} has more than {MAX_BAD} entries without {fields}")
        except _LongEntry:
            if self._is_object and len(names) <= MAX_COLUMNS:
                return None
            problem = f"longer than {MAX_ENTRY} characters; is it a captions file?"
            raise ValueError(f"{self._path} entry {len(offsets) + 1}: {problem}") from None
        self._offsets = _grouped(offsets, hashes) if self._is_object else np.array(offsets, np.int64)
        return names

    def scan(self) -> Iterator[Row]:
        return self.read(range(len(self._offsets if self._columns is None else self._columns)))

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        with _Cursor(self._text) as cursor:
            for number in positions:
                if self._columns is not None:
                    yield Row(number, f"entry {number + 1}", self._columns[number])
                else:
                    cursor.seek(int(self._offsets[number]))
                    yield self._row(number, cursor)

    def _row(self, number: int, cursor: "_Cursor") -> Row:
        place = f"entry {number + 1}"
        try:
            path, entry = cursor.name() if self._is_object else None, cursor.value()
        except (ValueError, _LongEntry):
            return Row(number, place, {}, "the file has changed")
        if path is not None:
            video, caption = self._options.video or "video", self._options.caption or "caption"
            return Row(number, place, {video: path, **(entry if isinstance(entry, dict) else {caption: entry})})
        if not isinstance(entry, dict):
            return Row(number, place, {}, 'expected an object {"video": "...", "caption": "..."}')
        return Row(number, place, entry)

    def _is_record(self, value: Any) -> bool:
        try:
            return isinstance(value, dict) and len(self._options.roles(value, ("video", "caption"))) == 2
        except ValueError:
            return True  # `scan` reports which fields are ambiguous

    def _holds_columns(self, names: list[str]) -> bool:
        """Whether these names of an object are columns and not paths."""
        try:
            roles = self._options.roles(dict.fromkeys(names)) if len(names) <= MAX_COLUMNS else {}
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None
        return {"video", "caption"} <= roles.keys()

    def _read_columns(self) -> list[dict[str, Any]]:
        with self._text.open_bytes() as file:
            data = file.read(MAX_COLUMNS_BYTES + 1)
        long = f"an entry of more than {MAX_ENTRY} characters"
        if len(data) > MAX_COLUMNS_BYTES:
            problem = f"{long}, or columns of more than {MAX_COLUMNS_BYTES >> 20} MiB"
            raise ValueError(f"{self._path}: {problem}; write it as .jsonl, one object per line")
        check_counts(data.count(b","), data.count(b"[") + data.count(b"{"), self._path, MAX_COLUMN_VALUES)
        try:
            columns = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._path}: not JSON ({error})") from None
        if not self._holds_columns(list(columns)):
            raise ValueError(f"{self._path}: {long}; is it a captions file?")
        try:
            return _records(columns)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None


class _LongEntry(Exception):
    """An entry is too long to be read."""


class _Cursor:
    """Reads the values of a JSON file one by one and tracks its position."""

    def __init__(self, text: TextFile):
        self._source, self._file = text, text.open_bytes()
        self._json = json.JSONDecoder(object_pairs_hook=_object)
        self._jump(0)
        self._line = 1
        if self.peek() == "\ufeff":
            self._advance(self._at + 1)

    def __enter__(self) -> "_Cursor":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def seek(self, offset: int) -> None:
        """Go to the entry at a byte offset."""
        if offset != self.offset and self.peek() == ",":  # it may be the next one, which is in the buffer
            self._advance(self._at + 1)
            self.peek()
        if offset != self.offset:
            self._jump(offset)

    def _jump(self, offset: int) -> None:
        self._file.seek(offset)
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self.offset = "", 0, offset

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            match = WHITE_SPACE.match(self._text, self._at)
            assert match is not None
            self._advance(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def entries(self) -> Iterator[int]:
        """The offset of each entry of the list or object that comes next, which must be the rest of the file.

        The caller must read each entry before it requests the next.
        """
        closing = CLOSING[self.peek()]
        self._advance(self._at + 1)
        is_last = self.peek() == closing
        while not is_last:
            self.peek()
            yield self.offset
            is_last = self.peek() == closing
            if not is_last:
                self._expect(",")
        self._advance(self._at + 1)
        if self.peek():
            raise self._not_json("Extra data", self._at)

    def name(self) -> str:
        """The name of an object's entry, whose value comes next."""
        if self.peek() != '"':
            raise self._not_json("Expecting property name enclosed in double quotes", self._at)
        name: str = self.value()
        self.peek()
        self._expect(":")
        return name

    def value(self) -> Any:
        """The value that comes next. Raises: ValueError if it is not JSON; _LongEntry."""
        self.peek()
        problem: ValueError | None
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                problem = self._not_json(error.msg, error.pos)
                is_cut = len(self._text) - error.pos <= LONGEST_TOKEN or error.msg.startswith("Unterminated")
                if not is_cut:
                    raise problem from None
            except (ValueError, RecursionError) as error:
                raise self._not_json(type(error).__name__, self._at) from None
            else:
                problem = None
                if end < len(self._text):  # otherwise it may be a number that the chunk cuts
                    break
            if len(self._text) - self._at > MAX_ENTRY:
                raise _LongEntry
            if not self._fill():
                if problem is not None:
                    raise problem
                break
        self._advance(end)
        return value

    def _expect(self, character: str) -> None:
        if not self._text.startswith(character, self._at):
            raise self._not_json(f"Expecting {character!r} delimiter", self._at)
        self._advance(self._at + 1)

    def _advance(self, end: int) -> None:
        passed = self._text[self._at : end]
        self.offset += len(passed) if passed.isascii() else len(passed.encode())
        self._line += passed.count("\n")
        self._at = end

    def _fill(self) -> bool:
        """Read at least as much again as is left in the buffer; returns whether there was more."""
        rest = self._text[self._at :]
        data = self._file.read(max(CHUNK, len(rest)))
        try:
            self._text, self._at = rest + self._utf8.decode(data, final=not data), 0
        except UnicodeDecodeError:
            raise self._source.undecodable("", data) from None
        return bool(data)

    def _not_json(self, problem: str, at: int) -> ValueError:
        line = self._line + self._text.count("\n", self._at, at)
        return ValueError(f"{self._source.path} line {line}: not JSON ({problem})")


def _grouped(offsets: "array[int]", hashes: "array[int]") -> NDArray[np.int64]:
    """The entries' offsets, grouped by path, in the order in which paths first occur."""
    _, first, inverse = np.unique(np.array(hashes, np.int64), return_index=True, return_inverse=True)
    grouped: NDArray[np.int64] = np.array(offsets, np.int64)[np.argsort(first[inverse], kind="stable")]
    return grouped


def json_rows(path: Path, options: ReadOptions) -> Rows:
    """Records of a .json, .jsonl or .ndjson file. The content decides which, since suffixes are often mixed up.

    Raises: OSError; ValueError.
    """
    lines = LineRows(path, options, parse_line)
    first = list(islice(lines.scan(), 2))
    is_value = not first or bool(first[0].problem)  # no record in the first line
    if path.suffix.lower() == ".json":
        return JsonRows(path, options) if is_value or len(first) == 1 else lines
    try:
        return JsonRows(path, options) if first and is_value else lines
    except ValueError:
        return lines


def _records(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records from columns: lists, or objects of row label to value."""
    if all(isinstance(column, str) for column in columns.values()):
        return [dict(columns)]  # a single record
    values = {name: _column(column) for name, column in columns.items()}
    lengths = {len(column) for column in values.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns of different lengths ({', '.join(map(str, sorted(lengths)))})")
    return [dict(zip(values, record, strict=True)) for record in zip(*values.values(), strict=True)]


def _column(column: Any) -> list[Any]:
    if isinstance(column, dict):
        return list(column.values())
    return column if isinstance(column, list) else [column]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; the values of a repeated key become one list, such as several captions of one path."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    lists: dict[str, list[Any]] = {}
    for key, value in pairs:
        lists.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    return {key: values if len(values) > 1 else found[key] for key, values in lists.items()}
