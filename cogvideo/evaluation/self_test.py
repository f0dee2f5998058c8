"""Check the measures and the given networks against published and analytic values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cogvideo.evaluation.frechet import Moments, frechet_distance
from cogvideo.evaluation.lpips import PairNetwork
from cogvideo.evaluation.networks import KNOWN, FeatureNetwork, black_and_white_distance
from cogvideo.evaluation.pixel_metrics import psnr, ssim

ANALYTIC = 305.5037593985
"""For 400-dimensional Gaussians with standard deviations linspace(0.5, 2) and their reverse, and means 0.1 apart."""
RANDOM_CLIPS, RANDOM_FVD = 128, 10.1380848
"""For the I3D features of RandomState(1) and (2).rand(128, 16, 224, 224, 3), not rescaled."""


class Check(NamedTuple):
    name: str
    got: float
    expected: float
    tolerance: float
    """Absolute."""

    @property
    def passed(self) -> bool:
        return abs(self.got - self.expected) <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "WRONG"
        return f"{verdict:<6}{self.name}: {self.got:.9g}, expected {self.expected:.9g} ± {self.tolerance:g}"


def run_self_test(networks: Mapping[str, FeatureNetwork | PairNetwork]) -> Iterator[Check]:
    """Yield each check as it completes."""
    yield Check("Fréchet distance of Gaussians", _of_gaussians(), ANALYTIC, 1e-9)
    same = Moments.of(np.random.default_rng(0).normal(size=(16, 400)))
    yield Check("Fréchet distance of a set to itself", frechet_distance(same, same), 0.0, 1e-9)
    black, white = np.zeros((2, 64, 64, 3), np.uint8), np.full((2, 64, 64, 3), 255, np.uint8)
    yield Check("PSNR of black and white", psnr(black, white), 0.0, 0.0)
    yield Check("SSIM of black and white", ssim(black, white), 9.9990e-5, 1e-9)
    network = networks.get("i3d")
    known = None if network is None else KNOWN.get(network.sha256)
    if isinstance(network, FeatureNetwork) and known is not None and known.reference is not None:
        distance = black_and_white_distance(network, known.reference)
        expected = known.reference.squared_distance
        yield Check("I3D, black and white", distance, expected, known.reference.tolerance * expected)
        yield Check("I3D, random clips", _of_random_clips(network), RANDOM_FVD, 1e-3 * RANDOM_FVD)


def _of_gaussians() -> float:
    """From samples whose moments match those of the Gaussians exactly."""
    deviations = np.linspace(0.5, 2, 400)
    raw = np.random.default_rng(0).normal(size=(1000, 400))
    basis = np.linalg.qr(raw - raw.mean(axis=0))[0] * np.sqrt(999)
    return frechet_distance(Moments.of(basis * deviations), Moments.of(basis * deviations[::-1] + 0.1))


def _of_random_clips(network: FeatureNetwork) -> float:
    sets = []
    for seed in (1, 2):
        # Drawing in parts gives the same numbers as one large draw.
        state = np.random.RandomState(seed)
        features: list[NDArray[np.float32]] = []
        for _ in range(RANDOM_CLIPS):
            clip = torch.from_numpy(state.rand(1, 16, 224, 224, 3).astype(np.float32))
            features.append(network.features(clip.permute(0, 4, 1, 2, 3)))
        sets.append(Moments.of(np.concatenate(features)))
    return frechet_distance(sets[0], sets[1])
