"""Maps training positions to rows when folders are mixed in given proportions: a function of the position alone."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cogvideo.rng import epoch_permutation, stream_key

CYCLE = 1000
"""Positions per cycle. Every cycle visits each group a fixed number of times, in proportion to its weight."""


class Mixture:
    """Rows of several groups: each group appears as often as its weight says, and every row within it equally often."""

    def __init__(self, groups: Sequence[NDArray[np.int64]], weights: Sequence[float], seed: int) -> None:
        """`groups`: the row numbers of each. `weights` are relative; shares are rounded to multiples of 1 / CYCLE.

        Raises: ValueError if a group is empty, or so rare that it would never appear.
        """
        exact = CYCLE * np.array(weights) / np.sum(weights)
        counts = exact.astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: CYCLE - counts.sum()]] += 1  # the largest remainders
        for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
            if not len(group):
                raise ValueError(f"data.weights: folder {number + 1} of data.path has no clip to choose; leave it out")
            if not count:
                raise ValueError(
                    f"data.weights={list(weights)}: folder {number + 1} of data.path would be less than one clip in "
                    f"{CYCLE}; raise its weight, or leave it out"
                )
        self._groups, self._counts, self._ends = list(groups), counts, np.cumsum(counts)
        self._seeds = [stream_key(seed, "mixture", number) for number in range(len(groups) + 1)]
        self._permutation = lru_cache(2 * len(self._seeds))(epoch_permutation)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at training positions: (len(positions),)."""
        slots, cycles = self._visit(self._seeds[-1], positions, CYCLE)
        group_of = np.searchsorted(self._ends, slots, side="right")
        counts = self._counts[group_of]
        ordinals = cycles * counts + slots - (self._ends[group_of] - counts)
        rows = np.empty(len(positions), np.int64)
        for number in np.unique(group_of):
            here, group = group_of == number, self._groups[number]
            rows[here] = group[self._visit(self._seeds[number], ordinals[here], len(group))[0]]
        return rows

    def _visit(
        self, seed: int, ordinals: NDArray[np.int64], length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The items at `ordinals` of a walk over `length` items that reorders them each epoch, and their epochs."""
        epochs, offsets = np.divmod(ordinals, length)
        pairs = zip(epochs, offsets, strict=True)
        return np.array([self._permutation(seed, int(e), length)[o] for e, o in pairs], np.int64), epochs
