"""Feature networks from files that the user gives: hashed before anything is loaded, since TorchScript is code.

A file whose SHA-256 is not in KNOWN is refused unless the user trusts it, and results then say so. Every network is
tried on fixed inputs before it is used. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogvideo.logs import is_exhausted

Role = Literal["i3d", "c3d", "inception", "clip", "lpips_alex", "lpips_vgg"]
ROLES: tuple[str, ...] = get_args(Role)
WEIGHTS_ROLES = ("inception", "clip")
"""Networks that other packages build from weights; all others are TorchScript."""
FRAMES_SEEN = 4
"""Evenly spaced frames of a clip that image networks read: the FID of n clips is that of 4 n images."""
MAX_BYTES = 2 << 30
PROBE_FRAMES = 16
PROBE_SIDES = {"i3d": 224, "c3d": 112, "inception": 64, "clip": 64}
"""Pixels; a network with a dense layer accepts no other size."""
OWN_PREPARATION = ("rescale", "resize")
"""Arguments of networks that can convert pixels from 0 to 255, at any size, to their own range and size."""
TRUST = "pass --trust-network to use it anyway; the results will say so"


@dataclass(frozen=True)
class ReferenceOutput:
    """The published squared distance between the features of a black and a white clip."""

    squared_distance: float
    frames: int
    side: int = 224
    tolerance: float = 0.01
    """Relative."""


@dataclass(frozen=True)
class KnownNetwork:
    """A published file."""

    role: Role
    name: str
    size: int
    """Bytes."""
    width: int | None = None
    """Features per clip; None: given by the network that the weights are loaded into."""
    reference: ReferenceOutput | None = None


I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CLIP_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
KNOWN: dict[str, KnownNetwork] = {
    I3D_SHA256: KnownNetwork("i3d", "i3d_torchscript.pt", 51_235_320, 400, ReferenceOutput(151.256, 30)),
    INCEPTION_SHA256: KnownNetwork("inception", "weights-inception-2015-12-05-6726825d.pth", 95_628_359),
    CLIP_SHA256: KnownNetwork("clip", "ViT-B-32.pt", 353_976_522),
}
"""By SHA-256. No checksums of C3D or LPIPS files have been published, so these always need the user's trust."""


class FeatureNetwork:
    """A network that maps each clip to a feature vector."""

    def __init__(self, role: str, sha256: str, module: Any, device: torch.device, *, trusted: bool) -> None:
        self.role, self.sha256, self.device = role, sha256, device
        self.trusted = trusted
        """Whether it is used only because the user trusts it."""
        self._module = module.to(device).eval()
        schema = getattr(getattr(module, "forward", None), "schema", None)
        self._arguments = {argument.name for argument in schema.arguments} if schema is not None else set()

    @property
    def prepares_pixels(self) -> bool:
        """Whether the network can rescale and resize pixels itself."""
        return set(OWN_PREPARATION) <= self._arguments

    def features(self, clips: Tensor, *, prepare: bool = False) -> NDArray[np.float32]:
        """clips (n, 3, frames, H, W) float32 -> (n, d). `prepare`: the network rescales pixels, 0 to 255, itself.

        Raises: ValueError if the network cannot prepare pixels, fails, or returns anything else.
        """
        if prepare and not self.prepares_pixels:
            raise ValueError(f"the {self.role} network does not take rescale= and resize=, which this protocol needs")
        options: dict[str, bool] = {name: prepare for name in OWN_PREPARATION if name in self._arguments}
        if "return_features" in self._arguments:
            options["return_features"] = self.role != "c3d"  # the Inception Score needs its class outputs
        try:
            with torch.inference_mode():
                output = self._module(clips.to(self.device), **options)
        except Exception as error:  # its code may raise anything
            if is_exhausted(error):
                raise
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(f"the {self.role} network fails on clips of {list(clips.shape)} ({reason})") from None
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(clips) or not output.shape[1]:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the {self.role} network returns {got} for {len(clips)} clips; expected one row per clip")
        if not output.is_floating_point():
            raise ValueError(f"the {self.role} network returns {output.dtype}; expected floating-point features")
        values: NDArray[np.float32] = output.float().numpy(force=True)
        if not np.isfinite(values).all():
            raise ValueError(f"the {self.role} network returns values that are not finite")
        return values


def parse_networks(words: list[str]) -> dict[str, Path]:
    """Parse `i3d=FILE` arguments, by role. Raises: ValueError for another form, or an unknown or repeated role."""
    from cogvideo.config import expand_path

    files: dict[str, Path] = {}
    for word in words:
        role, equals, file = word.partition("=")
        if not equals or not file or role not in ROLES:
            raise ValueError(f"--network {word}: expected ROLE=FILE with a role of {', '.join(ROLES)}")
        if role in files:
            raise ValueError(f"--network {role}= is given twice")
        files[role] = expand_path(file)
    return files


