"""Stand-ins for feature networks, as TorchScript files."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cogvideo.evaluation.weight_files import CaptionNetwork


class StandIn(nn.Module):
    """Coarse pixels and their differences in time, through a random layer; takes what the I3D network takes."""

    def __init__(self, width: int = 24):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(2 * 3 * 4 * 4 * 4, width, generator=generator) / 10)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = True) -> Tensor:
        if rescale:
            x = x / 127.5 - 1
        coarse = nn.functional.adaptive_avg_pool3d(x, [4, 4, 4])
        change = (x[:, :, 1:] - x[:, :, :-1]).abs()
        moved = nn.functional.adaptive_avg_pool3d(change, [4, 4, 4])
        features = torch.cat([coarse.flatten(1), 10 * moved.flatten(1)], dim=1) @ self.weight
        return features if return_features else features.softmax(dim=1)


class PairStandIn(nn.Module):
    """In place of LPIPS: the mean squared difference of two batches of frames."""

    def __init__(self, offset: float = 0.0):
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean(dim=[1, 2, 3], keepdim=True) + self.offset


class CaptionStandIn(CaptionNetwork):
    """In place of `open_weights` of CLIP: coarse pixels of any file's clips, and a fixed random vector per caption."""

    def __init__(self, role: str, path: Path, device: torch.device, *, trust: bool = False) -> None:
        super().__init__(role, hashlib.sha256(path.read_bytes()).hexdigest(), Plain(), device, trusted=trust)

    def caption_features(self, captions: Sequence[str]) -> NDArray[np.float32]:
        rows = [np.random.default_rng(list(caption.encode())).normal(size=24) for caption in captions]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32)


class Plain(nn.Module):
    """Takes clips alone; `scale` makes it constant or not finite."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool3d(x, [2, 2, 2]).flatten(1) * self.scale


class Dense(nn.Module):
    """Ends in a dense layer, so that it takes clips of 112x112 pixels only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(112, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean(dim=[1, 2, 3]) @ self.weight).softmax(dim=1)


class Unbatched(nn.Module):
    """Answers with one number for all clips."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class BatchNormalised(nn.Module):
    """Lets clips of a batch see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool3d(x - x.mean(dim=0), [2, 2, 2]).flatten(1)


def write_network(path: Path, module: nn.Module) -> str:
    """Write a TorchScript file; returns its SHA-256."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()
