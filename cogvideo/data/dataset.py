"""Prepared folders as one table of clips, of single frames, or of frames at two sizes.

Order, batches and text are the business of `loader.py` and `pairs.py`. Several folders are read as one, in the order
given; one that is given twice counts twice. Rows, arrays and captions stay in their files, which are mapped into
memory: what grows with the data is 8 bytes a caption, where its line lies.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogvideo.data.chain import Chain, Lines
from cogvideo.data.shards import Kind, Shard, open_rows, open_shards, read_manifest
from cogvideo.files import sha256_file

Folders = str | Path | Sequence[str | Path]


class _Folder:
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

    def load(self, shard: int) -> NDArray:
        array = self.shards[shard].load(self.name)
        if (array.shape[1:], array.dtype) != (self.row_shape, self.dtype):
            raise ValueError(f"{self.path}: its shards hold arrays of different shapes; prepare it again")
        return array

    def check_goes_with(self, other: "_Folder") -> None:
        """Raises: ValueError if rows of both cannot be in one batch."""
        if self.row_shape != other.row_shape:
            raise ValueError(
                f"{self.path} holds rows of {'x'.join(map(str, self.row_shape))}, {other.path} of "
                f"{'x'.join(map(str, other.row_shape))}; prepare them with the same frame_pixels and clips.num_frames"
            )
        if self.manifest.get("tokenizer") != other.manifest.get("tokenizer"):
            raise ValueError(f"{self.path} and {other.path} were made by different image tokenizers; use one for both")

    def verify(self) -> None:
        """Compare every file's hash with the manifest; sizes are compared on opening. Raises ValueError."""
        for shard in self.shards:
            for name in shard.info["files"]:
                shard.check(name, hashes=True)
        if "files" in self.manifest:
            Shard(self.path, self.manifest).check("rows.npy", hashes=True)
        captions, expected = self.path / "captions.jsonl", self.manifest.get("captions_sha256")
        if expected is not None and sha256_file(captions) != expected:
            raise ValueError(f"{captions} has changed since it was written; prepare it again")


