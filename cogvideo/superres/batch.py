"""What super-resolution reads: captions as rows of ids, and a batch of training frames. Not a loader."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideo.sequence.prompt import left_pad
from cogvideo.superres.config import SuperresConfig


def text_rows(texts: Sequence[Sequence[int]], config: SuperresConfig) -> tuple[Tensor, Tensor]:
    """Ids and mask (texts, text_len) of raw captions, cut to what a model reads; padded with 0, as published."""
    ids, mask = left_pad([list(text)[: config.longest_text] for text in texts], config.text_len, 0)
    return torch.from_numpy(ids), torch.from_numpy(mask)


@dataclass(frozen=True)
class SuperresBatch:
    """Frames as a super-resolution model learns them; labels are `high_res` itself, where `asked` says."""

    text: Tensor
    """(batch, text_len) int64, as of `text_rows`."""
    text_mask: Tensor
    """(batch, text_len) bool."""
    low_res: Tensor
    """(batch, low_res_len) int64 image-token ids: none for the iterative model."""
    high_res: Tensor
    """(batch, high_res_len) int64 image-token ids."""
    asked: Tensor
    """(batch, high_res_len) bool: places whose tokens the model is not shown and has to draw; some in every row."""
    round: Tensor
    """(batch,) int64: the round of the model's that asks for these places, from 1; for logging only."""

    def part(self, rows: slice, device: torch.device) -> "SuperresBatch":
        """Some rows, on a device."""
        fields = (self.text, self.text_mask, self.low_res, self.high_res, self.asked, self.round)
        return SuperresBatch(*(x[rows].to(device, non_blocking=True) for x in fields))
