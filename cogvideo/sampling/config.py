"""Settings of sampling and super-resolution, with the published values as defaults. Plain data."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from cogvideo.config import MAX_SEED
from cogvideo.dtypes import WeightChoice

UNGUIDED_TEXT_BONUS = 1.4
"""Published: without guidance, attention to the text is strengthened instead."""
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
"""Suffix of the caption of a first frame. Source: CogView2's text styles. None: the suffix that the weights were
trained with, by default the published photo style (` 高清摄影`)."""
Style = Literal["none", "mainbody", "photo", "flat", "comics", "oil", "sketch", "isometric", "chinese", "watercolor"]
StageName = Literal["first_frame", "key_frames", "interpolation"]
"""The stages of a clip that have draw settings of their own; all rounds of interpolation share one."""
MAX_SAMPLES = 100_000
MAX_STRENGTH = 1000
"""Bound on guidance scale and text bonus: far beyond useful values, and representable in every number type."""
MAX_TOP_K = 1 << 24
"""More than any codebook has."""
MAX_ROUNDS = 8
"""1,025 frames; each round doubles the frame rate."""


@dataclass(frozen=True)
class DrawConfig:
    """How tokens are drawn from logits. Defaults: key frames after the first, and interpolated frames."""

    temperature: float = 1.05
    """Temperature of the choice among clusters."""
    top_k_clusters: int = 12
    """Number of likeliest clusters to choose among."""
    token_temperature: float = 0.89
    """Temperature of the choice within a cluster."""
    guidance_scale: float | None = None
    """Logits are guide + scale * (conditional - guide); null: no guidance, at half the cost."""
    text_bonus: float | None = None
    """Added to the attention scores of text; null: 0 with guidance, 1.4 without, as published."""

    video_suffix: bool | None = None
    """Whether the prompt format's video suffix follows the caption; null: with guidance only, as published. Does not
    apply to first frames drawn by a text-to-image trunk."""

    def __post_init__(self) -> None:
        for name in ("temperature", "token_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be above 0; for greedy decoding set top_k_clusters=1"
                )
        for name in ("guidance_scale", "text_bonus"):
            value = getattr(self, name)
            if value is not None and MAX_STRENGTH < abs(value) < math.inf:
                raise ValueError(f"{name}={value} must lie between -{MAX_STRENGTH} and {MAX_STRENGTH}")
        if not 1 <= self.top_k_clusters <= MAX_TOP_K:
            raise ValueError(f"top_k_clusters={self.top_k_clusters}; expected 1 to {MAX_TOP_K}")

    @property
    def effective_text_bonus(self) -> float:
        if self.text_bonus is not None:
            return self.text_bonus
        return UNGUIDED_TEXT_BONUS if self.guidance_scale is None else 0.0

    @property
    def appends_video_suffix(self) -> bool:
        return self.guidance_scale is not None if self.video_suffix is None else self.video_suffix


LOADING_KEYS = ("weights", "device", "stream_layers", "compile")
"""Settings that determine how models are loaded, so they cannot change afterwards."""
ROUND_TOP_K = (40, 40, 40, 20, 20, 10)
"""Published values for the six rounds of the iterative super-resolution model."""
UPSAMPLE_LOADING_KEYS = ("weights", "device", "stream_layers", "num_clusters", "round_top_k")
"""The same for super-resolution."""


@dataclass(frozen=True)
class SampleConfig:
    """A clip: first frame by the trunk, key frames by stage 1, then rounds of interpolation that double the rate."""

    seed: int = 0
    samples_per_prompt: int = 1
    seconds: float = 4.0
    """Time from the first frame to the last; the model reads it as text, so use lengths that it was trained on."""
    rounds: int = 3
    """Rounds of interpolation: 5 key frames become 9, 17, 33 frames; 0: key frames only."""
    given_frames: int = 1
    """Number of frames from the end of a continued video, at the rate of key frames, that stage 1 sees (fewer if the
    video is shorter). At most one less than stage 1 has frames."""
    first_frame: DrawConfig = field(default_factory=lambda: DrawConfig(temperature=1.0, top_k_clusters=16))
    key_frames: DrawConfig = field(default_factory=lambda: DrawConfig(guidance_scale=3.0))
    interpolation: DrawConfig = field(default_factory=DrawConfig)
    style: Style = "photo"
    """Style of a first frame drawn by a text-to-image trunk; STYLES has the suffixes."""
    num_clusters: int | None = None
    """Number of k-means clusters of the image codebook; null: the bundle's own clusters, or 500 if it has none. With
    as many clusters as codes, sampling is plain top-k."""
    published_prefill: bool = False
    """Let given frames of interpolation attend across windows, as published inference does and training does not."""
    schedule: Literal["sequential", "wavefront", "speculative"] = "sequential"
    """`wavefront`: several frames in flight where attention windows allow it; `speculative`: draft many tokens, verify
    them in one forward pass. Both draw the same tokens in fewer steps."""
    weights: WeightChoice = "auto"
    """Number type of the transformers' matrices; decoding is bound by reading them. `auto`: bfloat16 on a GPU, float32
    on a CPU, which computes in float32 whatever the matrices are."""
    device: str = "auto"
    """`auto`: a GPU if there is one; or `cpu`, `cuda`, `cuda:1`."""
    stream_layers: bool = False
    """Whether the layers' matrices stay in CPU memory, or on disk, and are copied to the GPU for each use: for models
    that do not fit. Slow, but many clips at once cost little more than one."""
    compile: bool = False
    """Whether a GPU decodes with torch.compile and CUDA graphs: compiling takes minutes, then steps are faster."""
    clips_at_once: int = 128
    """Batch size in clips (guidance doubles the rows): trades memory for speed. Does not change what is drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed}; expected 0 to {MAX_SEED}")
        if not 0.01 < self.seconds <= 3600:
            raise ValueError(f"seconds={self.seconds} must be above 0.01 and at most 3600")
        for name, least in (("samples_per_prompt", 1), ("rounds", 0), ("given_frames", 1), ("clips_at_once", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name, most in (("samples_per_prompt", MAX_SAMPLES), ("rounds", MAX_ROUNDS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} needs too much memory; give at most {most}")
        if self.num_clusters is not None and self.num_clusters < 1:
            raise ValueError(f"num_clusters={self.num_clusters} must be at least 1")
        if self.compile and self.stream_layers:
            raise ValueError("compile=true cannot record layers copied for each use; leave out stream_layers=true")

    def draw_config(self, stage: StageName) -> DrawConfig:
        configs: dict[StageName, DrawConfig] = {
            "first_frame": self.first_frame,
            "key_frames": self.key_frames,
            "interpolation": self.interpolation,
        }
        return configs[stage]


@dataclass(frozen=True)
class UpsampleConfig:
    """Super-resolution. Defaults: CogVideo's. Source: the published code."""

    seed: int = 0
    temperature: float = 1.0
    """Temperature of the direct model's choice among clusters."""
    top_k_clusters: int = 6
    token_temperature: float = 0.6
    round_top_k: tuple[int, ...] = ROUND_TOP_K
    """Number of likeliest tokens that each round of the iterative model chooses among, at temperature 1. Fewer numbers
    mean fewer rounds; [] leaves the model out."""
    num_clusters: int | None = None
    """As in `SampleConfig`."""
    noise: Literal["independent", "shared"] = "independent"
    """Random numbers of a clip's frames: `independent`, as published; or `shared`, the same ones for the same place in
    every frame, so that what stands still keeps its tokens and does not flicker."""
    frames_at_once: int = 1
    """Batch size in frames: trades memory for speed."""
    weights: WeightChoice = "auto"
    device: str = "auto"
    stream_layers: bool = False

    def __post_init__(self) -> None:
        DrawConfig(self.temperature, self.top_k_clusters, self.token_temperature)
        if len(self.round_top_k) > len(ROUND_TOP_K) or not all(1 <= top_k <= MAX_TOP_K for top_k in self.round_top_k):
            raise ValueError(
                f"round_top_k={list(self.round_top_k)}; expected at most {len(ROUND_TOP_K)} numbers of 1 to {MAX_TOP_K}"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed}; expected 0 to {MAX_SEED}")
        if self.frames_at_once < 1:
            raise ValueError(f"frames_at_once={self.frames_at_once} must be at least 1")
        if self.num_clusters is not None and self.num_clusters < 1:
            raise ValueError(f"num_clusters={self.num_clusters} must be at least 1")


@dataclass(frozen=True)
class SampleAndUpsampleConfig(SampleConfig):
    """`cogvideo sample --upsample`: clips, then the same clips at a higher resolution."""

    upsample: UpsampleConfig = field(default_factory=UpsampleConfig)
    """Super-resolution. Of these, `seed`, `weights`, `device` and `stream_layers` default to those of the clips."""

    def split(self) -> tuple[SampleConfig, UpsampleConfig]:
        """The settings of each of the two steps."""
        clips = {each.name: getattr(self, each.name) for each in fields(SampleConfig)}
        return SampleConfig(**clips), self.upsample
