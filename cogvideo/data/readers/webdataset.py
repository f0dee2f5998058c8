"""Captions and videos of WebDataset tars: members KEY.mp4 with KEY.txt, KEY.caption or KEY.json next to each other.

Tars are read in place, in one pass: members are found by their headers, and a video is later decoded from its bytes
within the tar. Nothing is extracted. Tars must not be compressed; compression does not make videos smaller anyway.
"""

import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cogvideo.data.readers.delimited import MEDIA_SUFFIXES
from cogvideo.data.readers.folder import MAX_SIDECAR_BYTES, SIDECAR_SUFFIXES, sidecar_row
from cogvideo.data.readers.records import ReadOptions, Row
from cogvideo.data.readers.textfile import decode
from cogvideo.media.byte_range import FILE_ERRORS, ByteRange

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_TARS = 1 << 20
MAX_HEADER_BYTES = 1 << 20
"""Limit on a member's name and attributes, which the standard library reads in one piece."""


class TarRows:
    """Samples of tars, in order of tars and members. Positions are sample indices; each takes 12 bytes of memory."""

    is_text = False

    def __init__(self, tars: list[Path], folder: Path, options: ReadOptions):
        """`folder`: names of videos begin with the path of their tar relative to it.

        Raises: OSError; ValueError for a compressed tar.
        """
        self._tars, self._folder, self._options = tars, folder, options
        self._tar_of, self._offsets = array("I"), array("q")
        for tar in tars:
            with open(tar, "rb") as file:
                if file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
                    raise ValueError(f"{tar} is compressed; decompress it first, since videos are read in place")

    def scan(self) -> Iterator[Row]:
        self._tar_of, self._offsets = array("I"), array("q")
        for number, tar in enumerate(self._tars):
            seen: set[int] = set()
            with open(tar, "rb") as file:
                try:
                    for sample in _samples(file):
                        row = self._row(len(self._offsets), tar, file, sample)
                        if row is None:
                            continue
                        if (key := hash(sample.key)) in seen:
                            row = row._replace(fields={}, problem=f"duplicate key {sample.key!r}; keys must be unique")
                        seen.add(key)
                        self._tar_of.append(number)
                        self._offsets.append(sample.offset)
                        yield row
                except (tarfile.TarError, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in FILE_ERRORS:
                        raise
                    reason = f"damaged, the samples from here on are lost ({error})"
                    yield Row(0, f"{self._name(tar)} byte {file.tell()}", {}, reason)

    def read(self, positions: Iterable[int]) -> Iterator[Row]:
        for position in positions:
            tar = self._tars[self._tar_of[position]]
            with open(tar, "rb") as file:
                file.seek(self._offsets[position])
                try:
                    row = self._row(position, tar, file, next(_samples(file)))
                except (tarfile.TarError, StopIteration):
                    row = None
            yield row or Row(position, self._name(tar), {}, "the file has changed")

    def _name(self, tar: Path) -> str:
        return str(tar.relative_to(self._folder))

    def _row(self, position: int, tar: Path, file: BinaryIO, sample: "_Sample") -> Row | None:
        """A sample's record; None if it has neither video nor caption."""
        place = f"{self._name(tar)} {sample.key}"
        videos = [member for member in sample.members if _suffix(member) in MEDIA_SUFFIXES]
        texts = [member for member in sample.members if _suffix(member) in SIDECAR_SUFFIXES]
        if not videos and not texts:
            return None
        used = videos + texts
        if problem := next(filter(None, map(_unusable, used)), ""):
            return Row(position, place, {}, problem)
        if not videos:
            return Row(position, place, {}, "no video for this caption; members with the same key must be adjacent")
        if len(videos) > 1 or len({_suffix(member) for member in texts}) < len(texts):
            names = ", ".join(member.name for member in used)
            return Row(
                position, place, {}, f"expected one video and at most one text of each kind per key, got {names}"
            )
        try:
            contents = {_suffix(member): self._text(file, member) for member in texts}
        except ValueError as error:
            return Row(position, place, {}, str(error))
        name = f"{self._name(tar)}/{videos[0].name.removeprefix('./')}"
        source = ByteRange(tar, videos[0].offset_data, videos[0].size, name)
        if videos[0].name.startswith("/") or ".." in videos[0].name.split("/"):
            return Row(position, place, {}, f"{videos[0].name!r} is a path that leads out of the tar")
        return sidecar_row(position, place, name, contents, self._options)._replace(source=source)

    def _text(self, file: BinaryIO, member: tarfile.TarInfo) -> str:
        """Raises: ValueError."""
        if member.size > MAX_SIDECAR_BYTES:
            raise ValueError(f"{member.name} has {member.size} bytes; expected at most {MAX_SIDECAR_BYTES}")
        file.seek(member.offset_data)
        data = file.read(member.size)
        if len(data) < member.size:
            raise ValueError(f"{member.name} is cut short")
        return decode(data, member.name, self._options.encoding)


class _Sample:
    """Adjacent members with the same key."""

    def __init__(self, key: str, members: list[tarfile.TarInfo]):
        """`key`: the members' name up to the first dot."""
        self.key, self.members = key, members

    @property
    def offset(self) -> int:
        return self.members[0].offset

    def rest(self, video: tarfile.TarInfo) -> "_Sample | None":
        """Split off the sample of the next member, a video, if this one has a video of another name; else None.

        Names that contain dots, such as 22.05.mp4 and 22.06.mp4, put several videos under one key. The new sample takes
        its texts out of this one, and both then have their whole names as keys.
        """
        stem = _stem(video)
        own = [_stem(member) for member in self.members if _suffix(member) in MEDIA_SUFFIXES]
        if not own or any(f"{name}.".startswith(f"{stem}.") or f"{stem}.".startswith(f"{name}.") for name in own):
            return None
        count = len(self.members)
        while _stem(self.members[count - 1]) == stem:
            count -= 1
        moved, self.members = self.members[count:], self.members[:count]
        self.key = own[0]
        return _Sample(stem, [*moved, video])


class _BoundedFile:
    """The part of the file interface that tarfile needs; refuses to read more at once than a header may need."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _samples(file: BinaryIO) -> Iterator[_Sample]:
    """Samples from the file's position on. Raises: tarfile.TarError, after the samples before the damage."""
    sample, key = None, ""
    try:
        for member in _members(file):
            folder, _, base = member.name.rpartition("/")
            if member.isdir() or base.startswith("."):
                continue
            before, key = key, f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]
            if sample is None or key != before:
                following = _Sample(key, [member])
            elif _suffix(member) in MEDIA_SUFFIXES and (rest := sample.rest(member)) is not None:
                following = rest
            else:
                sample.members.append(member)
                continue
            if sample is not None:
                yield sample
            sample = following
    except tarfile.TarError:
        if sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Members from the file's position on. Raises: tarfile.TarError where the tar is damaged or cut short."""
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    tar = _header(lambda: tarfile.TarFile(fileobj=_BoundedFile(file)))  # type: ignore[arg-type]
    last = -1
    while (member := _header(tar.next)) is not None:
        tar.members = []  # tarfile would keep them all
        if member.offset <= last or member.size < 0:
            raise tarfile.ReadError("its headers form a circle")
        if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
            raise tarfile.ReadError(f"{member.name} is cut short")
        last = member.offset
        yield member
    file.seek(tar.offset)  # tarfile stops silently where no header follows
    if (rest := file.read(MAX_HEADER_BYTES)).strip(b"\0"):
        raise tarfile.ReadError("data after its end" if not rest[:512].strip(b"\0") else "no header follows")


