"""Settings of a training run, grouped by who reads them. Plain data: nothing here imports torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cogvideo.model.config import ModelConfig, Recompute, TrunkWeights
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.superres.config import SuperresConfig

Task = Literal["tokenizer", "image", "sequential", "interpolation", "superres"]


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    path: list[Path] | None = None
    """A folder that `cogvideo prepare` made, or a list of them, read as one: frames (`--frames`) for the tokenizer,
    pairs (`low_res_pixels=`) for superres, clips of tokens for all else."""
    embedded_clips: int | None = None
    """Instead of path: so many moving digits, made at the start by the image tokenizer; to try things out."""
    validation: list[Path] | None = None
    """Another such folder, or several, never learned from; the loss is logged."""
    clip_seconds: list[float] | None = None
    """Clips of these lengths only; null for all."""
    balance_lengths: bool = True
    """Whether every clip length is seen equally often."""
    guidance_dropout: float = 0.0
    """How often the caption is replaced by the guide's."""
    suffix_probability: float = 1.0
    """How often a clip's caption gets the video suffix."""
    text_tokenizer: Path | None = None
    """The sentencepiece model, which gives the model its vocabulary; null: that of the bundled weights."""
    image_tokenizer: Path | None = None
    """Decodes tokens for sample sheets; null: that of the bundled weights."""
    prompt: PromptFormat = field(default_factory=PromptFormat)

    def __post_init__(self) -> None:
        if self.embedded_clips is not None and self.embedded_clips < 1:
            raise ValueError(f"data.embedded_clips={self.embedded_clips}; expected at least 1, or null for data.path")


@dataclass(frozen=True)
class InitConfig:
    """Where the weights start."""

    checkpoint: Path | None = None
    """One of our checkpoints: of the same task, to go on from it, or one whose trunk is inherited; null: random."""
    temporal: Literal["qkv", "qkv_and_dense", "copy"] = "qkv_and_dense"
    """The temporal channel starts as the trunk's spatial one (`qkv` as published), or as the checkpoint's (`copy`)."""
    mix_logit: float = 0.0
    """Start of the channels' mixing logit; 0 is the published even mix, large values start as the trunk alone."""
    freeze_trunk: bool = False
    """Whether only what CogVideo adds to the trunk learns."""
    trunk_weights: TrunkWeights = "full"
    """`int8`: a frozen trunk's matrices are held so, with a float32 scale a row, and widened where they are used."""

    def __post_init__(self) -> None:
        if self.trunk_weights == "int8" and not self.freeze_trunk:
            raise ValueError(
                "init.trunk_weights=int8 cannot learn, and init.freeze_trunk=false; set init.freeze_trunk=true, "
                "or init.trunk_weights=full"
            )


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its learning rate over the steps."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """On matrices and embeddings; not on LayerNorm, biases and mixing logits."""
    grad_clip: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    warmup_steps: int = 500
    """Steps of linear rise to lr."""
    min_lr_ratio: float = 0.1
    """The cosine ends at this part of lr."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimiser.lr={self.lr}; expected above 0")
        if self.eps <= 0:
            raise ValueError(f"optimiser.eps={self.eps}; expected above 0")
        for name in ("weight_decay", "grad_clip", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimiser.{name}={getattr(self, name)}; expected 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimiser.betas={list(self.betas)}; expected two numbers from 0 to below 1")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimiser.min_lr_ratio={self.min_lr_ratio}; expected 0 to 1")


@dataclass(frozen=True)
class LoopConfig:
    """How long, in what portions, with what numbers."""

    steps: int = 1000
    """The schedule ends here."""
    stop_at: int | None = None
    """Save and stop at this step, the schedule unchanged."""
    batch_size: int = 32
    """Clips (or frames) a step, over all processes."""
    micro_batch_size: int | None = None
    """Clips that one forward holds; null: as many as a process has. The rest of a step is accumulated."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numbers of matrix products; softmax, norms and loss are float32."""
    weights: Literal["fp32", "dtype"] = "fp32"
    """`dtype`: weights are held in dtype too, with float32 copies in the optimiser alone (large models)."""
    recompute: Recompute = "nothing"
    """Activations that are computed anew in the backward pass instead of kept: those of each MLP, or all but each
    layer's input. docs/results.md has what they save and cost."""
    seed: int = 0
    num_threads: int | None = None
    """CPU threads a process; null: as OMP_NUM_THREADS or the machine says."""
    time_limit_minutes: float | None = None
    """Save and stop after so long."""
    max_bad_steps: int = 10
    """Steps with a NaN or infinite loss are skipped; so many in a row end the run."""

    def __post_init__(self) -> None:
        for name in ("steps", "stop_at", "batch_size", "micro_batch_size", "num_threads", "max_bad_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}; expected at least 1")
        if self.seed < 0:
            raise ValueError(f"train.seed={self.seed}; expected 0 or more")
        if self.time_limit_minutes is not None and self.time_limit_minutes <= 0:
            raise ValueError(f"train.time_limit_minutes={self.time_limit_minutes}; expected above 0, or null for none")
        if self.dtype == "fp16" and self.weights == "fp32":
            raise ValueError("train.dtype=fp16 needs train.weights=dtype, which scales the loss")

    @property
    def last_step(self) -> int:
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)

    def accumulation(self, world: int) -> int:
        """Forwards a step in each of `world` processes. Raises ValueError if the batch cannot be cut so."""
        micro = self.micro_batch_size or self.batch_size // world
        if micro < 1 or self.batch_size % (world * micro):
            raise ValueError(
                f"train.batch_size={self.batch_size} cannot be cut into {world} processes with "
                f"train.micro_batch_size={self.micro_batch_size}; choose a multiple"
            )
        return self.batch_size // (world * micro)


