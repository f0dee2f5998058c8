"""Captions of videos: a caption, the checks it has to pass, and random access to a file of millions of them.

`readers/` parses the file formats. Nothing here opens a video; `extract.py` does, and it also checks where links lead.
"""

import json
import math
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from itertools import pairwise
from os.path import normpath
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cogvideo.media.byte_range import ByteRange
from cogvideo.text import clean_text

MAX_NAME_BYTES = 255
"""The longest file name that common file systems allow."""

MAX_BAD = 1 << 19
"""Maximum number of bad records to skip in a file; each takes about 300 bytes of memory."""

_ENCODER = json.JSONEncoder(ensure_ascii=False)


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
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The captions file's other columns; plain JSON values."""
    source: ByteRange | None = field(default=None, compare=False)
    """Where the video's bytes are, if it is not a file of its own."""

    def with_text(self, text: str) -> "Caption":
        """The same caption with another text; faster than `dataclasses.replace`, which matters for millions."""
        return Caption(self.video, text, self.start, self.end, self.extra, self.source)

    def to_json_line(self) -> str:
        """The caption's line in a prepared folder's captions.jsonl."""
        record = {"video": self.video, "text": self.text, "start": self.start, "end": self.end}
        if self.extra:
            record["extra"] = self.extra
        return _ENCODER.encode(record) + "\n"


class BadRecord(NamedTuple):
    """A record of a captions file that cannot be used."""

    place: str
    """Where it is in the file, such as "line 3"."""
    reason: str


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
    return caption.with_text(text)


def plain_path(video: str) -> str:
    """A video's path as this system would most likely write it: slashes, composed accents, no surrounding space."""
    return normpath(unicodedata.normalize("NFC", video.replace("\ufeff", "").strip()).replace("\\", "/"))


Draw = Callable[[int, Iterator[NDArray[np.int64]]], int]
"""(number of videos to hold out, the indices of each video's captions in the order of the hashes) -> another number."""


class CaptionReader(Protocol):
    """Access to a captions file in one format.

    A position is any integer by which the reader can find a caption again, such as a byte offset or a row number.
    """

    def scan(self) -> Iterator[tuple[int, Caption | BadRecord]]:
        """Read the whole file in order -> each caption's position, and the caption, `validated`, or why it is bad.

        Raises: ValueError that names the file, if the file as a whole cannot be read.
        """
        ...

    def read(self, positions: Iterable[int]) -> Iterator[Caption]:
        """Read the captions at positions that `scan` gave. Raises: ValueError if one has become bad."""
        ...


class CaptionsFile:
    """The captions of a file by number and by video. Holds 16 bytes per caption: its position and its video's hash."""

    def __init__(self, path: Path, reader: CaptionReader, folder: Path | None = None, *, skip_bad: bool = False):
        """Read and check every caption. Use `readers.open_captions` to choose the reader by the file's name.

        `folder`: the folder of videos (default: that of the captions).

        Raises: OSError; ValueError for a bad record, unless `skip_bad`, or if no caption is left.
        """
        self.path, self.folder, self._reader = path, folder or path.parent, reader
        self.bad: list[BadRecord] = []
        """Records that were skipped."""
        positions, videos, digest = array("q"), array("Q"), sha256()
        for position, caption in reader.scan():
            if isinstance(caption, BadRecord):
                if not skip_bad:
                    raise ValueError(f"{path} {caption.place}: {caption.reason}")
                self.bad.append(caption)
                if len(self.bad) > MAX_BAD:
                    first = f"the first is {self.bad[0].place}: {self.bad[0].reason}"
                    raise ValueError(f"{path} has more than {MAX_BAD} bad records, {first}; is it a captions file?")
                continue
            digest.update(caption.to_json_line().encode())
            positions.append(position)
            videos.append(_hash(caption.video))
        if not positions:
            if self.bad:
                others = f" (and {len(self.bad) - 1} more; no caption is left)" if len(self.bad) > 1 else ""
                raise ValueError(f"{path} {self.bad[0].place}: {self.bad[0].reason}{others}")
            raise ValueError(f"{path} holds no captions; expected one per line")
        self._positions, self._videos = np.array(positions), np.array(videos)
        self.sha256: str = digest.hexdigest()
        """Hash of the captions.jsonl that a prepared folder gets."""

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Caption]:
        """Read the file again, in order."""
        return self._reader.read(map(int, self._positions))

    def bad_reasons(self) -> list[str]:
        """One line for each skipped record: the file's name, the place, and what is wrong."""
        return [f"{self.path.name} {record.place}: {record.reason}" for record in self.bad]

    def select(self, indices: Iterable[int]) -> list[Caption]:
        """Captions by index, counted from 0. Raises: ValueError if the file has changed and a record is now bad."""
        return list(self._reader.read(int(self._positions[index]) for index in indices))

    def split(self, fraction: float, draw: Draw | None = None) -> tuple["CaptionsFile", "CaptionsFile"]:
        """Hold out a fraction of the videos, at least one -> (the others' captions, the held-out videos' captions).

        The videos with the smallest hashes of their paths are held out, so that no video is in both parts, and the
        choice does not depend on the order of the file. `draw` may decide on another number of them.
        Raises: ValueError if the fraction is not between 0 and 1, or if there is only one video.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"a fraction of {fraction:g} cannot be held out; expected above 0 and below 1")
        hashes = np.fromiter((_hash(plain_path(caption.video)) for caption in self), np.uint64, len(self))
        videos = np.unique(hashes)
        if len(videos) < 2:
            raise ValueError(f"{self.path} names one video only; holding one out leaves none")
        count = min(max(1, round(fraction * len(videos))), len(videos) - 1)
        if draw is not None:
            order = np.argsort(hashes, kind="stable")
            starts = [*np.searchsorted(hashes[order], videos).tolist(), len(order)]
            drawn = draw(count, (order[start:end] for start, end in pairwise(starts)))
            count = min(max(1, drawn), len(videos) - 1)
        held_out = hashes <= videos[count - 1]
        return self._part(~held_out, self.bad), self._part(held_out, [])

    def _part(self, chosen: NDArray[np.bool_], bad: list[BadRecord]) -> "CaptionsFile":
        part = copy(self)
        part._positions, part._videos, part.bad = self._positions[chosen], self._videos[chosen], bad
        digest = sha256()
        for caption in part:
            digest.update(caption.to_json_line().encode())
        part.sha256 = digest.hexdigest()
        return part

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


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
