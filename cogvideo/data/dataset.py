"""Datasets: clips of tokens, single frames, and frames at two sizes, from prepared folders or from memory.

`loader.py` makes the batches, their order and their text. Several folders are concatenated in the order given; a folder
listed twice counts twice. Rows, arrays and captions are memory-mapped; memory grows by 8 bytes per caption, for the
offset of its line.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import TypedDict

from cogvideo.data.shards import Kind, Shard, open_rows, open_shards, read_manifest
from cogvideo.data.statistics import MAX_ROWS, spread
from cogvideo.files import checked, sha256_file
from cogvideo.sequence.prompt import seconds_as_given

Folders = str | Path | Sequence[str | Path]

MAX_OPEN_ARRAYS = 256
"""Number of arrays kept open: a process can commonly open 1,024 files, and large data has more shards than that."""
CHUNK_BYTES = 1 << 24
MAX_CAPTION_BYTES = 4 << 20
"""Limit on one line of captions.jsonl."""


class ClipDataset:
    """Clips of tokens with their lengths and captions, from prepared folders."""

    def __init__(self, folders: Folders, clip_seconds: Sequence[float] | None = None):
        """Open one folder or several; with `clip_seconds`, use only clips of those lengths.

        Raises: ValueError if a folder is unfinished, damaged or incompatible with the first, or if no clip is left.
        """
        self._rows = _PreparedRows(folders, "tokens")
        self._selected: NDArray[np.int64] | None = None
        if clip_seconds is not None:
            self._selected = np.flatnonzero(np.isin(self.seconds, np.array(clip_seconds, np.float32)))
            if not len(self._selected):
                lengths = dict.fromkeys(s for f in self._rows.folders for s in f.manifest["rows_by_seconds"])
                names = ", ".join(str(folder.path) for folder in self._rows.folders)
                raise ValueError(
                    f"{names}: no clips of {list(clip_seconds)} s (data.clip_seconds); available lengths: "
                    f"{', '.join(lengths)} s"
                )

    def __len__(self) -> int:
        return len(self._rows.table) if self._selected is None else len(self._selected)

    @property
    def num_frames(self) -> int:
        return self._rows.folders[0].row_shape[0]

    @property
    def frame_len(self) -> int:
        """Tokens per frame."""
        return self._rows.folders[0].row_shape[1]

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this; 0 if the manifest does not say."""
        return self._rows.num_tokens

    @property
    def tokenizer_record(self) -> dict[str, Any] | None:
        """The manifest's record of the image tokenizer."""
        return self._rows.tokenizer_record

    def sample_tokens(self) -> NDArray[np.int64]:
        """Tokens of all rows, or of MAX_ROWS of them, evenly spaced."""
        return self.frames(spread(len(self), MAX_ROWS))

    @property
    def seconds(self) -> NDArray[np.float32]:
        """(len,) clip lengths in seconds, read again on each access."""
        seconds = np.concatenate([folder.rows["seconds"] for folder in self._rows.folders])
        return seconds if self._selected is None else seconds[self._selected]

    def row(self, index: int) -> tuple[NDArray[np.int64], float, str]:
        """One clip: tokens (num_frames, frame_len), its length in seconds, its caption."""
        return self.frames([index])[0], *self.texts([index])[0]

    def frames(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Tokens of several clips: (len(indices), num_frames, frame_len)."""
        return self._rows.tokens(self._row_numbers(indices))

    def texts(self, indices: ArrayLike) -> list[tuple[float, str]]:
        """Lengths in seconds and captions of several clips."""
        return self._rows.texts(self._row_numbers(indices))

    def sources(self, indices: ArrayLike) -> NDArray[np.int64]:
        """The index of each clip's folder in the order given: (len(indices),)."""
        return self._rows.sources(self._row_numbers(indices))

    def verify(self) -> None:
        """Check every file against its hash. Raises: ValueError."""
        for folder in self._rows.folders:
            folder.verify()

    def _row_numbers(self, indices: ArrayLike) -> NDArray[np.int64]:
        rows = np.asarray(indices, np.int64)
        return rows if self._selected is None else self._selected[rows]


class InMemoryClips:
    """Clips held in memory, with the interface of `ClipDataset`: for small sets that are rendered on the fly."""

    def __init__(self, tokens: NDArray[np.int64], seconds: ArrayLike, captions: Sequence[str], num_tokens: int):
        """Shapes: tokens (clips, num_frames, frame_len), all below `num_tokens`; seconds (clips,)."""
        self._tokens, self._captions, self.num_tokens = tokens, captions, num_tokens
        self.seconds: NDArray[np.float32] = np.asarray(seconds, np.float32)
        self.num_frames, self.frame_len = tokens.shape[1:]
        self.tokenizer_record: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def frames(self, indices: ArrayLike) -> NDArray[np.int64]:
        return self._tokens[np.asarray(indices)]

    def sample_tokens(self) -> NDArray[np.int64]:
        return self.frames(spread(len(self), MAX_ROWS))

    def texts(self, indices: ArrayLike) -> list[tuple[float, str]]:
        return [(seconds_as_given(self.seconds[i]), self._captions[i]) for i in np.asarray(indices)]

    def sources(self, indices: ArrayLike) -> NDArray[np.int64]:
        return np.zeros(len(np.asarray(indices)), np.int64)


class FrameDataset:
    """Single frames (H, W, 3) uint8, to train an image tokenizer on."""

    def __init__(self, folders: Folders):
        """Open one folder or several. Raises: ValueError as `ClipDataset`."""
        self._rows = _PreparedRows(folders, "frames")

    def __len__(self) -> int:
        return len(self._rows.table)

    def frames(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Several frames: (len(indices), H, W, 3)."""
        return self._rows.arrays.gather(np.asarray(indices, np.int64))

    def sources(self, indices: ArrayLike) -> NDArray[np.int64]:
        """See `ClipDataset.sources`."""
        return self._rows.sources(np.asarray(indices, np.int64))


class PairDataset:
    """Single frames as tokens at two sizes, with captions, to train super-resolution on."""

    def __init__(self, folders: Folders):
        """Open one folder or several, prepared with `low_res_pixels`. Raises: ValueError as `ClipDataset`."""
        self._rows = _PreparedRows(folders, "pairs")
        sides = {folder.path: _pair_sides(folder) for folder in self._rows.folders}
        (self.high_res_side, self.low_res_side), *others = dict.fromkeys(sides.values())
        if others:
            raise ValueError(
                f"{', '.join(map(str, sides))} hold frames of different sizes; prepare all with the same sizes"
            )

    def __len__(self) -> int:
        return len(self._rows.table)

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this."""
        return self._rows.num_tokens

    @property
    def tokenizer_record(self) -> dict[str, Any] | None:
        """The manifest's record of the image tokenizer."""
        return self._rows.tokenizer_record

    @property
    def high_res_record(self) -> dict[str, Any] | None:
        """The record of a separate image tokenizer for the large frames; None if one tokenizer made both sizes."""
        record: dict[str, Any] | None = self._rows.folders[0].manifest.get("high_res_tokenizer")
        return record

    def sample_tokens(self) -> NDArray[np.int64]:
        """Tokens of all rows, or of MAX_ROWS of them, evenly spaced."""
        return self._rows.tokens(spread(len(self), MAX_ROWS))

    def pairs(self, indices: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Fine tokens (len(indices), high_res_side ** 2) and coarse ones (len(indices), low_res_side ** 2)."""
        fine, coarse = np.split(self._rows.tokens(np.asarray(indices, np.int64)), [self.high_res_side**2], axis=1)
        return fine, coarse

    def texts(self, indices: ArrayLike) -> list[str]:
        """Captions of several frames."""
        return [text for _, text in self._rows.texts(np.asarray(indices, np.int64))]

    def sources(self, indices: ArrayLike) -> NDArray[np.int64]:
        """See `ClipDataset.sources`."""
        return self._rows.sources(np.asarray(indices, np.int64))


class _PreparedFolder:
    """One folder that `cogvideo prepare` finished."""

    def __init__(self, path: Path, kind: Kind):
        self.path, self.name = path, f"{kind}.npy"
        self.manifest = read_manifest(path, kind)
        self.shards: list[Shard] = [shard for shard in open_shards(path, self.manifest) if shard.num_rows]
        if not self.shards:
            raise ValueError(f"{path} holds no rows; prepare it again")
        for shard in self.shards:
            shard.check(self.name)
        self.rows = open_rows(path, self.manifest, self.shards)
        first = self.shards[0].load(self.name)
        self.row_shape, self.dtype = first.shape[1:], first.dtype
        if not all(self.row_shape):
            raise ValueError(f"{path} holds rows of shape {list(self.row_shape)}, which are empty; prepare it again")

    def load(self, shard: int) -> NDArray[Any]:
        array = self.shards[shard].load(self.name)
        if (array.shape[1:], array.dtype) != (self.row_shape, self.dtype):
            raise ValueError(f"{self.path}: its shards hold arrays of different shapes; prepare it again")
        return array

    def check_compatible(self, other: "_PreparedFolder") -> None:
        """Raises: ValueError if rows of the two folders cannot share a batch."""
        if self.row_shape != other.row_shape:
            raise ValueError(
                f"{self.path} holds rows of {'x'.join(map(str, self.row_shape))}, {other.path} of "
                f"{'x'.join(map(str, other.row_shape))}; prepare them with the same frame_pixels and clips.num_frames"
            )
        if any(self.manifest.get(key) != other.manifest.get(key) for key in ("tokenizer", "high_res_tokenizer")):
            raise ValueError(f"{self.path} and {other.path} were made by different image tokenizers; use one for both")

    def verify(self) -> None:
        """Compare every file's hash with the manifest; opening compares sizes only. Raises: ValueError."""
        for shard in self.shards:
            for name in shard.info["files"]:
                shard.check(name, hashes=True)
        if "files" in self.manifest:
            Shard(self.path, self.manifest).check("rows.npy", hashes=True)
        captions, expected = self.path / "captions.jsonl", self.manifest.get("captions_sha256")
        if expected is not None and sha256_file(captions) != expected:
            raise ValueError(f"{captions} has changed since it was written; prepare it again")


class _PreparedRows:
    """The rows of several folders, concatenated."""

    def __init__(self, paths: Folders, kind: Kind):
        paths = [paths] if isinstance(paths, str | Path) else paths
        if not paths:
            raise ValueError("no folders given; name one made by `cogvideo prepare`")
        self.folders = [_PreparedFolder(Path(path), kind) for path in paths]
        for folder in self.folders[1:]:
            folder.check_compatible(self.folders[0])
        self.table = ConcatenatedArrays([len(f.rows) for f in self.folders], lambda which: self.folders[which].rows)
        shards = [(folder, number) for folder in self.folders for number in range(len(folder.shards))]
        self.arrays = ConcatenatedArrays(
            [folder.shards[number].num_rows for folder, number in shards],
            lambda which: shards[which][0].load(shards[which][1]),
        )
        self._captions = [] if kind == "frames" else [_open_caption_texts(folder) for folder in self.folders]

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this; 0 if the manifest does not say."""
        return int((self.tokenizer_record or {}).get("num_tokens", 0))

    @property
    def tokenizer_record(self) -> dict[str, Any] | None:
        """The manifest's record of the image tokenizer, the same in all folders."""
        record: dict[str, Any] | None = self.folders[0].manifest.get("tokenizer")
        return record

    def tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Image tokens of the given rows. Raises: ValueError if an id is out of the tokenizer's range."""
        tokens = self.arrays.gather(rows).astype(np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < (self.num_tokens or np.inf):
            worst = rows[tokens.reshape(len(rows), -1).max(axis=1).argmax()]
            folder = self.folders[self.table.locate(worst)[0]]
            raise ValueError(
                f"{folder.path} holds image token {tokens.max()}, but its tokenizer has {self.num_tokens}; "
                "prepare it again"
            )
        return tokens

    def sources(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The index of each row's folder."""
        return self.table.locate(rows)[0]

    def texts(self, rows: NDArray[np.int64]) -> list[tuple[float, str]]:
        """Lengths in seconds and captions of the given rows."""
        records, (folders, _) = self.table.gather(rows), self.table.locate(rows)
        return [
            (seconds_as_given(record["seconds"]), self._captions[folder][int(record["caption"])])
            for record, folder in zip(records, folders, strict=True)
        ]


def _open_caption_texts(folder: _PreparedFolder) -> "CaptionTexts":
    """Raises: ValueError if rows refer to captions that are not there."""
    texts = CaptionTexts(folder.path / "captions.jsonl")
    if not 0 <= folder.rows["caption"].min() <= folder.rows["caption"].max() < len(texts):
        raise ValueError(f"{texts.path} has {len(texts)} captions, the shards refer to more; prepare it again")
    return texts


def _pair_sides(folder: _PreparedFolder) -> tuple[int, int]:
    """Sides of the fine and the coarse grid in tokens. Raises: ValueError if the manifest lacks or contradicts them."""
    try:
        config, tokenizer = folder.manifest["config"], folder.manifest["tokenizer"]
        large = folder.manifest.get("high_res_tokenizer", tokenizer)
        high = config["frame_pixels"] // large["compress_rate"]
        low = config["low_res_pixels"] // tokenizer["compress_rate"]
    except (KeyError, TypeError, ZeroDivisionError):
        raise ValueError(f"{folder.path}/manifest.json lacks the two sizes of its frames; prepare it again") from None
    if folder.row_shape != (high**2 + low**2,):
        raise ValueError(
            f"{folder.path} holds rows of shape {list(folder.row_shape)}, its manifest.json says "
            f"[{high**2 + low**2}]; prepare it again"
        )
    return high, low


class ConcatenatedArrays:
    """Arrays of equal row shape, read as one along the first axis; each is opened when one of its rows is needed."""

    def __init__(self, lengths: Sequence[int], load: Callable[[int], NDArray[Any]]):
        """`load(i)` opens array i, which has lengths[i] rows. The MAX_OPEN_ARRAYS most recently used stay open."""
        self._starts = np.cumsum([0, *lengths], dtype=np.int64)
        self._load = lru_cache(MAX_OPEN_ARRAYS)(load)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The array that each row is in, and its index within that array."""
        which = np.searchsorted(self._starts, indices, side="right") - 1
        return which, indices - self._starts[which]

    def gather(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The rows at `indices`, in that order: (len(indices), ...)."""
        which, offsets = self.locate(indices)
        return np.stack([self._load(int(array))[offset] for array, offset in zip(which, offsets, strict=True)])


class CaptionLine(TypedDict):
    """A line of captions.jsonl."""

    text: str


class CaptionTexts:
    """The texts in a prepared folder's captions.jsonl by line number, read from the file on each access."""

    def __init__(self, path: Path):
        """Find the start of every line. Raises: OSError if there is no file."""
        self.path = path
        starts, offset = [np.zeros(1, np.int64)], 0
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset + 1)
                offset += len(chunk)
        self._starts = np.concatenate(starts)
        self._bytes = np.memmap(path, np.uint8, "r") if offset else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        """Raises: ValueError if the line is damaged."""
        try:
            line = self._bytes[self._starts[index] : self._starts[index + 1]][: MAX_CAPTION_BYTES + 1].tobytes()
            # not `parse_json`: the other fields of a user's captions may exceed its limits on numbers and nesting
            text: str = checked(json.loads(line.decode()), CaptionLine, self.path)["text"]
            return text
        except (ValueError, RecursionError):
            problem = "expected an object with `text`; prepare it again"
            raise ValueError(f"{self.path}, line {index + 1}: {problem}") from None
