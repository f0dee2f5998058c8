"""What super-resolution models read: captions as padded rows of ids, and a batch of training frames. Not a loader."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideo.sequence.prompt import left_pad
from cogvideo.superres.config import SuperresConfig


def pad_captions(captions: Sequence[Sequence[int]], config: SuperresConfig) -> tuple[Tensor, Tensor]:
    """Token ids of captions as ids and mask (captions, text_len), truncated to what the model reads.

    Padded on the left with 0, as published.
    """
    ids, mask = left_pad([list(caption)[: config.max_caption_len] for caption in captions], config.text_len, 0)
    return torch.from_numpy(ids), torch.from_numpy(mask)


@dataclass(frozen=True)
class SuperresBatch:
    """Training frames; the labels are `high_res` itself, where `target_mask` is True."""

    text: Tensor
    """(batch, text_len) int64, from `pad_captions`."""
    text_mask: Tensor
    """(batch, text_len) bool, False on padding."""
    low_res: Tensor
    """(batch, low_res_len) int64 image-token ids; none for the iterative model."""
    high_res: Tensor
    """(batch, high_res_len) int64 image-token ids."""
    target_mask: Tensor
    """(batch, high_res_len) bool: places whose tokens are hidden from the model and predicted; some in every row.

    On the host, as is `round`: how many places there are decides shapes, and must not be waited for.
    """
    round: Tensor
    """(batch,) int64: the model's round with this target mask, from 1; for logging only."""

    def select(self, rows: slice, device: torch.device) -> "SuperresBatch":
        """Some of the rows, with what the model reads on a device."""
        read = self.text, self.text_mask, self.low_res, self.high_res
        text, text_mask, low_res, high_res = (x[rows].to(device, non_blocking=True) for x in read)
        return SuperresBatch(text, text_mask, low_res, high_res, self.target_mask[rows], self.round[rows])
