"""Readers of captions files, one module per format, chosen by the file's suffix.

To add a format, write a `CaptionReader` (for one record per line, a function that parses a line) and add it to READERS.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from cogvideo.data.captions import Caption, CaptionReader, CaptionsFile, validated
from cogvideo.data.readers import jsonl, tsv

MAX_LINE_BYTES = 1 << 16


class LineReader:
    """Captions from a text file in UTF-8 with one record per line; blank lines are skipped.

    Positions are the lines' byte offsets.
    """

    def __init__(self, path: Path, parse_line: Callable[[str], Caption]):
        """`parse_line` raises ValueError for a line that is not a record."""
        self._path, self._parse_line = path, parse_line

    def scan(self) -> Iterator[tuple[int, Caption]]:
        offset = 0
        with open(self._path, "rb") as file:
            for number in count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if line.strip():
                    yield offset, self._parse(line, offset, f"line {number}")
                offset += len(line)

    def read(self, positions: Iterable[int]) -> Iterator[Caption]:
        with open(self._path, "rb") as file:
            for offset in positions:
                file.seek(offset)
                yield self._parse(file.readline(MAX_LINE_BYTES + 1), offset, f"byte {offset}")

    def _parse(self, line: bytes, offset: int, place: str) -> Caption:
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"longer than {MAX_LINE_BYTES} bytes; is it a captions file?")
            encoding = "utf-8" if offset else "utf-8-sig"  # a byte order mark may precede the first line
            return validated(self._parse_line(line.decode(encoding).strip("\r\n")))
        except UnicodeDecodeError:
            raise ValueError(f"{self._path} {place}: not UTF-8 text") from None
        except ValueError as error:
            raise ValueError(f"{self._path} {place}: {error}") from None


READERS: dict[str, Callable[[Path], CaptionReader]] = {
    ".jsonl": partial(LineReader, parse_line=jsonl.parse_line),
    ".tsv": partial(LineReader, parse_line=tsv.parse_line),
}


def open_captions(path: str | Path) -> CaptionsFile:
    """Open a captions file and check all of it.

    Raises: OSError; ValueError for an unknown suffix, a bad record (the line is named) or an empty file.
    """
    path = Path(path)
    reader = READERS.get(path.suffix)
    if reader is None:
        expected, got = " or ".join(READERS), repr(path.suffix) if path.suffix else "no suffix"
        raise ValueError(f"{path}: expected a captions file in {expected}, got {got}")
    return CaptionsFile(path, reader(path))
