"""From a video's frames to a network's input, exactly as a protocol specifies: which frames, their size and range."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from cogvideo.evaluation.packaged_networks import TAKES_PIXELS
from cogvideo.evaluation.pixel_metrics import frames_at_rate
from cogvideo.evaluation.protocols import Crop, Filter, Protocol, Start


def choose_frames(
    protocol: Protocol, num_frames: int, seconds: NDArray[np.float64] | None, start: Start, rng: np.random.Generator
) -> NDArray[np.int64] | None:
    """Indices of a clip's frames in its video, or None for a video that is too short.

    `seconds`: (num_frames,) times; None if there are none, as for pictures. `rng` draws random starts.
    Raises: ValueError if the protocol sets a frame rate and there are no times, or the video's rate is lower.
    """
    if protocol.fps is not None:
        if seconds is None:
            raise ValueError("a frame rate needs videos; folders of frames have no times")
        frames = frames_at_rate(seconds, protocol.fps)
    else:
        frames = np.arange(num_frames)
    span = (protocol.frames - 1) * (protocol.stride if protocol.fps is None else 1) + 1
    if len(frames) < span:
        return None
    first = int(rng.integers(len(frames) - span + 1)) if start == "random" else 0
    chosen: NDArray[np.int64] = frames[first : first + span][:: protocol.stride if protocol.fps is None else 1]
    return chosen


def resize_frames(frames: NDArray[np.uint8], side: int, crop: Crop, filter: Filter) -> Tensor:
    """Frames (n, H, W, 3) uint8 -> (n, 3, side, side) float32, still 0 to 255."""
    height, width = frames.shape[1:3]
    if crop == "squash":
        rows, columns = side, side
    else:
        scale = side / min(height, width)
        rows, columns = max(side, round(height * scale)), max(side, round(width * scale))
    if (rows, columns) == (height, width):
        pixels = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "n h w c -> n c h w").float()
    elif filter == "lanczos":
        resized = [Image.fromarray(frame).resize((columns, rows), Image.Resampling.LANCZOS) for frame in frames]
        pixels = rearrange(torch.from_numpy(np.stack([np.asarray(frame) for frame in resized])), "n h w c -> n c h w")
        pixels = pixels.float()
    else:
        pixels = bilinear(
            rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "n h w c -> n c h w").float(), rows, columns
        )
    top, left = (rows - side) // 2, (columns - side) // 2
    return pixels[:, :, top : top + side, left : left + side].contiguous()


def bilinear(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """(n, c, H, W) -> (n, c, rows, columns), pixel centres aligned, without antialiasing."""
    return interpolate(pixels, (rows, columns), mode="bilinear", align_corners=False, antialias=False)


def network_input(protocol: Protocol, pixels: Tensor, role: str) -> Tensor:
    """Frames (n, 3, side, side) 0 to 255 -> (3, n, network side, network side) in the protocol's range.

    Size and range are left unchanged for a network that prepares pixels itself, by the protocol or always.
    """
    if not protocol.network_prepares and role not in TAKES_PIXELS:
        side = protocol.network_side(role)
        pixels = bilinear(pixels, side, side)
        pixels = protocol.low + pixels / 255 * (protocol.high - protocol.low)
    return rearrange(pixels, "n c h w -> c n h w")


def to_bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """Frames (n, 3, H, W) 0 to 255 -> (n, H, W, 3) uint8."""
    rounded = rearrange(pixels, "n c h w -> n h w c").round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(rounded.numpy(force=True))
