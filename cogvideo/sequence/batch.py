"""A batch of training clips, and the model's inputs for frames. Not a loader."""

from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor

TEXT_MULTIPLE = 16
"""On a GPU and for compiled layers, texts are padded to a multiple of this many tokens, to keep shapes few."""


@dataclass(frozen=True)
class Batch:
    """Training clips; the labels are `frames` itself."""

    text: Tensor
    """(batch, text_len) int64, padded on the left."""
    text_mask: Tensor
    """(batch, text_len) bool, False on padding."""
    frames: Tensor
    """(batch, num_frames, frame_len) int64 image-token ids."""
    seconds: Tensor
    """(batch,) float32: the length of each clip; for logging only, the model reads it as text."""
    loss_groups: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """(batch, n) int64: n group numbers per clip, by which its loss is logged as well, such as that of its folder."""

    def to(self, device: torch.device | str) -> "Batch":
        """Move what the model reads; the rest stays, so that grouping losses by it does not wait for a GPU."""
        read = self.text, self.text_mask, self.frames
        text, text_mask, frames = (x.to(device, non_blocking=True) for x in read)
        return Batch(text, text_mask, frames, self.seconds, self.loss_groups)

    def trim_text(self, multiple: int = 1) -> "Batch":
        """Drop text columns that are padding in every row, but keep a multiple of `multiple`: the same result with less
        work, in few shapes.
        """
        longest = -(-int(self.text_mask.sum(1).max()) // multiple) * multiple
        return replace(self, text=self.text[:, -longest:], text_mask=self.text_mask[:, -longest:])


def frame_inputs(frames: Tensor, start_of_image: int) -> Tensor:
    """Inputs of all slots: for each frame BOI, then all of its tokens except the last, which is never an input.

    Shapes: frames (batch, num_frames, frame_len) -> (batch, num_frames * frame_len). Source: CogVideo's clip rows.
    """
    boi = torch.full_like(frames[..., :1], start_of_image)
    return rearrange(torch.cat([boi, frames[..., :-1]], dim=-1), "b f n -> b (f n)")