class _Table:
    """Rows of several folders, end to end."""

    def __init__(self, paths: Folders, kind: Kind):
        paths = [paths] if isinstance(paths, str | Path) else paths
        if not paths:
            raise ValueError("an empty list of folders; name one that `cogvideo prepare` made")
        self.folders = [_Folder(Path(path), kind) for path in paths]
        for folder in self.folders[1:]:
            folder.check_goes_with(self.folders[0])
        self.rows = Chain([len(folder.rows) for folder in self.folders], lambda which: self.folders[which].rows)
        shards = [(folder, number) for folder in self.folders for number in range(len(folder.shards))]
        self.arrays = Chain(
            [folder.shards[number].num_rows for folder, number in shards],
            lambda which: shards[which][0].load(shards[which][1]),
        )
        self._captions = [] if kind == "frames" else [_captions(folder) for folder in self.folders]

    def verify(self) -> None:
        for folder in self.folders:
            folder.verify()

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this; 0 if the manifest does not say."""
        return int((self.folders[0].manifest.get("tokenizer") or {}).get("num_tokens", 0))

    def tokens(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of image tokens. Raises: ValueError if they are not such."""
        tokens = self.arrays.gather(places).astype(np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < (self.num_tokens or np.inf):
            worst = places[tokens.reshape(len(places), -1).max(axis=1).argmax()]
            folder = self.folders[self.rows.locate(worst)[0]]
            raise ValueError(
                f"{folder.path} holds image token {tokens.max()}, its tokenizer has {self.num_tokens}; prepare it again"
            )
        return tokens

    def texts(self, places: NDArray[np.int64]) -> list[tuple[float, str]]:
        """Lengths and captions."""
        rows, (folders, _) = self.rows.gather(places), self.rows.locate(places)
        return [
            (float(row["seconds"]), self._captions[folder].text(int(row["caption"])))
            for row, folder in zip(rows, folders, strict=True)
        ]


def _captions(folder: _Folder) -> Lines:
    """Raises: ValueError if there are fewer than rows speak of."""
    lines = Lines(folder.path / "captions.jsonl")
    if not 0 <= folder.rows["caption"].min() <= folder.rows["caption"].max() < len(lines):
        raise ValueError(f"{lines.path} has {len(lines)} captions, the shards speak of more; prepare it again")
    return lines


class ClipDataset:
    """Clips of tokens with their lengths and captions."""

    def __init__(self, folders: Folders, clip_seconds: Sequence[float] | None = None):
        """Open one folder or several; with `clip_seconds`, only clips of those lengths.

        Raises: ValueError if one is unfinished, damaged or made otherwise than the first, or if there is no such clip.
        """
        self._table = _Table(folders, "tokens")
        self._chosen: NDArray[np.int64] | None = None
        if clip_seconds is not None:
            self._chosen = np.flatnonzero(np.isin(self.seconds, np.array(clip_seconds, np.float32)))
            if not len(self._chosen):
                lengths = dict.fromkeys(s for f in self._table.folders for s in f.manifest["rows_by_seconds"])
                names = ", ".join(str(folder.path) for folder in self._table.folders)
                raise ValueError(
                    f"{names}: no clip of {list(clip_seconds)} s; there are lengths {', '.join(lengths)} s"
                )

    def __len__(self) -> int:
        return len(self._table.rows) if self._chosen is None else len(self._chosen)

    @property
    def num_frames(self) -> int:
        return self._table.folders[0].row_shape[0]

    @property
    def frame_len(self) -> int:
        """Tokens a frame."""
        return self._table.folders[0].row_shape[1]

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this; 0 if the manifest does not say."""
        return self._table.num_tokens

    @property
    def seconds(self) -> NDArray[np.float32]:
        """(len,) clip lengths, gathered anew."""
        seconds = np.concatenate([folder.rows["seconds"] for folder in self._table.folders])
        return seconds if self._chosen is None else seconds[self._chosen]

    def row(self, index: int) -> tuple[NDArray[np.int64], float, str]:
        """One clip: tokens (num_frames, frame_len), its length in seconds, its caption."""
        return self.frames([index])[0], *self.texts([index])[0]

    def frames(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Tokens of several clips: (len(indices), num_frames, frame_len)."""
        return self._table.tokens(self._places(indices))

    def texts(self, indices: ArrayLike) -> list[tuple[float, str]]:
        """Lengths and captions of several clips."""
        return self._table.texts(self._places(indices))

    def verify(self) -> None:
        """Check every file against its hash. Raises ValueError."""
        self._table.verify()

    def _places(self, indices: ArrayLike) -> NDArray[np.int64]:
        places = np.asarray(indices, np.int64)
        return places if self._chosen is None else self._chosen[places]


class FrameDataset:
    """Single frames (H, W, 3) uint8, to train an image tokenizer on."""

    def __init__(self, folders: Folders):
        """Open one folder or several. Raises: ValueError as `ClipDataset`."""
        self._table = _Table(folders, "frames")

    def __len__(self) -> int:
        return len(self._table.rows)

    def frames(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Several frames: (len(indices), H, W, 3)."""
        return self._table.arrays.gather(np.asarray(indices, np.int64))


class PairDataset:
    """Single frames as tokens of two sizes, with captions: what super-resolution learns from."""

    def __init__(self, folders: Folders):
        """Open one folder or several that `cogvideo prepare` made with `low_res_pixels`. Raises: as `ClipDataset`."""
        self._table = _Table(folders, "pairs")
        sizes = {folder.path: _sides(folder) for folder in self._table.folders}
        (self.high_res_side, self.low_res_side), *others = dict.fromkeys(sizes.values())
        if others:
            raise ValueError(f"{', '.join(map(str, sizes))} hold frames of different sizes; prepare them alike")

    def __len__(self) -> int:
        return len(self._table.rows)

    @property
    def num_tokens(self) -> int:
        """Image-token ids are below this."""
        return self._table.num_tokens

    def pairs(self, indices: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Fine tokens (len(indices), high_res_side ** 2) and coarse ones (len(indices), low_res_side ** 2)."""
        fine, coarse = np.split(self._table.tokens(np.asarray(indices, np.int64)), [self.high_res_side**2], axis=1)
        return fine, coarse

    def texts(self, indices: ArrayLike) -> list[str]:
        """Captions of several frames."""
        return [text for _, text in self._table.texts(np.asarray(indices, np.int64))]


def _sides(folder: _Folder) -> tuple[int, int]:
    """Tokens a side of the fine and of the coarse grid. Raises: ValueError if the manifest does not say, or lies."""
    try:
        config, rate = folder.manifest["config"], folder.manifest["tokenizer"]["compress_rate"]
        high, low = config["frame_pixels"] // rate, config["low_res_pixels"] // rate
    except (KeyError, TypeError, ZeroDivisionError):
        raise ValueError(f"{folder.path}/manifest.json does not say its frames' two sizes; prepare it again") from None
    if folder.row_shape != (high**2 + low**2,):
        raise ValueError(
            f"{folder.path} holds rows of shape {list(folder.row_shape)}, its manifest.json says "
            f"[{high**2 + low**2}]; prepare it again"
        )
    return high, low
