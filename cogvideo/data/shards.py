"""The format of prepared data on disk. `prepare.py` decides what goes into it; `dataset.py` reads it.

    DIR/plan.json          settings and hashes of the inputs; a run with another plan refuses to continue here
    DIR/captions.jsonl     the captions; a row refers to its caption by line, counted from 0
    DIR/shards/00000/      rows.npy (ROW), and tokens.npy (rows, frames, frame_len), frames.npy (rows, H, W, 3) uint8,
                           or pairs.npy (rows, fine tokens of a frame, then coarse ones); shard.json with sizes and
                           hashes, and with the sizes of the videos. The folder appears when the shard is complete
    DIR/rows.npy           rows.npy of all shards in one file, so that readers need not open every shard
    DIR/skipped.jsonl      with reasons: records that are not captions (caption and video: null), captions that yielded
                           no row, and unused ends and clips of videos (caption: null)
    DIR/manifest.json      written last: the plan, all shards, and counts. Without it the folder is not finished

No file contains a time or a machine's name, so the same input gives the same bytes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray
from typing_extensions import TypedDict

from cogvideo.files import (
    Count,
    atomic_directory,
    atomic_write,
    checked,
    open_npy,
    read_json,
    sha256_file,
    write_json,
    write_npy,
)

VERSION = 1
FORMATS = {"tokens": "cogvideo-tokens", "frames": "cogvideo-frames", "pairs": "cogvideo-pairs"}
Kind = Literal["tokens", "frames", "pairs"]

ROW = np.dtype([("caption", "<i4"), ("seconds", "<f4"), ("start", "<f4")])
"""One row: caption index, clip length in seconds (0 for a single frame), time of its first frame."""
TOKEN_TYPES = ("<u2", "<i4")
ARRAYS: dict[str, tuple[Any, tuple[int | None, ...]]] = {
    "rows.npy": (ROW, ()),
    "tokens.npy": (TOKEN_TYPES, (None, None)),
    "frames.npy": ("|u1", (None, None, 3)),
    "pairs.npy": (TOKEN_TYPES, (None,)),
}
"""Allowed dtypes of each array, and the shape of its rows; None is any length."""

PREPARE_AGAIN = "prepare it again, into another folder"
MAKE_AGAIN = "move its folder and manifest.json away, then run prepare again"


class FileEntry(TypedDict):
    """A file in a manifest or a shard.json."""

    bytes: Count
    sha256: str


class ShardInfo(TypedDict):
    """What a manifest records about each shard, and about the whole."""

    rows: Count
    files: dict[str, FileEntry]


class Skipped(TypedDict):
    """A caption without rows or an unused part of a video; there are further keys, such as the caption's index."""

    video: str
    reason: str


class ShardFile(ShardInfo):
    """The content of shard.json."""

    skipped: list[Skipped]
    video_bytes: NotRequired[list[Count | None]]
    """Sizes of the shard's videos, in order; None: there was no such file. Earlier versions did not record them."""


class NamedShard(ShardInfo):
    """A shard in the manifest."""

    name: str


class TokenizerEntry(TypedDict):
    """The image tokenizer that made the tokens."""

    num_tokens: NotRequired[Annotated[int, Ge(1), Le(2**31)]]
    compress_rate: NotRequired[Annotated[int, Ge(1), Le(2**16)]]


class PreparedSizes(TypedDict):
    """The settings that hold the sides of frames in pixels."""

    frame_pixels: NotRequired[Annotated[int, Ge(1), Le(2**16)]]
    low_res_pixels: NotRequired[Annotated[int, Ge(1), Le(2**16)] | None]


class Manifest(TypedDict):
    """The content of manifest.json besides its format and version."""

    tokenizer: TokenizerEntry | None
    high_res_tokenizer: NotRequired[TokenizerEntry]
    config: NotRequired[PreparedSizes]
    captions_sha256: NotRequired[str]
    rows_by_seconds: dict[str, Count]
    shards: list[NamedShard]
    rows: NotRequired[Count]
    files: NotRequired[dict[str, FileEntry]]


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    folder: Path
    info: Mapping[str, Any]
    """At least the keys of `ShardInfo`."""

    @property
    def num_rows(self) -> int:
        return int(self.info["rows"])

    def load(self, name: str) -> NDArray[Any]:
        """Memory-map one array, such as "rows.npy", read-only. Raises: ValueError if it is damaged."""
        self.check(name)
        dtypes, row_shape = ARRAYS[name]
        try:
            return open_npy(self.folder / name, dtypes, (self.num_rows, *row_shape))
        except ValueError as error:
            raise ValueError(f"{error}; {PREPARE_AGAIN}") from None

    def check(self, name: str, *, hashes: bool = False) -> None:
        """Compare a file's size, and its hash if `hashes`, with what was written. Raises: ValueError."""
        path, expected = self.folder / name, self.info["files"].get(name)
        if expected is None:
            raise ValueError(f"{path} is not listed with its size and hash; {PREPARE_AGAIN}")
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes, expected {expected['bytes']}"
            raise ValueError(f"{path} {found}; {MAKE_AGAIN}")
        if hashes and sha256_file(path) != expected["sha256"]:
            raise ValueError(f"{path} has changed since it was written; {MAKE_AGAIN}")


