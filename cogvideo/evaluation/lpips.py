"""LPIPS of pairs of clips, from a TorchScript network given by the user.

The network takes two batches of frames (n, 3, H, W) from -1 to 1 and returns n distances in any shape. From the `lpips`
package: `torch.jit.trace(lpips.LPIPS(net="alex").eval(), (frames, frames))`. Distances with AlexNet and with VGG differ
fourfold, so the role and the name of the measure say which one is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from cogvideo.evaluation.networks import load_torchscript, read_network_file
from cogvideo.logs import is_exhausted

LPIPS_ROLES = ("lpips_alex", "lpips_vgg")
PROBE_SIDE = 64


class PairNetwork:
    """A network that returns the distances of pairs of frames."""

    def __init__(self, role: str, sha256: str, module: Any, device: torch.device) -> None:
        self.role, self.sha256, self.device = role, sha256, device
        self.trusted = True
        """Whether it is used only because the user trusts it; always, as no TorchScript checksum has been published."""
        self._module = module.to(device).eval()

    def distance(self, frames: NDArray[np.uint8], others: NDArray[np.uint8]) -> float:
        """Mean over the frames of two clips (n, H, W, 3). Raises: ValueError if the network fails on them."""
        return float(self._distances(_signed(frames), _signed(others)).mean())

    def _distances(self, x: Tensor, y: Tensor) -> NDArray[np.float64]:
        try:
            with torch.inference_mode():
                output = self._module(x.to(self.device), y.to(self.device))
        except Exception as error:  # its code may raise anything
            if is_exhausted(error):
                raise
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(f"the {self.role} network fails on pairs of frames {list(x.shape)} ({reason})") from None
        if not isinstance(output, Tensor) or output.numel() != len(x) or not output.is_floating_point():
            got = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the {self.role} network returns {got} for {len(x)} pairs; expected one distance each")
        values: NDArray[np.float64] = output.flatten().double().numpy(force=True)
        if not np.isfinite(values).all():
            raise ValueError(f"the {self.role} network returns values that are not finite")
        return values

    def check(self) -> None:
        """Raises: ValueError unless equal frames are 0 apart, others more, and pairs do not affect each other."""
        noise = np.random.default_rng(0).random((2, 3, PROBE_SIDE, PROBE_SIDE), np.float32)
        x = torch.from_numpy(noise * 2 - 1)
        y = torch.stack([x[0] * 0.1, x[1]])
        apart, same = self._distances(x, y)
        alone = self._distances(x[:1], y[:1])[0]
        if apart <= 0 or abs(same) > 1e-3 * apart or abs(alone - apart) > 1e-2 * apart:
            raise ValueError(
                f"the {self.role} network gives a distance of {same:.4g} for equal frames, and {apart:.4g} "
                f"({alone:.4g} as the only pair) for different ones; expected 0, and the same positive value both times"
            )


def open_pair_network(role: str, path: Path, device: torch.device, *, trust: bool = False) -> PairNetwork:
    """Load and check a network. Raises: OSError; ValueError without `trust`, or for an unsuitable file or network."""
    data, sha256, _ = read_network_file(role, path, trust=trust)
    network = PairNetwork(role, sha256, load_torchscript(data, path), device)
    try:
        network.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return network


def _signed(frames: NDArray[np.uint8]) -> Tensor:
    return rearrange(torch.from_numpy(frames).float(), "n h w c -> n c h w") / 127.5 - 1
