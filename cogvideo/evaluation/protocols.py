"""Protocols: everything that affects the numbers of an evaluation, under a name and a hash.

Two numbers can be compared only if their hashes are equal. Where no value has been published, the choice is ours, and
`about` says so.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from cogvideo.evaluation.frechet import Divisor
from cogvideo.evaluation.networks import CLIP_SHA256, I3D_SHA256, Role

Start = Literal["first", "random"]
Crop = Literal["center", "squash"]
Filter = Literal["bilinear", "lanczos"]
FeatureMetric = Literal["fvd", "kvd", "precision_recall", "is", "fid", "kid", "frame_precision_recall", "clipsim"]
NETWORK_OF: dict[FeatureMetric, str] = {
    **{"fvd": "i3d", "kvd": "i3d", "precision_recall": "i3d", "is": "c3d", "clipsim": "clip"},
    **{"fid": "inception", "kid": "inception", "frame_precision_recall": "inception"},
}
WITHOUT_REAL = ("is", "clipsim")
"""Metrics that need no real clips."""
HASH_DIGITS = 12
NOT_HASHED = ("name", "about", "data")
HASHED_IF_SET = ("inception_sha256", "clip_sha256", "lpips_alex_sha256", "lpips_vgg_sha256")
"""Fields added later, left out of the hash while None, so that existing protocols keep their hashes."""


@dataclass(frozen=True)
class Protocol:
    """How clips are chosen, prepared and compared."""

    name: str
    about: str
    """Where the protocol comes from, and which parts of it are our choice."""
    data: str
    """The real clips that it needs, and where to get them."""
    metrics: tuple[FeatureMetric, ...]
    """The metrics that need a network."""
    clips: int | None
    """On each side, one per video; None: as many as the smaller side has."""
    frames: int = 16
    stride: int = 1
    """Every `stride`-th frame of a video is taken; ignored if `fps` is set."""
    fps: float | None = None
    """Frames per second to sample clips at, instead of `stride`; None: the video's own rate."""
    real_start: Start = "random"
    """Where in a real video the clip begins. Videos that are too short are left out."""
    generated_start: Start = "first"
    given_frames: int = 0
    """Frame prediction: how many frames at the start of generated clips are real ones."""
    split: str = "train"
    side: int = 128
    """Height and width in pixels to which every frame is resized first, before the network's size."""
    crop: Crop = "center"
    """center: scale to the shorter edge and crop the rest; squash: scale both edges, ignoring the aspect ratio."""
    filter: Filter = "bilinear"
    """bilinear: without antialiasing or rounding; lanczos: Pillow's, rounded to 8 bits."""
    i3d_side: int = 224
    c3d_side: int = 112
    """Size to which frames are then resized for each network, bilinear without antialiasing."""
    network_prepares: bool = False
    """Whether the network itself rescales and resizes pixels from 0 to 255."""
    low: float = -1.0
    high: float = 1.0
    """The values to which black and white are mapped for the network."""
    divisor: Divisor = "n-1"
    """Of the covariance."""
    splits: int = 10
    """Splits over which the Inception Score is averaged; a single one if they would have fewer than 10 clips each."""
    shuffle_seed: int = 42
    """For shuffling the clips before they are split."""
    i3d_sha256: str | None = I3D_SHA256
    c3d_sha256: str | None = None
    """None: no checksum has been published; the hash of the file in use takes its place."""
    inception_sha256: str | None = None
    clip_sha256: str | None = None
    lpips_alex_sha256: str | None = None
    lpips_vgg_sha256: str | None = None
    """Of the files in use; None: not used."""
    motion_fps: float = 4.0
    """Frames per second at which the amount of motion is measured."""
    rules: int = 2
    """Version of the code that implements all this, incremented when a change to it affects numbers."""

    @property
    def hash(self) -> str:
        """12 hex digits over all fields but names and descriptions."""
        values = {
            key: value
            for key, value in asdict(self).items()
            if key not in NOT_HASHED and not (key in HASHED_IF_SET and value is None)
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]

    @property
    def roles(self) -> tuple[str, ...]:
        """The networks that its metrics need, in order."""
        return tuple(dict.fromkeys(NETWORK_OF[metric] for metric in self.metrics))

    @property
    def needs_real(self) -> bool:
        return any(metric not in WITHOUT_REAL for metric in self.metrics) or not self.metrics

    def network_side(self, role: str) -> int:
        """Height and width in pixels that a network reads."""
        return self.c3d_side if role == "c3d" else self.i3d_side

    def with_networks(self, sha256: dict[str, str]) -> Protocol:
        """A copy with the hashes of the networks in use, by role; metrics of networks not given are left out."""
        metrics = tuple(metric for metric in self.metrics if NETWORK_OF[metric] in sha256)
        hashes = {f"{role}_sha256": sha256.get(role) for role in get_args(Role)}
        return replace(self, metrics=metrics, **hashes)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        return {"hash": self.hash, **asdict(self)}


