"""Captions as one JSON value, held in memory: a list of objects, an object of path to caption, or columns as of pandas.

[{"video": "a.mp4", "caption": "..."}, ...]
{"a.mp4": "...", "b.mp4": ["...", "..."], "c.mp4": {"caption": "...", "start": 2.0}}
{"video": {"0": "a.mp4"}, "caption": {"0": "..."}}     also with lists: {"video": [...], "caption": [...]}
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cogvideo.data.readers.jsonl import parse_line
from cogvideo.data.readers.records import ReadOptions, Row, Rows
from cogvideo.data.readers.textfile import LineRows, decode
from cogvideo.files import check_counts

MAX_BYTES = 1 << 28
MAX_VALUES = 1 << 24
"""A larger file would take gigabytes of memory; .jsonl has no limit."""


class JsonRows:
    """Records of a JSON file. Positions are their numbers."""

    is_text = False

    def __init__(self, path: Path, options: ReadOptions):
        """Raises: OSError; ValueError if the file is not JSON of one of these forms."""
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MiB; write it as .jsonl, one object per line")
        text = decode(path.read_bytes(), path, options.encoding)
        if not text.strip():
            raise ValueError(f"{path} holds no captions; expected a list of objects, or an object of path to caption")
        check_counts(text.count(","), text.count("[") + text.count("{"), path, MAX_VALUES)
        try:
            value = json.loads(text, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON that can be read ({type(error).__name__})") from None
        try:
            self._rows = list(_rows(value, options))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def scan(self) -> Iterator[Row]:
        return iter(self._rows)

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        return (self._rows[position] for position in positions)


def json_rows(path: Path, options: ReadOptions) -> Rows:
    """Records of a .json, .jsonl or .ndjson file. The content says which it is, since names are often mixed up.

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


def _rows(value: Any, options: ReadOptions) -> Iterator[Row]:
    if isinstance(value, dict) and {"video", "caption"} <= options.roles(value).keys():
        value = _records(value)
    if isinstance(value, list):
        for number, record in enumerate(value):
            problem = "" if isinstance(record, dict) else 'expected an object {"video": "...", "caption": "..."}'
            yield Row(number, f"entry {number + 1}", {} if problem else record, problem)
    elif isinstance(value, dict):
        video, caption = options.video or "video", options.caption or "caption"
        for number, (path, entry) in enumerate(value.items()):
            fields = {video: path, **entry} if isinstance(entry, dict) else {video: path, caption: entry}
            yield Row(number, f"entry {number + 1}", fields)
    else:
        raise ValueError("expected a list of objects, or an object of path to caption")


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
    """An object; the values of a key that occurs several times become a list, as of several captions of one path."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    lists: dict[str, list[Any]] = {}
    for key, value in pairs:
        lists.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    return {key: values if len(values) > 1 else found[key] for key, values in lists.items()}
