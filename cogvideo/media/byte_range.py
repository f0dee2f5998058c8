"""A media file inside another file, such as a member of a tar: opened in place, never copied to disk."""

import errno
import os
import sys
from dataclasses import dataclass
from os.path import abspath, getsize
from pathlib import Path
from stat import S_ISREG

FILE_ERRORS = (
    *(None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EINVAL),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ),
)
"""System errors caused by the file itself. Others, such as a failing disk or too many open files, may not recur."""
PART_BYTES = 1 << 20


@dataclass(frozen=True)
class ByteRange:
    """`size` bytes of `file` from `start` on. Stands for a path wherever a video is read."""

    file: Path
    start: int
    size: int
    name: str
    """Its name in messages, such as "shard-000.tar/a.mp4"."""

    def __str__(self) -> str:
        return self.name


MediaPath = str | Path | ByteRange


def is_file(path: MediaPath) -> bool:
    """Whether this is a regular file; False also where the name or its permissions keep that from being determined.

    Raises: OSError where it is not the file's fault, such as a failing disk.
    """
    return file_size(path.file if isinstance(path, ByteRange) else path) is not None


def file_size(path: str | Path) -> int | None:
    """Bytes of a regular file; None for anything else, as `is_file`. Raises: OSError likewise."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        return None
    except ValueError:  # a null character
        return None
    return status.st_size if S_ISREG(status.st_mode) else None


def media_size(path: MediaPath) -> int:
    """Bytes of a media file. Raises: OSError."""
    return path.size if isinstance(path, ByteRange) else getsize(path)


def media_start(path: MediaPath, size: int) -> bytes:
    """The first bytes of a media file. Raises: OSError."""
    source = path if isinstance(path, ByteRange) else ByteRange(Path(path), 0, size, str(path))
    with open(source.file, "rb") as file:
        file.seek(source.start)
        return file.read(min(size, source.size))


def check_readable(path: MediaPath) -> None:
    """Read a media file to its end, to learn whether the disk gives all of its bytes. Raises: OSError."""
    source = path if isinstance(path, ByteRange) else ByteRange(Path(path), 0, sys.maxsize, str(path))
    place, end = source.start, source.start + source.size
    with open(source.file, "rb", buffering=0) as file:
        file.seek(place)
        while part := file.read(min(PART_BYTES, end - place)):
            place += len(part)


def media_url(path: MediaPath) -> str:
    """The address by which FFmpeg opens a media file, whatever characters its name has."""
    if isinstance(path, ByteRange):
        return f"subfile,,start,{path.start},end,{path.start + path.size},,:file:{abspath(path.file)}"
    return f"file:{abspath(path)}"  # "http:a.mp4" is the name of a file
