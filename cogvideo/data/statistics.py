"""Counts that tell whether data suits a model: image codes in use, text tokens per caption.

Both counts use an evenly spaced sample of large data, so they take seconds whatever its size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cogvideo.sequence.prompt import NO_LIMIT, PromptFormat
from cogvideo.tokenizers.text import TextTokenizer

MAX_CAPTIONS = 20_000
MAX_ROWS = 2_000
FEW_CODES = 0.1
"""An image tokenizer that uses less than this share of its codes distinguishes little."""
FEW_CODES_ADVICE = (
    "frames that differ may look alike to a model; train the image tokenizer on these videos, or for longer, and "
    "prepare them again"
)


@dataclass(frozen=True)
class CodeUse:
    """How many of an image tokenizer's codes occur."""

    used: int
    num_codes: int
    num_tokens: int
    """How many tokens were examined."""

    @classmethod
    def count(cls, tokens: NDArray[np.int64], num_codes: int) -> "CodeUse":
        """Count the codes in tokens of any shape, ids below `num_codes`."""
        return cls(len(np.unique(tokens)), num_codes, tokens.size)

    @property
    def is_low(self) -> bool:
        """Whether the share of codes that occur is below FEW_CODES, counting no more codes than there are tokens."""
        return self.used < FEW_CODES * min(self.num_codes, self.num_tokens)

    def __str__(self) -> str:
        return f"{self.used:,} of {self.num_codes:,} image codes in use"


@dataclass(frozen=True)
class CaptionLengths:
    """How many text tokens captions take as a model reads them."""

    lengths: NDArray[np.int64]
    """(texts,) text tokens, including everything around the caption."""
    num_spelled: int
    """Texts with characters for which the text tokenizer has no pieces, so that it spells them as bytes."""

    @classmethod
    def count(
        cls,
        texts: Sequence[tuple[float, str]],
        read: Callable[[float, str], list[int]],
        has_pieces_for: Callable[[str], bool],
    ) -> "CaptionLengths":
        """Count texts, each a clip length in seconds and a caption; a repeated text counts each time.

        `read`: gives the text ids that a model reads for both; `has_pieces_for`: like `TextTokenizer`'s.
        """
        length = {text: len(read(*text)) for text in set(texts)}
        spelled = {caption: not has_pieces_for(caption) for _, caption in length}
        lengths = np.array([length[text] for text in texts], np.int64)
        return cls(lengths, sum(spelled[caption] for _, caption in texts))

    @classmethod
    def of_clips(cls, captions: Sequence[str], tokenizer: TextTokenizer) -> "CaptionLengths":
        """Count captions as prompts of clips in the published format."""
        prompt, newline = PromptFormat(), tokenizer.vocabulary.newline

        def read(seconds: float, caption: str) -> list[int]:
            return prompt.clip_text(tokenizer.encode, newline, seconds, caption, NO_LIMIT, suffix=prompt.video_suffix)

        return cls.count([(4.0, caption) for caption in captions], read, tokenizer.has_pieces_for)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def spelled_share(self) -> float:
        return self.num_spelled / len(self.lengths)

    def num_above(self, limit: int) -> int:
        """Texts that take more than `limit` tokens."""
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
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).astype(np.int64))