UCF101 = "the videos of UCF-101's train split 1 (9,537 .avi), from https://www.crcv.ucf.edu/data/UCF101.php"
MSRVTT = "none: the score looks at generated clips and their captions, those of MSR-VTT's test split"
KINETICS600 = "the videos of Kinetics-600's test split, from https://github.com/cvdfoundation/kinetics-dataset"

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="tats-2048x16-128",
            about="TATS: 2048 clips of 16 consecutive frames at 128 px, squashed to 224 without antialiasing; FVD with "
            "n - 1, and KVD. Its own weights are not TorchScript; i3d_torchscript.pt stands in for them",
            data=UCF101,
            metrics=("fvd", "kvd"),
            clips=2048,
        ),
        Protocol(
            name="styleganv-2048x16",
            about="StyleGAN-V's fvd2048_16f: real clips from a random frame, generated ones from the first; the "
            "network rescales and resizes; FVD with n. Frames brought to 256 px with Pillow's Lanczos are our choice",
            data="videos of the set that the model was trained on, at least 2,048 of 16 frames or more",
            metrics=("fvd",),
            clips=2048,
            side=256,
            filter="lanczos",
            network_prepares=True,
            divisor="n",
        ),
        Protocol(
            name="ucf101-2048",
            about="class-conditional UCF-101: 2,048 clips whose captions are classes; FVD as in TATS",
            data=UCF101,
            metrics=("fvd", "kvd", "precision_recall"),
            clips=2048,
        ),
        Protocol(
            name="ucf101-10000",
            about="class-conditional UCF-101: Inception Score of 10,000 clips in 10 parts, with C3D at 112 px",
            data="none: the score looks at generated clips only",
            metrics=("is",),
            clips=10_000,
            i3d_sha256=None,
        ),
        Protocol(
            name="kinetics600-5to11-64",
            about="frame prediction: 16 frames at 64 px, of which the first 5 are given. 2,048 clips, "
            "and real ones from a random frame, are our choice",
            data=KINETICS600,
            metrics=("fvd", "kvd"),
            clips=2048,
            given_frames=5,
            split="test",
            side=64,
        ),
        *(
            Protocol(
                name=f"msrvtt-{captions}",
                about=f"MSR-VTT zero-shot CLIPSIM, one clip for {which} of the test split's 2,990 videos: mean cosine "
                "of captions and frames under OpenAI's ViT-B/32. 16 frames at 224 px are our choice",
                data=MSRVTT,
                metrics=("clipsim",),
                clips=captions,
                split="test",
                side=224,
                i3d_sha256=None,
                clip_sha256=CLIP_SHA256,
            )
            for captions, which in ((2990, "one caption of each"), (59_794, "each of the 59,794 captions"))
        ),
    )
}
LOCAL = Protocol(
    name="local",
    about="your own data, any number of clips",
    data="any videos",
    metrics=tuple(NETWORK_OF),
    clips=None,
    split="yours",
)
"""The starting point of `cogvideo eval local`, whose options change the hash."""


def check_comparable(left: Protocol | str, right: Protocol | str) -> None:
    """Raises: ValueError if numbers of these two protocols, or hashes, cannot be compared."""
    first, second = (value.hash if isinstance(value, Protocol) else value for value in (left, right))
    if first != second:
        raise ValueError(
            f"numbers of protocol {first} and of protocol {second} cannot be compared; measure both in the same way"
        )
