"""Captions as tab-separated lines: video, tab, caption. There are no spans."""

from cogvideo.data.captions import Caption


def parse_line(line: str) -> Caption:
    """Raises: ValueError for anything but two fields."""
    video, tab, text = line.partition("\t")
    if not tab or "\t" in text:
        raise ValueError("expected a video, one tab, a caption")
    return Caption(video, text)
