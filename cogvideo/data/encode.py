"""What `prepare` does to a batch of frames when it makes tokens: the image tokenizer, from pixels to stored ids."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from cogvideo.files import sha256_file
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.tokenizers.open import image_tokenizer_files


class TokenEncoder:
    """Frames (N, H, W, 3) uint8 -> tokens (N, frame_len), uint16 if all ids fit, else int32."""

    def __init__(self, tokenizer: ImageTokenizer, device: str = "cpu"):
        self.tokenizer = tokenizer
        # The stubs do not know memory_format; channels last is a tenth faster on a CPU.
        self.tokenizer.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = np.uint16 if tokenizer.num_tokens <= 1 << 16 else np.int32

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.integer]:
        pixels = torch.from_numpy(frames).to(self.tokenizer.device).float() / 255
        tokens = self.tokenizer.encode(rearrange(pixels, "n h w c -> n c h w", c=3), batch_size=len(frames))
        return tokens.cpu().numpy().astype(self.dtype)


def describe_tokenizer(folder: Path, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """What a manifest says of the tokenizer: enough to tell whether tokens and a tokenizer belong together."""
    files = {path.name: sha256_file(path) for path in image_tokenizer_files(folder)}
    return {"num_tokens": tokenizer.num_tokens, "compress_rate": tokenizer.compress_rate, "sha256": files}


def check_frame_pixels(frame_pixels: int, tokenizer: ImageTokenizer) -> None:
    """Raises ValueError if a frame's side is not a whole number of tokens."""
    if frame_pixels % tokenizer.compress_rate:
        raise ValueError(
            f"frame_pixels={frame_pixels} is not a multiple of the image tokenizer's compress rate "
            f"{tokenizer.compress_rate}; choose a multiple of it"
        )
