"""Inputs of super-resolution models: captions as padded rows of ids, and batches of training frames. Not a loader."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideo.sequence.prompt import left_pad
from cogvideo.superres.config import SuperresConfig


def pad_captions(captions: Sequence[Sequence[int]], config: SuperresConfig) -> tuple[Tensor, Tensor]:
    """Pad the token ids of captions: ids and mask (captions, text_len), truncated to what the model reads.

    Padding is on the left, with 0, as published.
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

    On the CPU, as is `round`: the number of places determines shapes, and reading it from a GPU would block.
    """
    round: Tensor
    """(batch,) int64: the round of the model that has this target mask, from 1; for logging only."""

    def select(self, rows: slice, device: torch.device) -> "SuperresBatch":
        """Some of the rows, with the tensors that the model reads moved to `device`."""
        read = self.text, self.text_mask, self.low_res, self.high_res
        text, text_mask, low_res, high_res = (x[rows].to(device, non_blocking=True) for x in read)
        return SuperresBatch(text, text_mask, low_res, high_res, self.target_mask[rows], self.round[rows])
