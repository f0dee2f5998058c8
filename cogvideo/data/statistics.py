"""Counts that tell whether data suits a model: image codes in use, text tokens per caption.

Both are counted on an evenly spaced sample of large data, so that they take seconds whatever its size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CAPTIONS = 20_000
MAX_ROWS = 2_000
FEW_CODES = 0.1
"""Using less than this share of its codes, an image tokenizer tells little apart."""


@dataclass(frozen=True)
class CodeUse:
    """How many of an image tokenizer's codes occur."""

    used: int
    num_codes: int
    num_tokens: int
    """How many tokens were looked at."""

    @classmethod
    def count(cls, tokens: NDArray[np.int64], num_codes: int) -> "CodeUse":
        """Count the codes in tokens of any shape, ids below `num_codes`."""
        return cls(len(np.unique(tokens)), num_codes, tokens.size)

    @property
    def is_low(self) -> bool:
        """Whether less than FEW_CODES of the codes occur, of as many as there are tokens at most."""
        return self.used < FEW_CODES * min(self.num_codes, self.num_tokens)

    def __str__(self) -> str:
        return f"{self.used:,} of {self.num_codes:,} image codes in use"


@dataclass(frozen=True)
class CaptionLengths:
    """How many text tokens captions take as a model reads them."""

    lengths: NDArray[np.int64]
    """(captions,) text tokens, with everything around the caption."""
    num_spelled: int
    """Captions with characters that the text tokenizer has no pieces for: it spells them as bytes."""

    @classmethod
    def count(
        cls, captions: Sequence[str], read: Callable[[str], list[int]], has_pieces_for: Callable[[str], bool]
    ) -> "CaptionLengths":
        """`read`: the text ids that a model gets of a caption; `has_pieces_for`: as `TextTokenizer`'s."""
        lengths = np.array([len(read(caption)) for caption in captions], np.int64)
        return cls(lengths, sum(not has_pieces_for(caption) for caption in captions))

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def spelled_share(self) -> float:
        return self.num_spelled / len(self.lengths)

    def num_above(self, limit: int) -> int:
        """Captions that take more than `limit` tokens."""
        return int((self.lengths > limit).sum())

    def summary(self, limit: int) -> str:
        """The longest, the 99th percentile, and how many are above `limit`, in one line."""
        count, above = len(self.lengths), self.num_above(limit)
        percentile = int(np.quantile(self.lengths, 0.99, method="inverted_cdf"))
        return (
            f"captions take at most {self.longest} text tokens with clip length and suffix (99 %: {percentile}); "
            f"{above:,} of {count:,} ({above / count:.0%}) take more than {limit}"
        )


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Indices of all of `count` items, or of `most` of them, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