def read_network_file(role: str, path: Path, *, trust: bool) -> tuple[bytes, str, KnownNetwork | None]:
    """A file's bytes, their SHA-256, and its entry in KNOWN, if any, before any of it is loaded.

    Raises: OSError; ValueError for an unknown file without `trust`, one of another role, or one above MAX_BYTES.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; expected a network")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 30} GiB; expected a network")
    sha256 = hashlib.sha256(data).hexdigest()
    known = KNOWN.get(sha256)
    if known is not None and known.role != role:
        raise ValueError(f"{path} is {known.name}, which goes with --network {known.role}=")
    if known is None and not trust:
        names = ", ".join(f"{entry.name} ({entry.size} bytes)" for entry in KNOWN.values() if entry.role == role)
        expected = names or "none, since no checksum has been published"
        code = "" if role == "inception" else "It runs code: "  # a CLIP file may be TorchScript, as OpenAI's is
        raise ValueError(
            f"{path} has {len(data)} bytes and SHA-256 {sha256}, not a known {role} network; known: {expected}. "
            f"{code}if you know where it is from, {TRUST}"
        )
    return data, sha256, known


def open_network(role: str, path: Path, device: torch.device, *, trust: bool = False) -> FeatureNetwork:
    """Hash a TorchScript file, load it, and try it on fixed inputs.

    Raises: OSError; ValueError, before anything is loaded, for an unknown file without `trust`; ValueError for a file
    that is not TorchScript, or a network whose outputs are wrong.
    """
    data, sha256, known = read_network_file(role, path, trust=trust)
    network = FeatureNetwork(role, sha256, load_torchscript(data, path), device, trusted=known is None)
    try:
        problem = _find_fault(network, known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if problem is not None:
        if not trust:
            raise ValueError(f"{path}: {problem}; {TRUST}")
        network.trusted = True
    return network


def black_and_white_distance(network: FeatureNetwork, reference: ReferenceOutput) -> float:
    """The squared distance between the features of clips filled with -1 and with 1."""
    shape = (1, 3, reference.frames, reference.side, reference.side)
    low, high = (network.features(torch.full(shape, level)).astype(np.float64) for level in (-1.0, 1.0))
    return float(((low - high) ** 2).sum())


def check_answers(network: FeatureNetwork, scale: float = 1.0, offset: float = 0.0) -> int:
    """Try a network on two noise clips, -1 to 1 times `scale` plus `offset`, and return its features per clip.

    Raises: ValueError if the network is unusable.
    """
    rng = np.random.default_rng(0)
    side = PROBE_SIDES[network.role]
    noise = rng.random((2, 3, PROBE_FRAMES, side, side), np.float32)
    clips = torch.from_numpy(noise * 2 - 1)
    clips[1] *= 0.1
    clips = clips * scale + offset
    together, alone = network.features(clips), network.features(clips[1:])
    if together.shape[1] != alone.shape[1] or not np.allclose(
        together[1], alone[0], rtol=1e-2, atol=1e-3 * float(np.abs(alone).max())
    ):
        raise ValueError(
            f"the {network.role} network gives a clip different features depending on the rest of the batch"
        )
    if np.allclose(together[0], together[1], rtol=1e-6, atol=0):
        raise ValueError(f"the {network.role} network returns the same features for different clips")
    return together.shape[1]


def _find_fault(network: FeatureNetwork, known: KnownNetwork | None) -> str | None:
    """A deviation from the published output, which the user may choose to accept; None if there is none.

    Raises: ValueError if the network is unusable.
    """
    width = check_answers(network)
    if known is None:
        return None
    if known.width is not None and width != known.width:
        raise ValueError(f"{known.name} returns {width} features, expected {known.width}")
    if known.reference is not None:
        got, expected = black_and_white_distance(network, known.reference), known.reference.squared_distance
        if abs(got - expected) > known.reference.tolerance * expected:
            return f"black and white clips are {got:.3f} apart, the published distance is {expected:.3f}"
    return None


def load_torchscript(data: bytes, path: Path) -> Any:
    """Load a TorchScript module from the bytes that were hashed. Raises: ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript itself is deprecated
            return torch.jit.load(io.BytesIO(data), map_location="cpu")
    except Exception as error:  # torch raises many kinds for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{path} is not readable as TorchScript ({reason}); expected a file written by torch.jit.save"
        ) from None
