"""Captions as JSON lines: {"video": "clips/1.mp4", "caption": "...", "start": 2.0, "end": 6.0}; start, end optional."""

import json
from typing import Any


def parse_line(line: str) -> dict[str, Any]:
    """Raises: ValueError for anything but an object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('not JSON; expected {"video": "...", "caption": "..."}') from None
    if not isinstance(record, dict):
        raise ValueError('expected an object {"video": "...", "caption": "..."}')
    return record
