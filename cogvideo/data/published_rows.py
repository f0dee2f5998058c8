"""Reads the rows that the published CogVideo was trained on: headerless int32, text ids followed by image tokens.

A row holds 64 text ids (encode("4.0秒"), `<n>`, the caption; padded with `<pad>`), followed by 5 * 400 image tokens,
the layout that the published `BinaryDataset` reads. Nothing here writes such files.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cogvideo.sequence.batch import Batch
from cogvideo.sequence.layout import Vocabulary
from cogvideo.sequence.prompt import left_pad


class PublishedRows:
    """The rows of one file; sizes default to the published ones."""

    def __init__(
        self,
        path: str | Path,
        *,
        text_len: int = 64,
        num_frames: int = 5,
        frame_len: int = 400,
        vocabulary: Vocabulary | None = None,
    ):
        """Memory-map the file. Raises: OSError; ValueError if its size is not a whole number of rows."""
        self.text_len, self.num_frames, self.frame_len = text_len, num_frames, frame_len
        self.vocabulary = vocabulary or Vocabulary()
        row_len = text_len + num_frames * frame_len
        size = Path(path).stat().st_size
        if size == 0 or size % (4 * row_len):
            raise ValueError(
                f"{path} has {size} bytes, expected a multiple of {4 * row_len} (rows of {text_len} text ids and "
                f"{num_frames} frames of {frame_len} tokens, int32); check the sizes"
            )
        self._path, self._rows = path, np.memmap(path, np.int32, "r").reshape(-1, row_len)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> tuple[list[int], NDArray[np.int64]]:
        """Text ids without padding, and frame tokens (num_frames, frame_len). Raises: ValueError for invalid ids."""
        row = self._rows[index].astype(np.int64)
        text = [int(token) for token in row[: self.text_len] if token != self.vocabulary.pad]
        frames = row[self.text_len :].reshape(self.num_frames, self.frame_len)
        bad_text = not text or min(text) < 0 or max(text) >= self.vocabulary.size
        if bad_text or frames.min() < 0 or frames.max() >= self.vocabulary.num_image_tokens:
            raise ValueError(
                f"{self._path} row {index} holds ids outside the vocabulary; was it made with another tokenizer "
                "or layout?"
            )
        return text, frames

    def batch(self, indices: ArrayLike) -> Batch:
        """Several rows as a training batch; `seconds` is nan, because a row holds the clip length only as text."""
        rows = [self.row(int(index)) for index in np.asarray(indices)]
        text, mask = left_pad([text for text, _ in rows], self.text_len, self.vocabulary.pad)
        frames = torch.from_numpy(np.stack([frames for _, frames in rows]))
        return Batch(torch.from_numpy(text), torch.from_numpy(mask), frames, torch.full((len(rows),), float("nan")))
