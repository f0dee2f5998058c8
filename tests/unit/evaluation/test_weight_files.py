"""Weights of InceptionV3 and CLIP, end to end with small stand-ins: real ones cannot be had in a test."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo.evaluation.compare import caption_similarities, compare
from cogvideo.evaluation.measure import Measured, Meter
from cogvideo.evaluation.networks import KNOWN, KnownNetwork
from cogvideo.evaluation.protocols import LOCAL
from cogvideo.evaluation.sources import Clip, ClipSource
from cogvideo.evaluation.weight_files import CaptionNetwork, open_weights

CPU = torch.device("cpu")


class ColourClip(Clip):
    """Frames of noise in one colour, with a caption."""

    def __init__(self, number: int, caption: str | None = None) -> None:
        self.name, self.caption, self.num = f"clip {number}", caption or f"caption {number % 3}", number

    @property
    def num_frames(self) -> int:
        return 4

    @property
    def identity(self) -> str:
        return self.name

    def read(self, indices):
        noise = np.random.default_rng(self.num).integers(0, 120, (4, 32, 32, 3), np.uint8)
        return (noise + np.uint8(40 * (self.num % 4)))[indices]


def clips(first: int, count: int) -> ClipSource:
    return ClipSource(f"from {first}", "frames", tuple(ColourClip(number) for number in range(first, first + count)))


def write_clip(path: Path) -> dict:
    """The state of a small CLIP with random weights, written as OpenAI's files are laid out."""
    model = pytest.importorskip("open_clip.model", reason="open-clip-torch cannot be imported", exc_type=Exception)
    torch.manual_seed(0)
    vision = model.CLIPVisionCfg(layers=1, width=64, patch_size=16, image_size=32)
    text = model.CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=1, layers=1)
    state = model.CLIP(16, vision, text, quick_gelu=True).state_dict()
    torch.save(state, path)
    return state


@pytest.mark.slow
def test_clipsim_of_a_stand_in_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"not a known clip network; known: ViT-B-32.pt .*--trust-network"):
        open_weights("clip", tmp_path / "clip.pt", CPU)
    network = open_weights("clip", tmp_path / "clip.pt", CPU, trust=True)
    assert isinstance(network, CaptionNetwork) and network.trusted
    monkeypatch.setitem(KNOWN, network.sha256, KnownNetwork("clip", "clip.pt", 1))
    assert not open_weights("clip", tmp_path / "clip.pt", CPU).trusted
    protocol = replace(LOCAL, frames=4, side=32).with_networks({"clip": network.sha256})
    numbers = compare(Meter(protocol, {"clip": network}), clips(0, 6), None).numbers
    assert -1 <= numbers["clipsim"].value <= 1 and numbers["clipsim"].count == 6
    assert numbers["clipsim_shuffled"].value != numbers["clipsim"].value
    missing = ClipSource("x", "frames", (*clips(0, 2).clips, ColourClip(2)))
    missing.clips[2].caption = None
    with pytest.raises(ValueError, match="clip 2 has none; give --captions FILE"):
        compare(Meter(protocol, {"clip": network}), missing, None)


@pytest.mark.slow
def test_fid_of_a_stand_in_end_to_end(tmp_path: Path) -> None:
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity cannot be imported", exc_type=Exception
    )
    torch.manual_seed(0)
    extractor = inception.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "none.pth")
        random = extractor("x", ["2048"], feature_extractor_weights_path=tmp_path / "none.pth")
    torch.save(random.state_dict(), tmp_path / "net.pth")
    network = open_weights("inception", tmp_path / "net.pth", CPU, trust=True)
    protocol = replace(LOCAL, frames=4, side=32).with_networks({"inception": network.sha256})
    numbers = compare(Meter(protocol, {"inception": network}), clips(0, 3), clips(10, 6)).numbers
    assert numbers["fid"].value > 0 and numbers["fid"].floor > 0
    assert {"kid", "frame_precision", "frame_recall"} <= numbers.keys()
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of torch_fidelity's inception network"):
        open_weights("inception", tmp_path / "other.pth", CPU, trust=True)


class Captions:
    """Features of captions by hand."""

    def caption_features(self, captions):
        return np.array([{"a": [1, 0], "b": [0, 1]}[caption] for caption in captions], np.float32)


def test_the_shuffled_baseline_is_the_mean_over_clips_with_other_captions() -> None:
    features = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], np.float32)
    own, shuffled = caption_similarities(Captions(), Measured(["x"] * 3, {"clip": features}, {}, ("a", "a", "b")))
    np.testing.assert_allclose(own, [0.9, 0.8, 0.7], rtol=1e-6)
    np.testing.assert_allclose(shuffled, [0.1, 0.2, 0.3], rtol=1e-6)
    assert caption_similarities(Captions(), Measured(["x"], {"clip": features[:1]}, {}, ("a",)))[1] is None


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvideo.evaluation.weight_files.find_spec", lambda name: None)
    torch.save({"weight": torch.ones(3)}, tmp_path / "any.pt")
    with pytest.raises(
        ValueError, match=r"needs the package open_clip; install it with pip install 'cogvideo\[eval\]'"
    ):
        open_weights("clip", tmp_path / "any.pt", CPU, trust=True)
    (tmp_path / "any.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a readable weights file"):
        open_weights("clip", tmp_path / "any.pt", CPU, trust=True)
