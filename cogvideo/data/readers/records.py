"""Maps records of any format to captions: which field is the video, which is the caption, and what the rest are.

A format yields `Row`s; `RecordReader` turns them into captions.
"""

import ast
import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import time, timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cogvideo.data.captions import BadRecord, Caption, validated
from cogvideo.media.byte_range import ByteRange

USUAL_NAMES = {
    "video": ("video", "file_name", "filename", "path", "clip", "video_path", "file_path", "filepath", "video_file",
              "video_name", "clip_path", "file"),
    "caption": ("caption", "captions", "text", "prompt", "title", "cap"),
    "start": ("start", "start_time", "start_sec", "start_seconds"),
    "end": ("end", "end_time", "end_sec", "end_seconds"),
}  # fmt: skip
"""Names of fields by role, in lower case with underscores."""
MISSING = frozenset(("", "nan", "null", "none", "n/a", "na", "<na>", "#n/a", "\\n"))
"""Table cells that mean a missing value, in lower case, as pandas, spreadsheets and databases write them."""
MAX_CAPTIONS = 1 << 10
"""Maximum number of captions in one record."""
MAX_EXTRA_BYTES = 1 << 20
"""Limit on the other fields of one record, as JSON."""
MAX_LISTED = 20
PARENTS = 1 << 12
"""Folders of which it is remembered where their links lead."""
CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")


@dataclass(frozen=True)
class ReadOptions:
    """How a captions file is read. The first four name the field of each role; None: one with a usual name."""

    video: str | None = None
    caption: str | None = None
    start: str | None = None
    end: str | None = None
    encoding: str | None = None
    """Encoding of a text file; None: UTF-8, or what its byte order mark says."""

    def roles(self, names: Iterable[str], wanted: tuple[str, ...] = tuple(USUAL_NAMES)) -> dict[str, str]:
        """The names of the fields that have a role, by role. Raises: ValueError if two fields fit one role."""
        return self._roles(tuple(names), wanted)

    @lru_cache(maxsize=256)  # noqa: B019  (few instances, and records of a file mostly have the same fields)
    def _roles(self, names: tuple[str, ...], wanted: tuple[str, ...]) -> dict[str, str]:
        found: dict[str, str] = {}
        taken = {given for role in USUAL_NAMES if (given := getattr(self, role)) is not None}
        for role in wanted:
            usual, given = USUAL_NAMES[role], getattr(self, role)
            fits = [name for name in names if (plain_name(name) in usual and name not in taken) or name == given]
            if given is not None:
                fits = [name for name in fits if name == given]
            if len(fits) > 1:
                raise ValueError(
                    f"{' and '.join(map(repr, fits))} could each be the {role}; choose with --{role}-column NAME"
                )
            if fits:
                found[role] = fits[0]
        return found

    def missing(self, role: str, names: Iterable[str]) -> str:
        """The message for a record, or a table, without a field of this role."""
        given, fields = getattr(self, role), listed(names)
        if given is not None:
            return f"there is no field {given!r}; the fields are: {fields}"
        return f"no {role} field; the fields are: {fields}; name one with --{role}-column"


def listed(names: Iterable[str]) -> str:
    """Names joined for a message, cut off if there are very many."""
    shown = [name[:40] for name in islice(names, MAX_LISTED + 1)]
    return ", ".join(shown[:MAX_LISTED] + ["..."] * (len(shown) > MAX_LISTED)) or "none"


def plain_name(name: str) -> str:
    """A field's name for comparison: lower case, underscores for spaces and dashes, no byte order mark."""
    return re.sub(r"[\s\-]+", "_", name.replace("\ufeff", "").strip().casefold())


class Row(NamedTuple):
    """One record of a file."""

    position: int
    """Where `Rows.read` finds it; below 2 ** 53."""
    place: str
    """The same for messages, such as "line 3"."""
    fields: Mapping[str, Any]
    problem: str = ""
    """Why it is not a usable record; `fields` is then empty."""
    source: ByteRange | None = None
    """Where the bytes of its video are, if the video is not a file of its own."""
    roles: Mapping[str, str] | None = None
    """The names of the fields by role; None: `ReadOptions` decides."""


class Rows(Protocol):
    """Access to the records of a file in one format.

    Both methods raise a ValueError that names the file, if the file as a whole cannot be read.
    """

    is_text: bool
    """Whether all values are text, as in .csv, so that lists and missing values are parsed from the text."""

    def scan(self) -> Iterator[Row]:
        """All records in the file's order."""
        ...

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        """The records at positions that `scan` gave."""
        ...


