"""Warp residual: the part of a clip's frame-to-frame change that motion does not explain.

Flow is estimated by block matching: for every pixel, the shift to the most similar window in the previous frame, from
coarse to fine, on downscaled frames. It needs neither a network nor OpenCV.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from torch import Tensor
from torch.nn import functional

SIDE = 64
"""Pixels: larger frames are scaled down to this shorter edge. Finer detail is not judged."""
WINDOW = 7
"""Width and height of a window in pixels."""
LEVELS = ((4, 3.0, 1.0), (2, 4.0, 1.0), (1, 1.0, 1.0), (1, 0.5, 0.5), (1, 0.25, 0.25))
"""From coarse to fine: downscaling factor, largest shift tried, and step between shifts (both in scaled pixels)."""


def warp_residual(frames: NDArray[np.uint8], still: float) -> float | None:
    """Mean absolute difference between each frame and the previous one warped to it, relative to that without warping.

    frames (n, H, W, 3). About 0 for smooth motion, 0.7 to 0.8 for noise and flicker. None for a single frame,
    or if frames differ by less than `still`, of 255, so that a frozen clip does not score well.
    """
    if len(frames) < 2:
        return None
    pixels = _reduced(rearrange(torch.from_numpy(frames).float(), "n h w c -> n c h w"))
    before, after = pixels[:-1], pixels[1:]
    unwarped = float((after - before).abs().mean())
    if unwarped < still:
        return None
    grey = pixels.mean(dim=1, keepdim=True)
    flow = estimate_flow(grey[:-1], grey[1:])
    return float((after - shifted(before, flow)).abs().mean()) / unwarped


def estimate_flow(before: Tensor, after: Tensor) -> Tensor:
    """Frames (n, c, H, W) -> (n, 2, H, W): where in `before` each pixel of `after` was, as (x, y) offsets in pixels."""
    flow = before.new_zeros(len(before), 2, 1, 1)
    coarser = LEVELS[0][0]
    for reduction, reach, step in LEVELS:
        size = [max(1, edge // reduction) for edge in before.shape[2:]]
        left, right = (functional.interpolate(x, size, mode="area") for x in (before, after))
        flow = functional.interpolate(flow, size, mode="nearest") * (coarser / reduction)
        coarser = reduction
        steps = torch.arange(-reach, reach + step / 2, step)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=2).reshape(-1, 1, 2, 1, 1)
        # Search around the coarser estimate, and around zero motion in case that estimate is wrong.
        starts = torch.stack([flow, torch.zeros_like(flow)] if flow.any() else [flow])
        candidates = torch.cat([flow[None], *(start + offsets for start in starts)])
        mismatch = _mismatch(left, right, candidates)
        best = mismatch.argmin(dim=0)[None].expand(1, -1, 2, -1, -1)
        flow = candidates.gather(0, best)[0]
    return flow


def shifted(pixels: Tensor, flow: Tensor) -> Tensor:
    """Sample pixels (n, c, H, W) at each place plus its offset (n, 2, H, W), bilinear; the border is replicated."""
    rows, columns = pixels.shape[2:]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([x, y]) + flow
    size = torch.tensor([columns, rows])[:, None, None]
    grid = rearrange((2 * places + 1) / size - 1, "n two h w -> n h w two")
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _mismatch(before: Tensor, after: Tensor, flows: Tensor) -> Tensor:
    """flows (k, n, 2, H, W) -> (k, n, 1, H, W): the mean absolute difference over the window around each pixel."""
    read = shifted(before.repeat(len(flows), 1, 1, 1), flows.flatten(0, 1))
    difference = (read.view(len(flows), *before.shape) - after).abs().mean(dim=2, keepdim=True)
    return torch.from_numpy(uniform_filter(difference.numpy(), WINDOW, mode="nearest", axes=(3, 4)))


def _reduced(pixels: Tensor) -> Tensor:
    shorter = min(pixels.shape[2:])
    if shorter <= SIDE:
        return pixels
    size = [round(edge * SIDE / shorter) for edge in pixels.shape[2:]]
    return functional.interpolate(pixels, size, mode="area")
