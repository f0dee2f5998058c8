"""Image tokenizers that are trained on from others: with other norms, with a new codebook, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.training.config import TokenizerTraining
from cogvideo.training.launch import train
from cogvideo.training.tasks.tokenizer import initial_tokenizer
from tests.helpers.training import prepare_data, settings

EXPORT = "export/image_tokenizer"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained tokenizer."""
    run_dir = tmp_path_factory.mktemp("first")
    train(settings(data, run_dir, "tokenizer"))
    return run_dir / EXPORT


def test_a_new_codebook_may_have_another_size(data: Path, tmp_path: Path, first: Path) -> None:
    groups: dict[str, dict[str, Any]] = {
        "init": {"checkpoint": first},
        "tokenizer": {"new_codebook": True, "num_codes": 24, "norm_scope": "pixel", "continuous_steps": 2},
    }
    train(settings(data, tmp_path / "whole", "tokenizer", **groups))
    for stop in (1, 3, None):
        train(settings(data, tmp_path / "parts", "tokenizer", train={"stop_at": stop}, **groups), resume=True)
    whole, parts = (ImageTokenizer.load(tmp_path / name / EXPORT) for name in ("whole", "parts"))
    assert whole.num_tokens == 24
    assert whole.config.vqvae.norm_scope == "pixel"
    assert whole.codebook.isfinite().all()
    assert whole.codebook.unique(dim=0).shape[0] > 16, "codes were made by k-means"
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, parts.model.state_dict()[name]), f"{name} depends on where the run was stopped"


def test_norms_change_and_all_weights_stay(first: Path) -> None:
    trained, again = ImageTokenizer.load(first), initial_tokenizer(first, TokenizerTraining(norm_scope="pixel"))
    assert (trained.config.vqvae.norm_scope, again.config.vqvae.norm_scope) == ("image", "pixel")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = [t.model.features(t.normalise(image), t.config.level) for t in (trained, again)]
    assert not torch.allclose(features[0], features[1])


def test_settings_that_the_checkpoint_does_not_have_are_refused(first: Path) -> None:
    trained = ImageTokenizer.load(first)
    channels = trained.config.vqvae.channels
    with pytest.raises(ValueError, match=rf"tokenizer\.channels=24 differs from {channels} of init\.checkpoint="):
        initial_tokenizer(first, TokenizerTraining(channels=24))
    with pytest.raises(ValueError, match=r"tokenizer\.num_codes=24 differs from 16 "):
        initial_tokenizer(first, TokenizerTraining(num_codes=24))
    with pytest.raises(ValueError, match=r"tokenizer\.pixel_std=\[1\.0, 1\.0, 1\.0\] differs from \["):
        initial_tokenizer(first, TokenizerTraining(pixel_std=(1.0, 1.0, 1.0)))
    same = TokenizerTraining(channels=channels, num_codes=16, pixel_std=trained.config.pixel_std)
    assert torch.equal(initial_tokenizer(first, same).codebook, trained.codebook)


def test_a_new_codebook_needs_a_checkpoint(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.new_codebook=true replaces the codebook of init\.checkpoint"):
        train(settings(data, tmp_path / "run", "tokenizer", tokenizer={"new_codebook": True}))
