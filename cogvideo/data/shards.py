"""The format of prepared data on disk. `prepare.py` decides what goes into it; `dataset.py` reads it.

    DIR/plan.json          settings and hashes of the inputs; a run with another plan refuses to continue here
    DIR/captions.jsonl     the captions; a row refers to its caption by line, counted from 0
    DIR/shards/00000/      rows.npy (ROW), and tokens.npy (rows, frames, frame_len), frames.npy (rows, H, W, 3) uint8,
                           or pairs.npy (rows, fine tokens of a frame, then coarse ones); shard.json with sizes and
                           hashes. The folder appears when the shard is complete
    DIR/rows.npy           rows.npy of all shards in one file, so that readers need not open every shard
    DIR/skipped.jsonl      with reasons: records that are no captions (caption and video: null), captions that gave no
                           row, and the unused ends of videos (caption: null)
    DIR/manifest.json      written last: the plan, all shards, and counts. Without it the folder is not finished

No file holds a time or a machine's name: the same input gives the same bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cogvideo.files import atomic_directory, atomic_write, read_json, sha256_file, write_json

VERSION = 1
FORMATS = {"tokens": "cogvideo-tokens", "frames": "cogvideo-frames", "pairs": "cogvideo-pairs"}
Kind = Literal["tokens", "frames", "pairs"]

ROW = np.dtype([("caption", "<i4"), ("seconds", "<f4"), ("start", "<f4")])
"""One row: caption index, clip length in seconds (0 for a single frame), time of its first frame."""


@dataclass(frozen=True)
class Shard:
    """A finished shard, described by its shard.json."""

    folder: Path
    info: dict[str, Any]

    @property
    def num_rows(self) -> int:
        return int(self.info["rows"])

    def load(self, name: str) -> NDArray[Any]:
        """Memory-map one array, such as "rows.npy", read-only. Raises: ValueError if it is damaged."""
        self.check(name)
        try:
            array: NDArray[Any] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{self.folder / name} is not a readable array ({error}); prepare it again") from None
        if len(array) != self.num_rows:
            raise ValueError(f"{self.folder / name} holds {len(array)} rows, its shard.json says {self.num_rows}")
        return array

    def check(self, name: str, *, hashes: bool = False) -> None:
        """Compare a file's size, and its hash if `hashes`, with what was written. Raises: ValueError."""
        path, expected = self.folder / name, self.info["files"].get(name)
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise ValueError(f"{path} is not listed with its size and hash; prepare it again")
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes, expected {expected['bytes']}"
            raise ValueError(f"{path} {found}; remove its folder and manifest.json, then run prepare again")
        if hashes and sha256_file(path) != expected["sha256"]:
            raise ValueError(
                f"{path} has changed since it was written; remove its folder and manifest.json, then run prepare again"
            )


def shard_folder(out: Path, index: int) -> Path:
    return out / "shards" / f"{index:05d}"


def finished_shards(out: Path) -> set[str]:
    """Names of the finished shards. Lists the folder, which many processes on a shared disk see alike."""
    folder = out / "shards"
    return {entry.name for entry in folder.iterdir() if entry.name.isdigit()} if folder.is_dir() else set()


def write_shard(folder: Path, arrays: dict[str, NDArray[Any]], skipped: list[dict[str, Any]]) -> None:
    """Write a shard's arrays, which have equally many rows, and its shard.json, as a whole or not at all."""
    with atomic_directory(folder) as temporary:
        files = {}
        for name, array in arrays.items():
            np.save(temporary / name, array, allow_pickle=False)
            files[name] = _size_and_hash(temporary / name)
        write_json(temporary / "shard.json", {"rows": len(arrays["rows.npy"]), "files": files, "skipped": skipped})


def read_shard(folder: Path) -> Shard:
    return Shard(folder, read_json(folder / "shard.json"))


def write_manifest(
    out: Path, plan: dict[str, Any], shards: list[Shard], bad_records: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Finish a folder: write rows.npy, skipped.jsonl and the manifest, which is returned.

    `bad_records`: entries of skipped.jsonl for records that are no captions.
    """
    rows = np.concatenate([shard.load("rows.npy") for shard in shards])
    with atomic_write(out / "rows.npy") as temporary:
        np.save(temporary, rows, allow_pickle=False)
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
    manifest = read_json(path)
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if found != (FORMATS[kind], VERSION):
        raise ValueError(f"{path}: expected format {FORMATS[kind]!r} version {VERSION}, got {found}")
    assert isinstance(manifest, dict)
    shards, tokenizer = manifest.get("shards"), manifest.get("tokenizer")
    valid = isinstance(shards, list) and all(
        isinstance(shard, dict) and isinstance(shard.get("rows"), int) and isinstance(shard.get("files"), dict)
        for shard in shards
    )
    if "files" in manifest:  # rows.npy of all shards in one file
        counted = isinstance(manifest["files"], dict) and isinstance(manifest.get("rows"), int)
        valid = valid and counted and sum(shard["rows"] for shard in manifest["shards"]) == manifest["rows"]
    if not valid or not isinstance(tokenizer, dict | None) or not isinstance(manifest.get("rows_by_seconds"), dict):
        raise ValueError(f"{path} is damaged: it does not list shards as `cogvideo prepare` does; prepare it again")
    return manifest


def open_rows(out: Path, manifest: dict[str, Any], shards: list[Shard]) -> NDArray[Any]:
    """The rows of all shards: (rows,) of ROW. Raises: ValueError if they are damaged."""
    if "files" in manifest:
        return Shard(out, manifest).load("rows.npy")
    return np.concatenate([shard.load("rows.npy") for shard in shards])  # written before there was one rows.npy


def open_shards(out: Path, manifest: dict[str, Any]) -> list[Shard]:
    """The shards that a manifest lists; reads none of their files. Raises: ValueError for an invalid name."""
    shards = []
    for entry in manifest["shards"]:
        if not (isinstance(entry.get("name"), str) and entry["name"].isdigit()):
            raise ValueError(f"{out / 'manifest.json'}: {entry.get('name')!r} is not a shard's name")
        shards.append(Shard(out / "shards" / entry["name"], entry))
    return shards
