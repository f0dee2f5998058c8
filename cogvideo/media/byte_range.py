"""A media file inside another file, such as a member of a tar: opened in place, never copied to disk."""

from dataclasses import dataclass
from os.path import abspath, getsize
from pathlib import Path


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
    """Whether this is a regular file; False also where that cannot be determined (permissions, overlong names)."""
    try:
        return Path(path.file if isinstance(path, ByteRange) else path).is_file()
    except (OSError, ValueError):
        return False


def media_size(path: MediaPath) -> int:
    """Bytes of a media file. Raises: OSError."""
    return path.size if isinstance(path, ByteRange) else getsize(path)


def media_start(path: MediaPath, size: int) -> bytes:
    """The first bytes of a media file. Raises: OSError."""
    source = path if isinstance(path, ByteRange) else ByteRange(Path(path), 0, size, str(path))
    with open(source.file, "rb") as file:
        file.seek(source.start)
        return file.read(min(size, source.size))


def media_url(path: MediaPath) -> str:
    """The address by which FFmpeg opens a media file, whatever characters its name has."""
    if isinstance(path, ByteRange):
        return f"subfile,,start,{path.start},end,{path.start + path.size},,:file:{abspath(path.file)}"
    return f"file:{abspath(path)}"  # "http:a.mp4" is the name of a file