def shard_folder(out: Path, index: int) -> Path:
    return out / "shards" / f"{index:05d}"


def finished_shards(out: Path) -> set[str]:
    """Names of the finished shards. Lists the folder, which looks the same to all processes on a shared disk."""
    folder = out / "shards"
    return {entry.name for entry in folder.iterdir() if entry.name.isdigit()} if folder.is_dir() else set()


def write_shard(
    folder: Path,
    arrays: dict[str, NDArray[Any]],
    skipped: list[dict[str, Any]],
    video_bytes: Sequence[int | None] | None = None,
) -> None:
    """Write a shard's arrays, which all have the same number of rows, and its shard.json: completely or not at all.

    `video_bytes`: sizes of its videos. An existing shard is replaced.
    """
    with atomic_directory(folder, replace=True) as temporary:
        files = {}
        for name, array in arrays.items():
            write_npy(temporary / name, array)
            files[name] = _size_and_hash(temporary / name)
        info = {"rows": len(arrays["rows.npy"]), "files": files, "skipped": skipped}
        write_json(temporary / "shard.json", info if video_bytes is None else info | {"video_bytes": video_bytes})


def read_shard(folder: Path) -> Shard:
    return Shard(folder, read_json(folder / "shard.json", ShardFile))


def write_manifest(
    out: Path, plan: dict[str, Any], shards: list[Shard], bad_records: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Finish a folder: write rows.npy, skipped.jsonl and the manifest, which is returned.

    `bad_records`: entries of skipped.jsonl for records that are not captions.
    """
    rows = np.concatenate([shard.load("rows.npy") for shard in shards])
    with atomic_write(out / "rows.npy") as temporary:
        write_npy(temporary, rows)
    with atomic_write(out / "skipped.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        skipped = [*bad_records, *(entry for shard in shards for entry in shard.info["skipped"])]
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
    values, counts = np.unique(rows["seconds"], return_counts=True)
    manifest = {
        **plan,
        "rows": len(rows),
        "rows_by_seconds": {f"{value:g}": int(count) for value, count in zip(values, counts, strict=True)},
        "skipped": len(bad_records) + sum(entry["caption"] is not None for entry in skipped),
        "files": {"rows.npy": _size_and_hash(out / "rows.npy")},
        "shards": [{"name": s.folder.name, "rows": s.num_rows, "files": s.info["files"]} for s in shards],
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _size_and_hash(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def read_manifest(out: Path, kind: Kind) -> dict[str, Any]:
    """Read and check a folder's manifest. Raises: ValueError if unfinished, damaged, or of another kind or version."""
    path = out / "manifest.json"
    if not path.is_file():
        unfinished = (out / "plan.json").is_file()
        problem = "is not finished; run the same `cogvideo prepare` again" if unfinished else "is not prepared data"
        raise ValueError(f"{out} {problem}")
    manifest: dict[str, Any] = read_json(path, dict[str, Any])
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMATS[kind], VERSION):
        raise ValueError(f"{path}: expected format {FORMATS[kind]!r} version {VERSION}, got {str(found)[:80]}")
    try:
        checked(manifest, Manifest, path)
    except ValueError as error:
        raise ValueError(f"{error}; {PREPARE_AGAIN}") from None
    if "files" in manifest and sum(shard["rows"] for shard in manifest["shards"]) != manifest.get("rows"):
        raise ValueError(f"{path} is damaged: rows is not the sum over its shards; {PREPARE_AGAIN}")
    return manifest


def open_rows(out: Path, manifest: dict[str, Any], shards: list[Shard]) -> NDArray[Any]:
    """The rows of all shards: (rows,) of ROW. Raises: ValueError if they are damaged."""
    if "files" in manifest:
        rows = Shard(out, checked(manifest, ShardInfo, out / "manifest.json")).load("rows.npy")
    else:  # from a version that wrote rows.npy in shards only
        rows = np.concatenate([shard.load("rows.npy") for shard in shards])
    if not (np.isfinite(rows["seconds"]).all() and rows["seconds"].min(initial=0) >= 0):
        raise ValueError(f"{out / 'rows.npy'} is damaged: it holds invalid clip lengths; {PREPARE_AGAIN}")
    return rows


def open_shards(out: Path, manifest: dict[str, Any]) -> list[Shard]:
    """The shards that a manifest lists, without reading their files. Raises: ValueError for an invalid name."""
    shards = []
    for entry in manifest["shards"]:
        if not re.fullmatch(r"[0-9]{1,12}", entry["name"]):
            raise ValueError(f"{out / 'manifest.json'}: {entry['name'][:80]!r} is not a shard's name; {PREPARE_AGAIN}")
        shards.append(Shard(out / "shards" / entry["name"], entry))
    return shards
