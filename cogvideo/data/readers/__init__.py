"""Readers of captions files, one module per format, chosen by the file's suffix.

To add a format, implement `records.Rows` (for one record per line, a function that parses a line for `LineRows`), and
add it to READERS.
"""

from collections.abc import Callable
from itertools import chain
from pathlib import Path

from cogvideo.data.captions import CaptionsFile
from cogvideo.data.readers.delimited import csv_rows, tsv_rows
from cogvideo.data.readers.folder import FolderRows, find_videos
from cogvideo.data.readers.json_file import json_rows
from cogvideo.data.readers.parquet import ParquetRows
from cogvideo.data.readers.records import ReadOptions, RecordReader, Rows
from cogvideo.data.readers.textfile import MAX_LINE_BYTES, LineRows
from cogvideo.data.readers.webdataset import TarRows, find_tars

__all__ = ["MAX_LINE_BYTES", "READERS", "LineRows", "ReadOptions", "open_captions"]

READERS: dict[str, Callable[[Path, ReadOptions], Rows]] = {
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".parquet": ParquetRows,
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names of the captions file of a video folder by Hugging Face's convention."""


def open_captions(
    path: str | Path, options: ReadOptions | None = None, *, videos: Path | None = None, skip_bad: bool = False
) -> CaptionsFile:
    """Open and check captions: a file, tars (shard-{000..009}.tar, or a folder of them), or a folder of videos.

    `videos`: the folder of videos (default: that of the captions). `skip_bad`: skip bad records and list them.
    Raises: OSError; ValueError for an unknown suffix, a bad record (the line is named), an empty file, or a folder of
    tars that holds loose videos or a metadata file too.
    """
    path, options = Path(path), options or ReadOptions()
    folder, rows = _open(path, options)
    folder = videos or folder
    return CaptionsFile(path, RecordReader(path, folder, rows, options), folder, skip_bad=skip_bad)


def _open(path: Path, options: ReadOptions) -> tuple[Path, Rows]:
    """The folder of videos, and the records."""
    metadata = [path / name for name in METADATA if (path / name).is_file()] if path.is_dir() else []
    if (found := find_tars(path)) is not None:
        tars, folder = found
        other = next(chain((file.name for file in metadata), find_videos(path)), None) if path.is_dir() else None
        if other is not None:
            raise ValueError(
                f"{path} holds tars ({tars[0].name}) and {other}; expected WebDataset tars alone, or videos with their "
                f"captions: move one of the two away, or give {'the captions file' if metadata else 'the tars'} by name"
            )
        return folder, TarRows(tars, folder, options)
    if path.is_dir():
        if len(metadata) > 1:
            names = " and ".join(file.name for file in metadata)
            raise ValueError(f"{path} holds {names}; name the one to use with --captions")
        return path, READERS[metadata[0].suffix](metadata[0], options) if metadata else FolderRows(path, options)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        expected, got = ", ".join(READERS), repr(path.suffix) if path.suffix else "no suffix"
        raise ValueError(f"{path}: expected a captions file in {expected}, a .tar or a folder, got {got}")
    return path.parent, reader(path, options)
