"""Text files of records: converts encodings and line ends to UTF-8 and newlines, and finds lines again by offset."""

import codecs
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from charset_normalizer import from_bytes

from cogvideo.data.readers.records import ReadOptions, Row
from cogvideo.text import marked_encoding

MAX_LINE_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 18
"""Bytes from which an encoding is guessed."""
BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)+")
NOT_TEXT = (
    (b"PK\x03\x04", "a zip file or a spreadsheet's workbook; export the table as .csv"),
    (b"\x1f\x8b", "compressed; decompress it with gunzip"),
    (b"PAR1", "a Parquet file; rename it to end in .parquet"),
)
LEGACY_ENCODINGS = ["cp1252", "gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "euc_jp"]
"""What spreadsheets in common languages write when they do not write Unicode."""


class TextFile:
    """A text file as UTF-8; one in another encoding or with classic Mac line ends is converted to a temporary file."""

    def __init__(self, path: Path, encoding: str | None = None):
        """Raises: OSError; ValueError that names the encoding, if the file is not in the expected one."""
        self.path = path
        self._copy: Any = None  # deletes the temporary file when it is freed
        with open(path, "rb") as file:
            sample = file.read(SAMPLE_BYTES)
        encoding = _encoding(sample, path, encoding)
        is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
        if not is_utf8 or sample.count(b"\r") - sample.count(b"\r\n") > sample.count(b"\n"):
            self._transcode("utf-8" if is_utf8 else encoding)

    def _transcode(self, encoding: str) -> None:
        copy = tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", suffix=".captions")  # noqa: SIM115
        try:
            with open(self.path, encoding=encoding) as file:  # any line end becomes a newline
                shutil.copyfileobj(file, copy, 1 << 20)
        except LookupError:
            raise _not_of_text(encoding) from None
        except UnicodeError:
            with open(self.path, "rb") as bytes_file:
                guess = guess_encoding(bytes_file.read(SAMPLE_BYTES))
            raise ValueError(_remedy(self.path, "", guess, encoding)) from None
        copy.flush()
        self._copy = copy

    def open(self) -> "LineCursor":
        return LineCursor(self.open_bytes(), self)

    def open_bytes(self) -> BufferedReader:
        return open(self.path if self._copy is None else self._copy.name, "rb")

    def undecodable(self, place: str, data: bytes) -> ValueError:
        """The error for a line that is not UTF-8."""
        with open(self.path, "rb") as file:
            sample = file.read(SAMPLE_BYTES)
        return ValueError(_remedy(self.path, place, guess_encoding(sample if not sample.isascii() else data)))


class LineCursor:
    """Reads lines one by one and tracks its position."""

    def __init__(self, file: BufferedReader, text: TextFile):
        self._file, self._text = file, text
        self.offset, self.number = 0, 1
        """Byte offset and number of the next line."""

    def __enter__(self) -> "LineCursor":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def seek(self, offset: int, number: int = 0) -> None:
        """Go to the line at an offset; line number 0 means unknown."""
        self._file.seek(offset)
        self.offset, self.number = offset, number

    def place(self) -> str:
        """Where the next line is, for messages."""
        return f"line {self.number}" if self.number else f"byte {self.offset}"

    def skip_blank(self) -> None:
        """Skip blank lines, as far as the read buffer shows them."""
        while (found := BLANK_LINES.match(self._file.peek(1))) is not None:
            lines = self._file.read(found.end())
            self.offset, self.number = self.offset + len(lines), self.number + lines.count(b"\n") if self.number else 0

    def line(self) -> str | None:
        """The next line with its line end; None at the end of the file.

        Raises: LongLine, after skipping the line; ValueError if the file is not UTF-8.
        """
        data, place = self._file.readline(MAX_LINE_BYTES + 1), self.place()
        if not data:
            return None
        size, is_long = len(data), len(data) > MAX_LINE_BYTES
        while is_long and not data.endswith(b"\n") and (data := self._file.readline(MAX_LINE_BYTES)):
            size += len(data)
        self.offset, self.number = self.offset + size, self.number + 1 if self.number else 0
        if is_long:
            raise LongLine(f"longer than {MAX_LINE_BYTES} bytes; is it a captions file?")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            raise self._text.undecodable(place, data) from None
        return text.lstrip("\ufeff")  # also where files with byte order marks were joined


class LongLine(Exception):
    """A line is too long to be read."""


class TextRows(ABC):
    """Records of a text file, read one after the other or by their positions, which are byte offsets."""

    def __init__(self, path: Path, options: ReadOptions):
        self._text = TextFile(path, options.encoding)
        self._first: tuple[int, int] | None = None
        """Offset and number of the first line of records; None: the file's first."""

    def scan(self) -> Iterator[Row]:
        with self._text.open() as cursor:
            if self._first is not None:
                cursor.seek(*self._first)
            while (row := self._row(cursor)) is not None:
                yield row

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        with self._text.open() as cursor:
            for offset in positions:
                cursor.seek(offset)
                yield self._row(cursor) or Row(offset, f"byte {offset}", {}, "the file has changed")

    @abstractmethod
    def _row(self, cursor: LineCursor) -> Row | None:
        """The record at the cursor, which moves on; None at the end of the file."""


class LineRows(TextRows):
    """One record per line; blank lines are skipped."""

    is_text = False

    def __init__(self, path: Path, options: ReadOptions, parse_line: Callable[[str], dict[str, Any]]):
        """`parse_line` raises ValueError for a line that is not a record."""
        super().__init__(path, options)
        self._parse_line = parse_line

    def _row(self, cursor: LineCursor) -> Row | None:
        while True:
            offset, place = cursor.offset, cursor.place()
            try:
                line = cursor.line()
            except LongLine as error:
                return Row(offset, place, {}, str(error))
            if line is None:
                return None
            if line.strip():
                break
            cursor.skip_blank()
        try:
            return Row(offset, place, self._parse_line(line.strip("\r\n")))
        except ValueError as error:
            return Row(offset, place, {}, str(error))


def decode(data: bytes, place: str | Path, encoding: str | None = None) -> str:
    """Decode a whole text that is in memory, by the rules of `TextFile`. `place` is named in errors.

    Raises: ValueError that names the encoding, if the text is not in the expected one.
    """
    encoding = _encoding(data, place, encoding)
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise _not_of_text(encoding) from None
    except UnicodeError:
        raise ValueError(_remedy(place, "", guess_encoding(data), encoding)) from None


def _encoding(sample: bytes, place: str | Path, given: str | None) -> str:
    """The encoding of a text: that of its byte order mark, else the given one, else UTF-8.

    Raises: ValueError for a file that is not text or is undeclared UTF-16, or for an unknown encoding.
    """
    marked = marked_encoding(sample)
    if given is None and marked is None and (guess := _utf_16_without_mark(sample)):
        raise ValueError(_remedy(place, "", guess))
    for magic, problem in NOT_TEXT:
        if sample.startswith(magic):
            raise ValueError(f"{place} is {problem}")
    encoding = marked or given or "utf-8"
    try:
        codecs.lookup(encoding)
    except (LookupError, ValueError):
        raise ValueError(f"--encoding {encoding}: unknown encoding; try utf-8, utf-16, cp1252") from None
    return encoding


def _not_of_text(encoding: str) -> ValueError:
    return ValueError(f"--encoding {encoding}: not a text encoding; try utf-8, utf-16, cp1252")


def _utf_16_without_mark(sample: bytes) -> str | None:
    """Detect UTF-16 by its zeros: in mostly Latin text, every second byte is zero."""
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if max(even, odd) <= len(sample) / 8:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def guess_encoding(data: bytes) -> str | None:
    """The most probable encoding of text that is not UTF-8: UTF-16 or a legacy one; None if none fits."""
    if guess := _utf_16_without_mark(data):
        return guess
    lines = [line for line in data.splitlines() if not line.isascii()]  # ASCII lines give no evidence
    text = b"\n".join(lines)
    best = from_bytes(text, cp_isolation=LEGACY_ENCODINGS).best()
    if best is not None and best.encoding == "cp1251" and 4 * sum(byte > 127 for byte in text) < len(text):
        return "cp1252"  # Cyrillic text has few ASCII letters; Latin text with some accents has many
    return best.encoding if best is not None else None


def _remedy(path: str | Path, place: str, guess: str | None, expected: str = "utf-8") -> str:
    where = f"{path} {place}".rstrip()
    known = {"gb18030": "gb18030 (GBK)", "cp1252": "cp1252 (Windows)"}.get(guess or "", guess)
    if guess is None:
        return f"{where}: not {expected.upper()} text; name its encoding with --encoding, or save it as UTF-8"
    return f"{where}: not {expected.upper()} text, probably {known}; give --encoding {guess}, or save it as UTF-8"
