"""Networks that other packages build from a weights file given by the user: InceptionV3 and CLIP.

inception  torch-fidelity's InceptionV3: 2,048 features for each of FRAMES_SEEN frames of a clip, for FID and KID
clip       open_clip's CLIP: the mean of the frames' unit image features, and unit features of captions, for CLIPSIM

Files written by torch.save are read without running code; OpenAI's TorchScript archive of CLIP can run code. A wrong
file gives wrong numbers that look right, so a file with an unknown SHA-256 is refused before it is loaded, unless the
user trusts it; results then say so. Nothing is downloaded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cogvideo.evaluation.networks import FRAMES_SEEN, FeatureNetwork, check_answers, read_network_file

INSTALL = "pip install 'cogvideo[eval]'"
INCEPTION_FEATURES = 2048
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of pixels from 0 to 1. Source: OpenAI's CLIP."""


class InceptionFrames(nn.Module):
    """Maps clips to the features of FRAMES_SEEN of their frames."""

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, clips: Tensor) -> Tensor:
        """clips (n, 3, frames, H, W), 0 to 255 -> (n, frames seen * 2048)."""
        count = clips.shape[2]
        chosen = torch.linspace(0, count - 1, FRAMES_SEEN).round().long().tolist()
        frames = rearrange(clips[:, :, chosen].round().clamp(0, 255).byte(), "n c t h w -> (n t) c h w")
        return rearrange(self.extractor(frames)[0], "(n t) d -> n (t d)", n=len(clips))


class ClipFrames(nn.Module):
    """Maps clips to the mean of their frames' unit features; its dot product with a caption's is the mean cosine."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        """clips (n, 3, frames, H, W), 0 to 255 -> (n, d)."""
        frames = rearrange(clips, "n c t h w -> (n t) c h w")
        size = self.model.visual.image_size
        # CLIP's own preprocessing, for square frames
        frames = functional.interpolate(frames, size, mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        mean, std = (torch.tensor(x, device=clips.device)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
        features = functional.normalize(self.model.encode_image((frames - mean) / std), dim=1)
        return rearrange(features, "(n t) d -> n t d", n=len(clips)).mean(dim=1)


class CaptionNetwork(FeatureNetwork):
    """CLIP: features of clips, and of captions."""

    def caption_features(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Captions -> (n, d) of unit length. Captions longer than CLIP's 77 tokens are truncated, as is usual."""
        from open_clip import tokenizer

        model = self._module.model
        parts = []
        with torch.inference_mode():
            for first in range(0, len(captions), 256):
                tokens = tokenizer.tokenize(list(captions[first : first + 256]), model.context_length)
                parts.append(functional.normalize(model.encode_text(tokens.to(self.device)), dim=1))
        values: NDArray[np.float32] = torch.cat(parts).float().numpy(force=True)
        return values


def open_weights(role: str, path: Path, device: torch.device, *, trust: bool = False) -> FeatureNetwork:
    """Build the network of a weights file and try it on fixed inputs.

    Raises: OSError; ValueError for an unknown file without `trust`, weights of another network, or a missing package.
    """
    data, sha256, known = read_network_file(role, path, trust=trust)
    state = _weights(data, path)
    package = {"inception": "torch_fidelity", "clip": "open_clip"}[role]
    if find_spec(package) is None:
        raise ValueError(f"--network {role}= needs the package {package}; install it with {INSTALL}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old file formats
            module = _inception(state) if role == "inception" else _clip(state)
    except (RuntimeError, KeyError, ValueError, AttributeError, IndexError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold the weights of {package}'s {role} network ({reason})") from None
    kind = CaptionNetwork if role == "clip" else FeatureNetwork
    network = kind(role, sha256, module, device, trusted=known is None)
    try:
        check_answers(network, scale=127.5, offset=127.5)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return network


def _inception(state: dict[str, Tensor]) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    checked = io.BytesIO()  # torch-fidelity unpickles its input; this holds only tensors
    torch.save(state, checked)
    checked.seek(0)
    extractor = FeatureExtractorInceptionV3(
        "inception", [str(INCEPTION_FEATURES)], feature_extractor_weights_path=checked
    )
    return InceptionFrames(extractor)


def _clip(state: dict[str, Tensor]) -> nn.Module:
    from open_clip.model import build_model_from_openai_state_dict

    return ClipFrames(build_model_from_openai_state_dict(state, cast_dtype=torch.float32).float())


def _weights(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file or of OpenAI's TorchScript archive. Raises: ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except RuntimeError as error:
                if "TorchScript" not in str(error):
                    raise
                state = dict(torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict())
    except Exception as error:  # torch raises many kinds for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} is not a readable weights file ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no weights; expected tensors by name")
    if any(value.is_floating_point() and not value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path} holds weights that are not finite")
    return state
