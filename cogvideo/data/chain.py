"""Arrays of many files read as one, and captions by number: for more rows than are worth an object each."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_OPEN = 256
"""Files that stay open: systems commonly allow a process 1,024, and large data has more shards than that."""
CHUNK_BYTES = 1 << 24


class Chain:
    """Arrays of equal row shape, end to end; one is opened when a row of it is wanted, the last MAX_OPEN stay open."""

    def __init__(self, lengths: Sequence[int], load: Callable[[int], NDArray]):
        """`load(i)` opens array i, which has lengths[i] rows."""
        self._firsts = np.cumsum([0, *lengths], dtype=np.int64)
        self._load = lru_cache(MAX_OPEN)(load)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which array each row is in, and its place there."""
        which = np.searchsorted(self._firsts, indices, side="right") - 1
        return which, indices - self._firsts[which]

    def gather(self, indices: NDArray[np.int64]) -> NDArray:
        """Rows in the order asked for: (len(indices), ...)."""
        which, places = self.locate(indices)
        return np.stack([self._load(int(array))[place] for array, place in zip(which, places, strict=True)])


class Lines:
    """The captions of a prepared folder by number, read from the file each time."""

    def __init__(self, path: Path):
        """Find where the lines lie. Raises: OSError if there is no file."""
        self.path = path
        starts, before = [np.zeros(1, np.int64)], 0
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + before + 1)
                before += len(chunk)
        self._starts = np.concatenate(starts)
        self._bytes = np.memmap(path, np.uint8, "r") if before else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def text(self, index: int) -> str:
        """A caption. Raises: ValueError if its line is damaged."""
        try:
            return str(json.loads(self._bytes[self._starts[index] : self._starts[index + 1]].tobytes())["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            problem = "expected an object with `text`; prepare it again"
            raise ValueError(f"{self.path}, line {index + 1}: {problem}") from None
