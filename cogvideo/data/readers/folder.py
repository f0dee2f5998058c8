"""Captions as files beside the videos: NAME.mp4 with NAME.txt, NAME.caption or NAME.json, at any depth of a folder.

A .txt or .caption file is one caption. A .json file is an object such as {"caption": "...", "start": 2.0}, whose
caption may be a list; next to a .txt file, it holds only additional fields.
"""

import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cogvideo.data.readers.delimited import MEDIA_SUFFIXES
from cogvideo.data.readers.records import ReadOptions, Row
from cogvideo.data.readers.textfile import decode
from cogvideo.media.byte_range import FILE_ERRORS

TEXT_SUFFIXES = (".txt", ".caption")
SIDECAR_SUFFIXES = (*TEXT_SUFFIXES, ".json")
MAX_SIDECAR_BYTES = 1 << 20
OWN_VIDEO, OWN_TEXT = "<video>", "<text>"
"""Names of the fields that do not come from a .json file."""
LINKED = "is a link to a folder, which is not followed; move the videos here, or give the folder that it leads to"


class FolderRows:
    """Videos of a folder, sorted by path, with the texts beside them. A position is a video's index."""

    is_text = False

    def __init__(self, folder: Path, options: ReadOptions):
        """Raises: OSError; ValueError if there is no video."""
        self._folder, self._options = folder, options
        self._texts: tuple[Path | None, dict[str, Path]] = (None, {})
        """The folder looked at last, and its texts."""
        self._linked: list[str] = []
        self._videos = sorted(find_videos(folder, self._linked))
        if not self._videos:
            links = f"; {self._linked[0]} {LINKED}" if self._linked else ""
            raise ValueError(
                f"{folder} holds no videos; expected NAME.mp4 with NAME.txt beside it, or a metadata.csv{links}"
            )

    def scan(self) -> Iterator[Row]:
        """The videos, then the folders that were left out because they are links."""
        yield from map(self._row, range(len(self._videos)))
        for number, name in enumerate(sorted(self._linked), len(self._videos)):
            yield Row(number, _printable(name), {}, LINKED)

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        return map(self._row, positions)

    def _row(self, number: int) -> Row:
        video = self._videos[number]
        place = _printable(video)
        stem = (self._folder / video).with_suffix("")
        try:
            found = self._texts_of(stem.parent)
            beside = {suffix: path for suffix in SIDECAR_SUFFIXES if (path := found.get(_plain(stem.name) + suffix))}
            texts = {suffix: self._read(path) for suffix, path in beside.items()}
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in FILE_ERRORS:
                raise
            reason = error.strerror or "cannot be read" if isinstance(error, OSError) else str(error)
            return Row(number, place, {}, reason.replace(f"{self._folder}/", ""))
        return sidecar_row(number, place, video, texts, self._options)

    def _texts_of(self, folder: Path) -> dict[str, Path]:
        """The texts of a folder by their names, with suffixes in lower case. Raises: OSError."""
        if self._texts[0] != folder:
            paths = [path for path in folder.iterdir() if path.suffix.lower() in SIDECAR_SUFFIXES and path.is_file()]
            # Sorted, so that a.txt takes precedence over a.TXT.
            self._texts = folder, {_plain(path.stem) + path.suffix.lower(): path for path in sorted(paths)}
        return self._texts[1]

    def _read(self, path: Path) -> str:
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(f"{path} is a link that leads out of {self._folder}; give a path inside it")
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise ValueError(f"{path} is larger than {MAX_SIDECAR_BYTES} bytes; expected a caption")
        return decode(path.read_bytes(), path, self._options.encoding)


def find_videos(folder: Path, linked: list[str] | None = None) -> Iterator[str]:
    """The videos of a folder, at any depth, as paths relative to it; hidden ones are left out. Raises: OSError.

    Links to folders are not followed, but added to `linked`.
    """
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if linked is not None:
            paths = (os.path.join(place, name) for name in folders)
            linked += [os.path.relpath(path, folder) for path in paths if os.path.islink(path)]
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in MEDIA_SUFFIXES:
                yield os.path.relpath(os.path.join(place, name), folder)


def sidecar_row(position: int, place: str, video: str, texts: Mapping[str, str], options: ReadOptions) -> Row:
    """The record of a video from the `texts` beside it, by suffix. A .json cannot change which file the video is."""
    fields: dict[str, Any] = {}
    if ".json" in texts:
        try:
            value = json.loads(texts[".json"])
        except (ValueError, RecursionError):
            return Row(position, place, {}, "its .json is not JSON")
        if not isinstance(value, dict | list | str):
            return Row(position, place, {}, "its .json is not an object with a caption")
        fields = value if isinstance(value, dict) else {"caption": value}
    captions = [texts[suffix] for suffix in TEXT_SUFFIXES if suffix in texts]
    if len(captions) > 1:
        return Row(position, place, {}, f"it has both {' and '.join(TEXT_SUFFIXES)} beside it; keep one")
    try:
        roles = options.roles(fields, ("start", "end") if captions else ("caption", "start", "end"))
    except ValueError as error:
        return Row(position, place, {}, f"its .json: {error}")
    if captions:
        roles, fields = {**roles, "caption": OWN_TEXT}, {**fields, OWN_TEXT: captions[0]}
    elif "caption" not in roles:
        wanted = ", ".join(SIDECAR_SUFFIXES)
        return Row(position, place, {}, f"no caption beside it; expected the same name with {wanted}")
    return Row(position, place, {**fields, OWN_VIDEO: video}, roles={**roles, "video": OWN_VIDEO})


def _printable(name: str) -> str:
    """A file's name for messages."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _plain(name: str) -> str:
    """A name with its accents composed; some systems store them decomposed."""
    return unicodedata.normalize("NFC", name)


def _raise(error: OSError) -> None:
    raise error