@dataclass(frozen=True)
class LogConfig:
    """What is told, and what is kept, how often (in steps)."""

    every: int = 20
    """Lines of metrics.jsonl, each a mean over the steps since the one before."""
    save_every: int = 1000
    keep_last: int = 2
    """Checkpoints kept."""
    preview_every: int = 1000
    """Sample sheets; 0: none."""
    validate_every: int = 500
    validation_batches: int = 8
    wandb: Literal["off", "offline", "online"] = "off"
    tensorboard: bool = False
    """Into run_dir/tensorboard; needs the extra `[tensorboard]`."""
    peak_tflops: float | None = None
    """What a process's device can do a second in train.dtype, for MFU; null: a matrix product is timed at the start."""

    def __post_init__(self) -> None:
        for name in ("every", "save_every", "keep_last", "validate_every", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"log.{name}={getattr(self, name)}; expected at least 1")
        if self.preview_every < 0:
            raise ValueError(f"log.preview_every={self.preview_every}; expected 0 or more")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"log.peak_tflops={self.peak_tflops}; expected above 0, or null to measure it")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """How weights, gradients and the optimiser are spread."""

    stage: int = 0
    """ZeRO: 0 nothing is spread, 1 the optimiser, 2 gradients too, 3 weights too. With train.weights=dtype, 0 is 1."""
    offload_optimizer: bool = False
    """Keep the optimiser, and float32 weights with it, in CPU memory: needs stage 1, 2 or 3."""
    timeout_minutes: float = 30.0
    """How long a process waits for the others before it gives up."""
    file: Path | None = None
    """A DeepSpeed JSON file, merged over what follows from these settings."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.stage={self.stage}; expected 0, 1, 2 or 3")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("deepspeed.offload_optimizer=true needs deepspeed.stage=1, 2 or 3")
        if self.timeout_minutes <= 0:
            raise ValueError(f"deepspeed.timeout_minutes={self.timeout_minutes}; expected above 0")


@dataclass(frozen=True)
class TokenizerTraining:
    """The image tokenizer's own: read by the task `tokenizer` alone."""

    channels: int = 32
    """Width at full resolution; the structure is the published one."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    encoder_num_res_blocks: int = 1
    decoder_num_res_blocks: int = 0
    z_channels: int = 64
    embedding_dim: int = 32
    norm_groups: int = 8
    norm_scope: Literal["image", "pixel"] = "image"
    """`pixel` keeps what a code says to its own surroundings, so that plain ground takes few codes."""
    mid_attention: bool = True
    num_codes: int = 1024
    level: int = 1
    """Compress rate 4 * 2**level."""
    pixel_mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)
    pixel_std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)
    continuous_steps: int = 200
    """Steps as a plain autoencoder before k-means sets the codebook."""
    ema_decay: float = 0.99
    revive_every: int = 20
    """Steps between revivals of codes that nothing chooses."""
    revive_below: float = 0.03
    """Codes chosen less often than this a step, on average, count as dead."""
    revive_until: float = 0.8
    """Part of the run after which no code is revived, so that the rest settle."""
    edge_weight: float = 1.0
    commitment: float = 1.0

    def __post_init__(self) -> None:
        sizes = ("channels", "encoder_num_res_blocks", "z_channels", "embedding_dim", "norm_groups", "num_codes")
        for name in (*sizes, "continuous_steps", "revive_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"tokenizer.{name}={getattr(self, name)}; expected at least 1")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"tokenizer.channel_multipliers={list(self.channel_multipliers)}; expected 1 or more each")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"tokenizer.ema_decay={self.ema_decay}; expected 0 or more, and below 1")


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    task: Task = "sequential"
    """What is trained; `tokenizer` is the image tokenizer, `image` the text-to-image trunk, `superres` what
    `superres.method` says."""
    run_dir: Path = Path("runs/default")
    """Everything the run writes goes here."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Its task and vocabulary follow from `task` and the text tokenizer."""
    superres: SuperresConfig = field(default_factory=SuperresConfig)
    """Read instead of `model` by the task `superres`; its vocabulary follows from the text tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    log: LogConfig = field(default_factory=LogConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    tokenizer: TokenizerTraining = field(default_factory=TokenizerTraining)
