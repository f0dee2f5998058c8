"""Detects files that are cut short, where the container shows it: by sizes in the header, or a mark at the end.

MPEG-TS has neither, and neither has a Matroska file written without its size, as live recordings are.
"""

from av.container import InputContainer
from av.video.stream import VideoStream

from cogvideo.media.byte_range import ByteRange, MediaPath, media_size, media_start

EBML_HEADER, SEGMENT = 0x1A45DFA3, 0x18538067
HEADER_BYTES = 4096
GIF_TRAILER = b";"
TAIL_BYTES = 64
"""Bytes examined at the end of a GIF: zeros after the trailer are not damage."""


def is_cut_short(path: MediaPath, container: InputContainer, stream: VideoStream) -> bool:
    """Whether a file certainly ends before its contents do. Raises: OSError."""
    name, size = container.format.name, media_size(path)
    if name.startswith("mov"):  # the index lists frames beyond the end
        return any(entry.pos + entry.size > size for entry in stream.index_entries)
    if name.startswith("matroska"):
        return _matroska_end(media_start(path, HEADER_BYTES)) > size
    if name == "avi":  # the size of its first RIFF chunk
        start = media_start(path, 8)
        return start[:4] == b"RIFF" and int.from_bytes(start[4:], "little") + 8 > size
    return name == "gif" and not _media_end(path, TAIL_BYTES).rstrip(b"\0").endswith(GIF_TRAILER)


def _matroska_end(start: bytes) -> int:
    """Where the segment ends, by its size; 0 if the size is unknown."""
    place = 0
    for expected in (EBML_HEADER, SEGMENT):
        id, place = int.from_bytes(start[place : place + 4]), place + 4
        if id != expected or place >= len(start) or not start[place]:
            return 0
        length = 9 - start[place].bit_length()  # leading zeros of the first byte give the length
        ones = (1 << 7 * length) - 1
        size, place = int.from_bytes(start[place : place + length]) & ones, place + length
        if size == ones:
            return 0
        if expected == SEGMENT:
            return place + size
        place += size
    return 0


def _media_end(path: MediaPath, size: int) -> bytes:
    """The last bytes of a media file."""
    whole = media_size(path)
    begin = max(0, whole - size)
    if isinstance(path, ByteRange):
        return media_start(ByteRange(path.file, path.start + begin, whole - begin, path.name), size)
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read(size)
