"""Settings of sampling, with the published values as defaults. Plain data: printing or checking it needs no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

UNGUIDED_TEXT_BONUS = 1.4
"""Published: steers by attention where nothing steers by guidance."""
STYLES = {
    "none": "",
    "mainbody": " 高清摄影 隔绝",
    "photo": None,
    "flat": " 平面风格",
    "comics": " 漫画 隔绝",
    "oil": " 油画风格",
    "sketch": " 素描风格",
    "isometric": " 等距矢量图",
    "chinese": " 水墨国画",
    "watercolor": " 水彩画风格",
}
"""What follows the caption of a picture. Source: CogView2's text styles. None: the weights' own wording, which is the
published photo style (` 高清摄影`) unless they were trained with another."""
Style = Literal["none", "mainbody", "photo", "flat", "comics", "oil", "sketch", "isometric", "chinese", "watercolor"]
Part = Literal["first frame", "key frames", "interpolation"]
"""What of a clip is drawn with settings of its own."""
Weights = Literal["fp32", "bf16", "fp16", "int8", "int4"]
MAX_SAMPLES = 100_000
MAX_STRENGTH = 1000
"""Of guidance and text bonus: far beyond what is of use, and within what every number format holds."""
MAX_ROUNDS = 8
"""1,025 frames: each round doubles them."""


@dataclass(frozen=True)
class DrawConfig:
    """How the tokens of some frames are drawn. Defaults: key frames after the first, and interpolated frames."""

    temperature: float = 1.05
    """Of the choice among clusters."""
    top_k_clusters: int = 12
    """Likeliest clusters that are kept."""
    token_temperature: float = 0.89
    """Of the choice within a cluster."""
    guidance_scale: float | None = None
    """Logits are guide + scale * (conditional - guide); null: no guidance, at half the work."""
    text_bonus: float | None = None
    """Added to the attention scores of text; null: 0 with guidance, 1.4 without, as published."""

    video_suffix: bool | None = None
    """Whether the caption gets the wording's video suffix; null: with guidance only, as published. Not for pictures."""

    def __post_init__(self) -> None:
        for name in ("temperature", "token_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0; top_k_clusters=1 is the greedy choice")
        for name in ("guidance_scale", "text_bonus"):
            value = getattr(self, name)
            if value is not None and MAX_STRENGTH < abs(value) < math.inf:
                raise ValueError(f"{name}={value} must lie between -{MAX_STRENGTH} and {MAX_STRENGTH}")
        if self.top_k_clusters < 1:
            raise ValueError(f"top_k_clusters={self.top_k_clusters} leaves nothing to draw from; give at least 1")

    @property
    def bonus(self) -> float:
        """The text bonus in effect."""
        if self.text_bonus is not None:
            return self.text_bonus
        return UNGUIDED_TEXT_BONUS if self.guidance_scale is None else 0.0

    @property
    def says_video(self) -> bool:
        """Whether the video suffix is appended, in effect."""
        return self.guidance_scale is not None if self.video_suffix is None else self.video_suffix


LOADING = ("weights", "device", "stream_layers", "compile")
"""Settings that say how models are loaded."""


@dataclass(frozen=True)
class SampleConfig:
    """A clip: first frame from the trunk, key frames from stage 1, then interpolation, each round doubling the rate."""

    seed: int = 0
    samples_per_prompt: int = 1
    seconds: float = 4.0
    """From the first frame to the last; the model reads it as text, so use lengths that it was trained on."""
    rounds: int = 3
    """Of interpolation: 5 key frames become 9, 17, 33 frames; 0: the key frames alone."""
    first_frame: DrawConfig = field(default_factory=lambda: DrawConfig(temperature=1.0, top_k_clusters=16))
    key_frames: DrawConfig = field(default_factory=lambda: DrawConfig(guidance_scale=3.0))
    interpolation: DrawConfig = field(default_factory=DrawConfig)
    style: Style = "photo"
    """Of the first frame, where a text-to-image trunk draws it; what the words become is in STYLES."""
    num_clusters: int | None = None
    """k-means clusters of the image codebook; null: the labels beside the weights, or 500 where there are none.
    As many as there are codes: plain top-k sampling."""
    published_prefill: bool = False
    """Let given frames of interpolation look across windows as published inference does, though training does not."""
    schedule: Literal["sequential", "wavefront", "speculative"] = "sequential"
    """`wavefront`: frames in flight together where windows let them; `speculative`: guesses, many checked at once. The
    same draws in fewer steps."""
    weights: Weights = "fp32"
    """How the transformers' matrices are held: decoding takes as long as reading them. A CPU computes in float32."""
    device: str = "auto"
    """`auto`: the GPU where there is one; or `cpu`, `cuda`, `cuda:1`."""
    stream_layers: bool = False
    """Whether the layers' matrices stay in the CPU's memory, or on disk, and are copied to the GPU when they are used:
    for models that it cannot hold. Slow; many clips at once cost little more than one."""
    compile: bool = False
    """On a GPU, whether decoding goes by torch.compile and CUDA graphs: minutes at first, then faster steps."""
    clips_at_once: int = 128
    """Clips decoded as one batch (guides come on top): memory against speed. Does not change what is drawn."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative; give 0 or more")
        if not 0.01 < self.seconds <= 3600:
            raise ValueError(f"seconds={self.seconds} must be above 0.01 and at most 3600")
        for name, least in (("samples_per_prompt", 1), ("rounds", 0), ("clips_at_once", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name, most in (("samples_per_prompt", MAX_SAMPLES), ("rounds", MAX_ROUNDS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} asks for more than memory holds; give at most {most}")
        if self.num_clusters is not None and self.num_clusters < 1:
            raise ValueError(f"num_clusters={self.num_clusters} must be at least 1")
        if self.compile and self.stream_layers:
            raise ValueError("compile=true cannot record layers that come with each step; leave out stream_layers=true")

    def draw_of(self, part: Part) -> DrawConfig:
        draws: dict[Part, DrawConfig] = {
            "first frame": self.first_frame,
            "key frames": self.key_frames,
            "interpolation": self.interpolation,
        }
        return draws[part]


@dataclass(frozen=True)
class UpsampleConfig:
    """Super-resolution. Defaults: CogVideo's. Source: the published code."""

    seed: int = 0
    temperature: float = 1.0
    """Of the direct model's choice among clusters; the iterative model draws by plain top-k, see `superres.rounds`."""
    top_k_clusters: int = 6
    token_temperature: float = 0.6
    num_clusters: int | None = None
    """As of `SampleConfig`."""
    frames_at_once: int = 1
    """In a forward: memory against speed."""
    weights: Weights = "fp32"
    device: str = "auto"
    stream_layers: bool = False

    def __post_init__(self) -> None:
        DrawConfig(self.temperature, self.top_k_clusters, self.token_temperature)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative; give 0 or more")
        if self.frames_at_once < 1:
            raise ValueError(f"frames_at_once={self.frames_at_once} must be at least 1")
        if self.num_clusters is not None and self.num_clusters < 1:
            raise ValueError(f"num_clusters={self.num_clusters} must be at least 1")

    @property
    def clips_at_once(self) -> int:
        """Clips whose files appear together."""
        return 1
