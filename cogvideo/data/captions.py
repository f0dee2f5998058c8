"""Captions of videos: a caption, the checks it has to pass, and random access to a file of millions of them.

How a file format is parsed is the business of `readers/`. Nothing here opens a video; `extract.py` does, and it also
checks where links lead.
"""

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256
from os.path import normpath
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cogvideo.text import clean_text

MAX_NAME_BYTES = 255
"""The longest file name that common file systems allow."""


@dataclass(frozen=True)
class Caption:
    """What a video, or a span of it, shows."""

    video: str
    """Path relative to the folder of videos, as written in the captions file."""
    text: str
    start: float = 0.0
    """Start of the span in seconds after the video's first frame."""
    end: float | None = None
    """End of the span in seconds; None: the end of the video."""

    def to_json_line(self) -> str:
        """The caption's line in a prepared folder's captions.jsonl."""
        return json.dumps(vars(self), ensure_ascii=False) + "\n"


def validated(caption: Caption) -> Caption:
    """Check a caption and normalise its text (`cogvideo.text`). Every reader passes what it parsed through this.

    Raises: ValueError as `clean_text`, or for a path outside the folder of videos, or an impossible span.
    """
    text = clean_text(caption.text, "caption")
    try:
        name_bytes = max(map(len, caption.video.encode().split(b"/")))
    except UnicodeEncodeError:
        raise ValueError(f"video={caption.video!r} holds a lone surrogate, which is half a character") from None
    if name_bytes > MAX_NAME_BYTES:
        raise ValueError(f"video={caption.video[:40]!r}...: a file name has at most {MAX_NAME_BYTES} bytes")
    path = normpath(caption.video)
    if path in ("", ".", "..") or path.startswith(("/", "../")) or "\0" in path:
        raise ValueError(f"video={caption.video!r} lies outside the folder of videos; give a path inside it")
    end = math.inf if caption.end is None else caption.end
    if not (0 <= caption.start < end and math.isfinite(caption.start)):
        raise ValueError(f"start={caption.start:g}, end={end:g}; expected 0 <= start < end in seconds")
    return Caption(caption.video, text, caption.start, caption.end)


class CaptionReader(Protocol):
    """Access to a captions file in one format. Both methods raise ValueError naming the place of a bad record.

    A position is any integer that the reader finds a record by: a byte offset, a row number.
    """

    def scan(self) -> Iterator[tuple[int, Caption]]:
        """Read the whole file in its order -> the position of each caption, and the caption, `validated`."""
        ...

    def read(self, positions: Iterable[int]) -> Iterator[Caption]:
        """Read the captions at positions that `scan` gave."""
        ...


class CaptionsFile:
    """The captions of a file by number and by video. Holds 16 bytes per caption: its position and its video's hash."""

    def __init__(self, path: Path, reader: CaptionReader):
        """Read and check every caption. Use `readers.open_captions` to choose the reader by the file's name.

        Raises: OSError; ValueError for a bad record, or if the file has none.
        """
        self.path, self._reader = path, reader
        positions, videos, digest = array("q"), array("Q"), sha256()
        for position, caption in reader.scan():
            digest.update(caption.to_json_line().encode())
            positions.append(position)
            videos.append(int.from_bytes(blake2b(caption.video.encode(), digest_size=8).digest()))
        if not positions:
            raise ValueError(f"{path} holds no captions; expected one per line")
        self._positions, self._videos = np.array(positions), np.array(videos)
        self.sha256: str = digest.hexdigest()
        """Hash of the captions.jsonl that a prepared folder gets."""

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Caption]:
        """Read the file again, in order."""
        return (caption for _, caption in self._reader.scan())

    def select(self, indices: Iterable[int]) -> list[Caption]:
        """Captions by index, counted from 0. Raises: ValueError if the file has changed and a record is now bad."""
        return list(self._reader.read(int(self._positions[index]) for index in indices))

    def group_by_video(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Group the captions by video, videos in the order of their first captions.

        Returns (indices, starts): video v has the captions indices[starts[v] : starts[v + 1]], in ascending order.
        """
        # np.unique sorts by hash. `order` maps its numbering to the order of first captions, `video` holds each
        # caption's video in that order; a stable sort by video then gives the groups.
        _, first, inverse = np.unique(self._videos, return_index=True, return_inverse=True)
        order = np.empty(len(first), np.int64)
        order[np.argsort(first)] = np.arange(len(first))
        video = order[inverse]
        return np.argsort(video, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(video))])
