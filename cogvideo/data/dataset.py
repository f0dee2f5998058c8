"""Prepared data as a table of clips, of single frames, or of frames at two sizes.

Order, batches and text are the business of `loader.py` and `pairs.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogvideo.data.shards import ROW, Kind, Shard, open_shards, read_manifest


class _Shards:
    """Rows of all shards as one table; arrays stay memory-mapped."""

    def __init__(self, folder: str | Path, kind: Kind):
        self.folder, self.kind = Path(folder), kind
        self.manifest: dict[str, Any] = read_manifest(self.folder, kind)
        self.shards: list[Shard] = [s for s in open_shards(self.folder, self.manifest) if s.num_rows]
        self.arrays = [shard.load(f"{kind}.npy") for shard in self.shards]
        self.rows = np.concatenate([np.zeros(0, ROW), *(shard.load("rows.npy") for shard in self.shards)])
        self._first_rows = np.cumsum([0, *(shard.num_rows for shard in self.shards)])
        if not self.arrays:
            raise ValueError(f"{self.folder} holds no rows; prepare it again")
        if len({(array.shape[1:], array.dtype) for array in self.arrays}) != 1:
            raise ValueError(f"{self.folder}: its shards hold arrays of different shapes; prepare it again")

    def verify(self) -> None:
        """Compare every file's hash with the manifest; sizes are compared on opening. Raises ValueError."""
        for shard in self.shards:
            for name in shard.info["files"]:
                shard.check(name, hashes=True)

    def gather(self, indices: NDArray[np.int64]) -> NDArray:
        """Rows of the big array, in the order asked for."""
        out = np.empty((len(indices), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        shards = np.searchsorted(self._first_rows, indices, side="right") - 1
        for place, (shard, index) in enumerate(zip(shards, indices, strict=True)):
            out[place] = self.arrays[shard][index - self._first_rows[shard]]
        return out

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this; 0 if the manifest does not say."""
        return int((self.manifest.get("tokenizer") or {}).get("num_tokens", 0))

    def tokens(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `gather`, of image tokens. Raises: ValueError if they are not such."""
        tokens = self.gather(indices).astype(np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < (self.num_tokens or np.inf):
            raise ValueError(
                f"{self.folder} holds image token {tokens.max()}, its tokenizer has {self.num_tokens}; prepare it again"
            )
        return tokens


class ClipDataset:
    """Clips of tokens with their lengths and captions."""

    def __init__(self, folder: str | Path, clip_seconds: Sequence[float] | None = None):
        """Open a folder that `cogvideo prepare` finished; with `clip_seconds`, only clips of those lengths.

        Raises: ValueError if it is unfinished, damaged, or holds no clip of those lengths.
        """
        self._shards = _Shards(folder, "tokens")
        self.captions = _read_texts(Path(folder) / "captions.jsonl", self._shards.rows)
        self._chosen = np.arange(len(self._shards.rows))
        if clip_seconds is not None:
            self._chosen = np.flatnonzero(np.isin(self._shards.rows["seconds"], np.array(clip_seconds, np.float32)))
            if not len(self._chosen):
                there = ", ".join(self._shards.manifest["rows_by_seconds"])
                raise ValueError(f"{folder} has no clip of {list(clip_seconds)} s; it has lengths {there} s")

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def num_frames(self) -> int:
        return self._shards.arrays[0].shape[1]

    @property
    def frame_len(self) -> int:
        """Tokens a frame."""
        return self._shards.arrays[0].shape[2]

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this; 0 if the manifest does not say."""
        return self._shards.num_tokens

    @property
    def seconds(self) -> NDArray[np.float32]:
        """(len,) clip lengths."""
        return self._shards.rows["seconds"][self._chosen]

    @property
    def manifest(self) -> dict[str, Any]:
        return self._shards.manifest

    def row(self, index: int) -> tuple[NDArray[np.int64], float, str]:
        """One clip: tokens (num_frames, frame_len), its length in seconds, its caption."""
        row = self._shards.rows[self._chosen[index]]
        return self.frames([index])[0], float(row["seconds"]), self.captions[row["caption"]]

    def frames(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Tokens of several clips: (len(indices), num_frames, frame_len)."""
        return self._shards.tokens(self._chosen[np.asarray(indices)])

    def texts(self, indices: ArrayLike) -> list[tuple[float, str]]:
        """Lengths and captions of several clips."""
        rows = self._shards.rows[self._chosen[np.asarray(indices)]]
        return [(float(row["seconds"]), self.captions[row["caption"]]) for row in rows]

    def verify(self) -> None:
        """Check every file against its hash. Raises ValueError."""
        self._shards.verify()


class FrameDataset:
    """Single frames (H, W, 3) uint8, to train an image tokenizer on."""

    def __init__(self, folder: str | Path):
        self._shards = _Shards(folder, "frames")

    def __len__(self) -> int:
        return len(self._shards.rows)

    def frames(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Several frames: (len(indices), H, W, 3)."""
        return self._shards.gather(np.asarray(indices))

    @property
    def manifest(self) -> dict[str, Any]:
        return self._shards.manifest


class PairDataset:
    """Single frames as tokens of two sizes, with captions: what super-resolution learns from."""

    def __init__(self, folder: str | Path):
        """Open a folder that `cogvideo prepare` finished with `low_res_pixels`. Raises: as `ClipDataset`."""
        self._shards = _Shards(folder, "pairs")
        self.captions = _read_texts(Path(folder) / "captions.jsonl", self._shards.rows)
        try:
            config, rate = self._shards.manifest["config"], self._shards.manifest["tokenizer"]["compress_rate"]
            self.high_res_side, self.low_res_side = config["frame_pixels"] // rate, config["low_res_pixels"] // rate
        except (KeyError, TypeError, ZeroDivisionError):
            raise ValueError(f"{folder}/manifest.json does not say its frames' two sizes; prepare it again") from None
        expected = self.high_res_side**2 + self.low_res_side**2
        if self._shards.arrays[0].shape[1:] != (expected,):
            raise ValueError(
                f"{folder} holds rows of shape {list(self._shards.arrays[0].shape[1:])}, its manifest.json says "
                f"[{expected}]; prepare it again"
            )

    def __len__(self) -> int:
        return len(self._shards.rows)

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this."""
        return self._shards.num_tokens

    def pairs(self, indices: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Fine tokens (len(indices), high_res_side ** 2) and coarse ones (len(indices), low_res_side ** 2)."""
        fine, coarse = np.split(self._shards.tokens(np.asarray(indices)), [self.high_res_side**2], axis=1)
        return fine, coarse

    def texts(self, indices: ArrayLike) -> list[str]:
        """Captions of several frames."""
        return [self.captions[row["caption"]] for row in self._shards.rows[np.asarray(indices)]]


def _read_texts(path: Path, rows: NDArray) -> list[str]:
    """The captions by id, checked to cover all ids in use."""
    texts = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                texts.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: expected an object with `text`; prepare it again") from None
    if len(rows) and not 0 <= rows["caption"].min() <= rows["caption"].max() < len(texts):
        raise ValueError(f"{path} has {len(texts)} captions, the shards speak of more; prepare the data again")
    return texts
