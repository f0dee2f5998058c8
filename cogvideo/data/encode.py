"""Encodes frames as image tokens, as `prepare` stores them.

Data for super-resolution has two sets of tokens per frame: those of the frame, and those of the same frame at a smaller
size, which may use another image tokenizer.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray

from cogvideo.tokenizers.image import ImageTokenizer, check_same_codes


class TokenEncoder:
    """Encodes frames (N, H, W, 3) uint8 -> tokens (N, frame_len), uint16 if all ids fit, else int32.

    With `low_res_pixels`, each frame's tokens are followed by those of the frame scaled to that side, encoded by
    `low_res_tokenizer` if it is given. Raises: ValueError if the tokenizers differ in their number of codes.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        device: str = "cpu",
        low_res_pixels: int | None = None,
        low_res_tokenizer: ImageTokenizer | None = None,
    ):
        self.tokenizer, self.low_res_pixels = tokenizer, low_res_pixels
        self.low_res_tokenizer = low_res_tokenizer or tokenizer
        check_same_codes(self.low_res_tokenizer, tokenizer)
        for each in (self.tokenizer, self.low_res_tokenizer):
            # PyTorch's stubs lack memory_format; channels last is 10 % faster on a CPU.
            each.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = np.uint16 if tokenizer.num_tokens <= 1 << 16 else np.int32

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[Any]:
        pixels = self._pixels(frames)
        tokens = self.tokenizer.encode(pixels, batch_size=len(frames))
        if self.low_res_pixels is not None:
            size = (self.low_res_pixels, self.low_res_pixels)
            small = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
            tokens = torch.cat([tokens, self.low_res_tokenizer.encode(small, batch_size=len(frames))], dim=1)
        return tokens.cpu().numpy().astype(self.dtype)

    def reconstruct(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Encode and decode frames (N, H, W, 3), at their own size only."""
        tokens = self.tokenizer.encode(self._pixels(frames), batch_size=len(frames))
        pixels = self.tokenizer.decode(tokens, frames.shape[1] // self.tokenizer.compress_rate, batch_size=len(frames))
        rebuilt: NDArray[np.uint8] = rearrange(pixels * 255, "n c h w -> n h w c").round().byte().cpu().numpy()
        return rebuilt

    def _pixels(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        pixels = torch.from_numpy(frames).to(self.tokenizer.device).float() / 255
        return rearrange(pixels, "n h w c -> n c h w", c=3)


def check_frame_pixels(frame_pixels: int, tokenizer: ImageTokenizer, name: str = "frame_pixels") -> None:
    """Raises: ValueError if a frame's side is not a whole number of tokens."""
    if frame_pixels % tokenizer.compress_rate:
        raise ValueError(
            f"{name}={frame_pixels} is not a multiple of the image tokenizer's compress rate "
            f"{tokenizer.compress_rate}; choose a multiple of it"
        )
