"""Reads a captions file: which video, in which span of it, shows what. It opens no video.

Two forms, told apart by the file's suffix:
    .jsonl  one object a line: {"video": "clips/1.mp4", "caption": "...", "start": 2.0, "end": 6.0}; start, end optional
    .tsv    one line a caption: video, a tab, the caption
A video's path is relative to a folder, and may not lead out of it; links are followed by `extract.py`, which opens it.
"""

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import count
from os.path import normpath
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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

    @property
    def line(self) -> str:
        """As a prepared folder keeps it."""
        return json.dumps(vars(self), ensure_ascii=False) + "\n"


class CaptionsFile:
    """The captions of a file in its order. 16 bytes of each are held: its line's place, its video's hash."""

    def __init__(self, path: str | Path):
        """Read and check every line; blank ones are no captions.

        Raises: OSError if it cannot be opened; ValueError naming the line that does not fit, or if there is none.
        """
        self.path = Path(path)
        parse = {".jsonl": _parse_json, ".tsv": _parse_tsv}.get(self.path.suffix)
        if parse is None:
            raise ValueError(f"{path}: a captions file is .jsonl or .tsv, got {self.path.suffix or 'no suffix'!r}")
        self._parse = parse
        starts, videos, digest = array("q"), array("Q"), sha256()
        for start, caption in self._scan():
            digest.update(caption.line.encode())
            starts.append(start)
            videos.append(int.from_bytes(blake2b(caption.video.encode(), digest_size=8).digest()))
        if not starts:
            raise ValueError(f"{path} holds no captions; expected one a line")
        self._starts, self._videos = np.array(starts), np.array(videos)
        self.sha256: str = digest.hexdigest()
        """Of all their lines."""

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Caption]:
        """Read the file again."""
        return (caption for _, caption in self._scan())

    def at(self, indices: Iterable[int]) -> list[Caption]:
        """Captions by their number from 0. Raises: ValueError if the file has changed so that a line does not fit."""
        found = []
        with open(self.path, "rb") as file:
            for index in indices:
                file.seek(self._starts[index])
                found.append(self._read(file.readline(MAX_LINE_BYTES), f"caption {index}", first=index == 0))
        return found

    def by_video(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Videos in the order of their first captions: the caption numbers of all, and where each video's begin.

        Video v has numbers[starts[v] : starts[v + 1]], ascending.
        """
        _, first, inverse = np.unique(self._videos, return_index=True, return_inverse=True)
        place = np.empty(len(first), np.int64)
        place[np.argsort(first)] = np.arange(len(first))
        video = place[inverse]
        return np.argsort(video, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(video))])

    def _scan(self) -> Iterator[tuple[int, Caption]]:
        """Where each line begins, and what it says."""
        start = 0
        with open(self.path, "rb") as file:
            for number in count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if line.strip():
                    yield start, self._read(line, f"line {number}", first=number == 1)
                start += len(line)

    def _read(self, line: bytes, place: str, *, first: bool) -> Caption:
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"longer than {MAX_LINE_BYTES} bytes; is it a captions file?")
            return _checked(self._parse(line.decode("utf-8-sig" if first else "utf-8").strip("\r\n")))
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} {place}: not UTF-8 text") from None
        except ValueError as error:
            raise ValueError(f"{self.path} {place}: {error}") from None


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


def _checked(caption: Caption) -> Caption:
    text = " ".join(caption.text.split())
    if not text:
        raise ValueError("the caption is empty")
    try:
        name_bytes = max(map(len, caption.video.encode().split(b"/")))
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate); expected text") from None
    if name_bytes > MAX_NAME_BYTES:
        raise ValueError(f"video={caption.video[:40]!r}...: no file has so long a name")
    way = normpath(caption.video)
    if way in ("", ".", "..") or way.startswith(("/", "../")) or "\0" in way:
        raise ValueError(f"video={caption.video!r} lies outside the videos' folder; give a path inside it")
    end = math.inf if caption.end is None else caption.end
    if not (0 <= caption.start < end and math.isfinite(caption.start)):
        raise ValueError(f"start={caption.start:g}, end={end:g}: expected 0 <= start < end in seconds")
    return Caption(caption.video, text, caption.start, caption.end)