def _header(read: Callable[[], Any]) -> Any:
    """Call `read`, which reads a header. Raises: tarfile.TarError, also where tarfile fails in other ways."""
    try:
        return read()
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise tarfile.ReadError(f"a damaged header: {str(error)[:60]}") from None


def _stem(member: tarfile.TarInfo) -> str:
    return member.name.removesuffix(Path(member.name).suffix)


def _suffix(member: tarfile.TarInfo) -> str:
    return Path(member.name).suffix.lower()


def _unusable(member: tarfile.TarInfo) -> str:
    """Why a member cannot be read in place."""
    if member.islnk() or member.issym():
        return f"{member.name} is a link to {member.linkname[:80]!r}; expected a file"
    if member.issparse():
        return f"{member.name} is stored sparsely; write the tar without --sparse"
    return "" if member.isreg() else f"{member.name} is not a plain file"


def find_tars(path: Path) -> tuple[list[Path], Path] | None:
    """The tars that a path stands for, and the folder that they are in; None if it stands for none.

    shard-{000..009}.tar stands for ten, a folder for the tars in it.
    Raises: ValueError if the range is too long.
    """
    if path.is_dir():
        tars = sorted(entry for entry in path.iterdir() if entry.suffix == ".tar" and not entry.name.startswith("."))
        return (tars, path) if tars else None
    if not path.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        return None
    return _expand_braces(path), Path(str(path).split("{")[0] + "x").parent if BRACES.search(str(path)) else path.parent


def _expand_braces(path: Path) -> list[Path]:
    """Every path that {000..009} stands for; the width of the first number is kept. Raises: ValueError."""
    match = BRACES.search(str(path))
    if match is None:
        return [path]
    first, last = map(int, match.groups())
    if not first <= last < first + MAX_TARS:
        raise ValueError(f"{path}: expected a range such as {{000..009}}, of at most {MAX_TARS} files")
    width, text = len(match[1]), str(path)
    named = (f"{text[: match.start()]}{number:0{width}d}{text[match.end() :]}" for number in range(first, last + 1))
    return [each for name in named for each in _expand_braces(Path(name))]
