"""Reads a captions file: which video, in which span of it, shows what. It opens no video.

Two forms, told apart by the file's suffix:
    .jsonl  one object a line: {"video": "clips/1.mp4", "caption": "...", "start": 2.0, "end": 6.0}; start, end optional
    .tsv    one line a caption: video, a tab, the caption
A video's path is relative to the captions file's folder (or to a folder given), and may not lead out of it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_LINE_BYTES = 1 << 16
MAX_NAME_BYTES = 255
"""Of a file, on the systems that there are."""
FIELDS = ("video", "caption", "start", "end")


@dataclass(frozen=True)
class Caption:
    """One line of a captions file."""

    video: str
    """Path relative to the videos' folder, as written."""
    text: str
    start: float = 0.0
    """Seconds after the video's first frame at which what the text describes begins."""
    end: float | None = None
    """Seconds at which it ends; None: the video's end."""


def read_captions(path: str | Path, videos: str | Path | None = None) -> list[Caption]:
    """Read and check all lines of a captions file; `videos` is the folder that paths are relative to.

    Blank lines are skipped. Raises: OSError if it cannot be opened; ValueError naming the line that does not fit, or if
    there is no caption at all.
    """
    path = Path(path)
    parse = {".jsonl": _parse_json, ".tsv": _parse_tsv}.get(path.suffix)
    if parse is None:
        raise ValueError(f"{path}: a captions file is .jsonl or .tsv, got {path.suffix or 'no suffix'!r}")
    folder = (Path(videos) if videos is not None else path.parent).resolve()
    captions = []
    for number, line in _lines(path):
        try:
            captions.append(_checked(parse(line), folder))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
    if not captions:
        raise ValueError(f"{path} holds no captions; expected one a line")
    return captions


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for number in range(1, 2**62):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path} line {number}: longer than {MAX_LINE_BYTES} bytes; is it a captions file?")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError:
                raise ValueError(f"{path} line {number}: not UTF-8 text") from None
            if text.strip():
                yield number, text


def _parse_json(line: str) -> Caption:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('not JSON; expected {"video": "...", "caption": "..."}') from None
    if not isinstance(value, dict):
        raise ValueError('expected an object {"video": "...", "caption": "..."}')
    if unknown := sorted(set(value) - set(FIELDS)):
        raise ValueError(f"unknown field {unknown[0]!r}; known fields: {', '.join(FIELDS)}")
    for name in ("video", "caption"):
        if not isinstance(value.get(name), str):
            raise ValueError(f"{name}={value.get(name)!r}; expected text")
    for name in ("start", "end"):
        number = value.get(name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(f"{name}={number!r}; expected seconds")
    end = value.get("end")
    try:
        seconds = float(value.get("start") or 0.0), None if end is None else float(end)
    except OverflowError:
        raise ValueError("start or end is larger than any video is long; expected seconds") from None
    return Caption(value["video"], value["caption"], *seconds)


def _parse_tsv(line: str) -> Caption:
    video, tab, text = line.partition("\t")
    if not tab or "\t" in text:
        raise ValueError("expected a video, one tab, a caption")
    return Caption(video, text)


def _checked(caption: Caption, folder: Path) -> Caption:
    text = " ".join(caption.text.split())
    if not text:
        raise ValueError("the caption is empty")
    if any("\ud800" <= character <= "\udfff" for character in text + caption.video):
        raise ValueError("half a character (a lone surrogate); expected text")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in Path(caption.video).parts):
        raise ValueError(f"video={caption.video[:40]!r}...: no file has so long a name")
    if "\0" in caption.video or not (folder / caption.video).resolve().is_relative_to(folder) or not caption.video:
        raise ValueError(f"video={caption.video!r} lies outside {folder}; give a path inside it")
    end = math.inf if caption.end is None else caption.end
    if not (0 <= caption.start < end and math.isfinite(caption.start)):
        raise ValueError(f"start={caption.start:g}, end={end:g}: expected 0 <= start < end in seconds")
    return Caption(caption.video, text, caption.start, caption.end)