class RecordReader:
    """The `CaptionReader` for any format. A record with several captions yields one `Caption` for each."""

    def __init__(self, path: Path, folder: Path, rows: Rows, options: ReadOptions):
        """`folder`: the folder of videos; absolute paths inside it are made relative."""
        self._path, self._rows, self._options = path, rows, options
        self._folder = folder.absolute()
        self._place_inside = lru_cache(maxsize=PARENTS)(self._find_place_inside)

    def scan(self) -> Iterator[tuple[int, Caption | BadRecord]]:
        for row in self._rows.scan():
            for number, caption in enumerate(self._captions(row)):
                yield row.position * MAX_CAPTIONS + number, caption

    def read(self, positions: Iterable[int]) -> Iterator[Caption]:
        numbers: deque[int] = deque()

        def rows() -> Iterator[int]:
            for position in positions:
                numbers.append(position % MAX_CAPTIONS)
                yield position // MAX_CAPTIONS

        for row in self._rows.read(rows()):
            captions, number = self._captions(row), numbers.popleft()
            caption = captions[number] if number < len(captions) else _bad(row.place, "the file has changed")
            if isinstance(caption, BadRecord):
                raise ValueError(f"{self._path} {caption.place}: {caption.reason}")
            yield caption

    def _captions(self, row: Row) -> list[Caption | BadRecord]:
        if row.problem:
            return [_bad(row.place, row.problem)]
        try:
            roles = self._options.roles(row.fields) if row.roles is None else row.roles
        except ValueError as error:
            raise ValueError(f"{self._path} {row.place}: {error}") from None
        try:
            whole = self._caption(row, roles)
            texts = self._texts(row.fields, roles)
        except (ValueError, RecursionError) as error:
            reason = "its fields are nested too deeply" if isinstance(error, RecursionError) else str(error)
            return [_bad(row.place, reason)]
        captions: list[Caption | BadRecord] = []
        for number, text in enumerate(texts, 1):
            try:
                captions.append(validated(whole.with_text(text)))
            except ValueError as error:
                place = row.place if len(texts) == 1 else f"{row.place}, caption {number}"
                captions.append(_bad(place, str(error)))
        return captions

    def _caption(self, row: Row, roles: Mapping[str, str]) -> Caption:
        """The caption without its text. Raises: ValueError."""
        video = row.fields.get(roles.get("video", ""))
        if "video" not in roles:
            raise ValueError(self._options.missing("video", row.fields))
        if not isinstance(video, str):
            raise ValueError(f"video={_short(video)}; expected text")
        if video.startswith("/"):
            video = self._relative(Path(video))
        seconds = [self._seconds(role, row.fields.get(roles.get(role, ""))) for role in ("start", "end")]
        used = set(roles.values())
        extra = {plain_value(name): plain_value(value) for name, value in row.fields.items() if name not in used}
        if extra and len(json.dumps(extra)) > MAX_EXTRA_BYTES:
            raise ValueError(f"the other fields take more than {MAX_EXTRA_BYTES} bytes; leave the large ones out")
        return Caption(video, "", seconds[0] or 0.0, seconds[1], extra, row.source)

    def _relative(self, path: Path) -> str:
        """An absolute path, relative to the folder of videos if it lies in that, even if it is written by way of links.

        `extract.py` checks where the file itself leads.
        """
        if path.is_relative_to(self._folder) and ".." not in path.parts:
            return str(path.relative_to(self._folder))
        place = self._place_inside(path.parent)
        return str(path if place is None else place / path.name)

    def _find_place_inside(self, parent: Path) -> Path | None:
        """A folder relative to the folder of videos, by where links lead; None if it lies elsewhere."""
        try:
            return parent.resolve().relative_to(self._folder.resolve())
        except (OSError, RuntimeError, ValueError):  # elsewhere, or nowhere: links in a loop, overlong names
            return None

    def _texts(self, fields: Mapping[str, Any], roles: Mapping[str, str]) -> list[str]:
        if "caption" not in roles:
            raise ValueError(self._options.missing("caption", fields))
        value = fields[roles["caption"]]
        if self._rows.is_text and isinstance(value, str):
            if value.strip() and value.strip().casefold() in MISSING:
                raise ValueError(f"the caption is missing ({value.strip()!r})")
            value = _listed(value)
        texts = value if isinstance(value, list) else [value]
        if not texts:
            raise ValueError("the list of captions is empty")
        if len(texts) > MAX_CAPTIONS:
            raise ValueError(f"{len(texts)} captions of one video; expected at most {MAX_CAPTIONS}")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"caption={_short(value)}; expected text")
        return texts

    @staticmethod
    def _seconds(role: str, value: Any) -> float | None:
        """Seconds from a number, a text, or one of Parquet's time types; None for a missing value, also as nan."""
        if isinstance(value, str):
            return _parsed_seconds(role, value)
        if value is None:
            return None
        if isinstance(value, time):
            value = timedelta(
                hours=value.hour, minutes=value.minute, seconds=value.second, microseconds=value.microsecond
            )
        if isinstance(value, timedelta):
            return value.total_seconds()
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise ValueError(f"{role}={_short(value)}; expected seconds")
        try:
            seconds = float(value)
        except OverflowError:
            raise ValueError(f"{role} is too large; expected seconds") from None
        return None if math.isnan(seconds) else seconds


def plain_value(value: Any) -> Any:
    """The value of any other field in a form that JSON can hold: nan and infinities as null, unknown types as text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain_value(str(key)): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    return str(value)


def _bad(place: str, reason: str) -> BadRecord:
    """A bad record, its texts on one line each whatever names are in them."""
    return BadRecord(*(" ".join(plain_value(text).split()) for text in (place, reason)))


def _parsed_seconds(role: str, text: str) -> float | None:
    """Seconds from "2.5", "2,5" or "1:02:03.5"."""
    text = text.strip()
    if text.casefold() in MISSING:
        return None
    if clock := CLOCK.fullmatch(text):
        hours, minutes, seconds = clock.groups()
        return int(hours or 0) * 3600.0 + int(minutes) * 60.0 + float(seconds.replace(",", "."))
    try:
        return float(text.replace(",", "."))
    except ValueError:
        raise ValueError(f"{role}={_short(text)}; expected seconds, or h:mm:ss") from None


def _listed(text: str) -> Any:
    """The list of captions that a cell holds in JSON or Python syntax; any other text is returned stripped."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
                return value
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
