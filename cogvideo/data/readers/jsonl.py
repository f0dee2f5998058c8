"""Captions as JSON lines: {"video": "clips/1.mp4", "caption": "...", "start": 2.0, "end": 6.0}; start, end optional."""

import json

from cogvideo.data.captions import Caption

FIELDS = ("video", "caption", "start", "end")


def parse_line(line: str) -> Caption:
    """Raises: ValueError for anything but an object with these fields of the right types."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('not JSON; expected {"video": "...", "caption": "..."}') from None
    if not isinstance(record, dict):
        raise ValueError('expected an object {"video": "...", "caption": "..."}')
    if unknown := sorted(set(record) - set(FIELDS)):
        raise ValueError(f"unknown field {unknown[0]!r}; known fields: {', '.join(FIELDS)}")
    for name in ("video", "caption"):
        if not isinstance(record.get(name), str):
            raise ValueError(f"{name}={record.get(name)!r}; expected text")
    for name in ("start", "end"):
        value = record.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name}={value!r}; expected seconds")
    end = record.get("end")
    try:
        seconds = float(record.get("start") or 0.0), None if end is None else float(end)
    except OverflowError:
        raise ValueError("start or end is larger than any video is long; expected seconds") from None
    return Caption(record["video"], record["caption"], *seconds)
