"""Flow finds known movements, and its residual tells movement from flicker and noise."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cogvideo.evaluation.warp import estimate_flow, warp_residual

STILL = 0.1


def texture(rows: int, columns: int):
    smooth = gaussian_filter(np.random.default_rng(0).normal(size=(rows, columns, 3)), (2, 2, 0))
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


def pan(step: int, frames: int = 6, side: int = 48):
    """A window that moves right over a picture."""
    wide = texture(side, side + step * frames)
    return np.stack([wide[:, index * step : index * step + side] for index in range(frames)])


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_movement_is_found_and_leaves_little(step: int) -> None:
    clip = pan(step)
    grey = torch.from_numpy(clip).float().mean(dim=3)[:, None]
    flow = estimate_flow(grey[:-1], grey[1:])[:, :, 10:-10, 10:-10]
    assert (flow[:, 0] == step).float().mean() > 0.6 and (flow[:, 1] == 0).float().mean() > 0.6
    assert warp_residual(clip, STILL) < 0.3


def test_movements_by_half_a_pixel_are_found() -> None:
    wide = texture(48, 100)
    clip = np.stack([wide[:, index : index + 96].reshape(48, 48, 2, 3).mean(axis=2) for index in range(4)])
    grey = torch.from_numpy(clip).float().mean(dim=3)[:, None]
    assert (estimate_flow(grey[:-1], grey[1:])[:, 0] == 0.5).float().mean() > 0.9


def test_flicker_and_noise_stay_and_a_frozen_clip_has_no_residual() -> None:
    clip = pan(3)
    flickering = np.clip(clip + 30 * (-1) ** np.arange(len(clip))[:, None, None, None], 0, 255).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, clip.shape, np.uint8)
    assert warp_residual(clip, STILL) < 0.3 < 0.5 < min(warp_residual(flickering, STILL), warp_residual(noise, STILL))
    assert warp_residual(np.repeat(clip[:1], 6, axis=0), STILL) is None
    assert warp_residual(clip[:1], STILL) is None


def test_large_frames_are_reduced_first() -> None:
    clip = pan(2).repeat(4, axis=1).repeat(4, axis=2)
    assert warp_residual(clip, STILL) == pytest.approx(warp_residual(clip[:, ::3, ::3][:, :64, :64], STILL), abs=0.15)
    assert warp_residual(clip, STILL) < 0.3
