"""The prepared data's format on disk. What goes into it is `prepare.py`'s business; reading it is `dataset.py`'s.

    DIR/plan.json          what is being made of what; a run with another plan refuses to mix with it
    DIR/captions.jsonl     the captions; a caption's id is its line, from 0
    DIR/shards/00000/      rows.npy (ROW), and tokens.npy (rows, frames, frame_len), frames.npy (rows, H, W, 3) uint8,
                           or pairs.npy (rows, fine tokens of a frame, then coarse ones); shard.json with sizes and
                           hashes; a shard's folder appears when it is whole
    DIR/rows.npy           the shards' rows.npy as one, so that a reader of many shards opens one file
    DIR/skipped.jsonl      the captions that gave nothing, each with the reason
    DIR/manifest.json      written last: the plan, every shard, what there is of what. No manifest: not finished

No file holds a time or a machine's name: the same input gives the same bytes.
"""

import json
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
"""One row of a shard: caption id, clip length in seconds (0 for single frames), time of its first frame."""


@dataclass(frozen=True)
class Shard:
    """A finished shard, as its shard.json says."""

    folder: Path
    info: dict[str, Any]

    @property
    def num_rows(self) -> int:
        return int(self.info["rows"])

    def load(self, name: str) -> NDArray:
        """Map one array, "rows.npy" say, into memory, read-only. Raises ValueError if it was cut or is no array."""
        self.check(name)
        try:
            array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{self.folder / name} is not a readable array ({error}); prepare it again") from None
        if len(array) != self.num_rows:
            raise ValueError(f"{self.folder / name} holds {len(array)} rows, its shard.json says {self.num_rows}")
        return array

    def check(self, name: str, *, hashes: bool = False) -> None:
        """Compare a file's size, and its hash if asked, with what was written. Raises ValueError."""
        path, expected = self.folder / name, self.info["files"].get(name)
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise ValueError(f"{path} is not listed with its size and hash; prepare it again")
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes, expected {expected['bytes']}"
            raise ValueError(f"{path} {found}; remove its folder and manifest.json, then run prepare again")
        if hashes and sha256_file(path) != expected["sha256"]:
            raise ValueError(
                f"{path} has changed since it was written; remove its folder and manifest.json, prepare again"
            )


def shard_folder(out: Path, index: int) -> Path:
    return out / "shards" / f"{index:05d}"


def shards_made(out: Path) -> set[str]:
    """The names of the shards that are whole, by listing their folder: many processes on a shared disk see it so."""
    folder = out / "shards"
    return {entry.name for entry in folder.iterdir() if entry.name.isdigit()} if folder.is_dir() else set()


def write_shard(folder: Path, arrays: dict[str, NDArray], skipped: list[dict[str, Any]]) -> None:
    """Write a shard's arrays (all of as many rows) and its shard.json, whole or not at all."""
    with atomic_directory(folder) as part:
        files = {}
        for name, array in arrays.items():
            np.save(part / name, array, allow_pickle=False)
            files[name] = _size_and_hash(part / name)
        write_json(part / "shard.json", {"rows": len(arrays["rows.npy"]), "files": files, "skipped": skipped})


def read_shard(folder: Path) -> Shard:
    return Shard(folder, read_json(folder / "shard.json"))


def write_manifest(out: Path, plan: dict[str, Any], shards: list[Shard]) -> dict[str, Any]:
    """Finish: gather the rows, list the shards and all that was skipped. Returns what was written."""
    rows = np.concatenate([shard.load("rows.npy") for shard in shards])
    with atomic_write(out / "rows.npy") as part:
        np.save(part, rows, allow_pickle=False)
    with atomic_write(out / "skipped.jsonl") as part, open(part, "w", encoding="utf-8") as file:
        skipped = [entry for shard in shards for entry in shard.info["skipped"]]
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
    values, counts = np.unique(rows["seconds"], return_counts=True)
    manifest = {
        **plan,
        "rows": len(rows),
        "rows_by_seconds": {f"{value:g}": int(count) for value, count in zip(values, counts, strict=True)},
        "skipped": len(skipped),
        "files": {"rows.npy": _size_and_hash(out / "rows.npy")},
        "shards": [{"name": s.folder.name, "rows": s.num_rows, "files": s.info["files"]} for s in shards],
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _size_and_hash(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def read_manifest(out: Path, kind: Kind) -> dict[str, Any]:
    """Read and check a finished folder's manifest. Raises ValueError if unfinished, of another kind or version."""
    path = out / "manifest.json"
    if not path.is_file():
        unfinished = (out / "plan.json").is_file()
        problem = "is not finished; run the same `cogvideo prepare` again" if unfinished else "is not prepared data"
        raise ValueError(f"{out} {problem}")
    manifest = read_json(path)
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if found != (FORMATS[kind], VERSION):
        raise ValueError(f"{path}: expected format {FORMATS[kind]!r} version {VERSION}, got {found}")
    shards, tokenizer = manifest.get("shards"), manifest.get("tokenizer")
    listed = isinstance(shards, list) and all(
        isinstance(shard, dict) and isinstance(shard.get("rows"), int) and isinstance(shard.get("files"), dict)
        for shard in shards
    )
    if "files" in manifest:  # rows of all shards in one file
        counted = isinstance(manifest["files"], dict) and isinstance(manifest.get("rows"), int)
        listed = listed and counted and sum(shard["rows"] for shard in manifest["shards"]) == manifest["rows"]
    if not listed or not isinstance(tokenizer, dict | None) or not isinstance(manifest.get("rows_by_seconds"), dict):
        raise ValueError(f"{path} is damaged: it does not list shards as `cogvideo prepare` does; prepare it again")
    return manifest


def open_rows(out: Path, manifest: dict[str, Any], shards: list[Shard]) -> NDArray:
    """(rows,) of ROW, of all shards. Raises ValueError if they are damaged."""
    if "files" in manifest:
        return Shard(out, manifest).load("rows.npy")
    return np.concatenate([shard.load("rows.npy") for shard in shards])  # a folder made before rows.npy was


def open_shards(out: Path, manifest: dict[str, Any]) -> list[Shard]:
    """The manifest's shards, not yet read."""
    shards = []
    for entry in manifest["shards"]:
        if not (isinstance(entry.get("name"), str) and entry["name"].isdigit()):
            raise ValueError(f"{out / 'manifest.json'}: {entry.get('name')!r} is not a shard's name")
        shards.append(Shard(out / "shards" / entry["name"], entry))
    return shards
